"""What an attacker tried on a running output. What needs no server stands in the output's tests."""

import re
import socket
import time
from urllib.parse import urlsplit

import pytest
import servers
from project import free_ports
from test_run import combinations, outputs

default = outputs(next(combinations()))
PASSWORD = "only-this-server-knows"
each_broker = outputs(*{each["broker"]: each for each in reversed(list(combinations()))}.values())


@each_broker
def test_celery_and_flower_show_no_password(project, tmp_path):
    """Neither those of broker and results, nor that of the cache, which Celery need not know."""
    if "flower" not in project.read("Procfile"):
        pytest.skip("this broker has no Flower and no remote control")
    (tmp_path / "rabbitmq.conf").write_text(f"default_pass = {PASSWORD}\n")
    with servers.real(project.free_servers(), tmp_path) as addresses:
        variables = {"CACHE_URL": f"redis://:{PASSWORD}@127.0.0.1:1/2"}
        for name, url in addresses.items():
            variables[name] = protect(url)
        with project.up(**variables) as site:
            conf = [".venv/bin/celery", "-A", "config", "inspect", "conf", "--timeout", "30"]
            shown = {
                "inspect conf": project.call(*conf, "-d", site.worker, **site.environment),
                "report": project.call(*conf[:3], "report", **site.environment),
                "Flower": str(site.ask_flower("/api/workers?refresh=1")[2]),
                "the log": site.log,
            }
    for name, text in shown.items():
        assert PASSWORD not in text, name
    assert "broker_url" in shown["inspect conf"] and "broker_url" in shown["Flower"]


def protect(url):
    """Give the server at this URL the password; return its URL with it."""
    parts = urlsplit(url)
    if parts.scheme == "redis":
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            connection.sendall(f"CONFIG SET requirepass {PASSWORD}\r\n".encode())
            assert connection.recv(99).startswith((b"+OK", b"-NOAUTH"))
    user = "guest" if parts.scheme == "amqp" else ""
    return re.sub("//(.*@)?", f"//{user}:{PASSWORD}@", url, count=1)


@default
@pytest.mark.parametrize("fault", ["dead", "hung"])
def test_a_cache_that_is_away_stops_no_request(project, fault):
    with socket.socket() as cache:  # accepts, and never answers
        cache.bind(("127.0.0.1", 0))
        cache.listen(100)
        port = cache.getsockname()[1] if fault == "hung" else free_ports(1)[0]
        with project.up(CACHE_URL=f"redis://127.0.0.1:{port}/0") as site:
            for _ in range(5):
                began = time.monotonic()
                assert site.request("/api/jobs/")[0] == 200
                assert time.monotonic() - began < 5
            assert "requests are not counted" in site.log
