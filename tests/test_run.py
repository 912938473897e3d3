"""An output runs: installed from its own pyproject.toml, with a real worker on a real broker."""

import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest
from conftest import missing
from project import env, free_ports, free_servers, processes_in, wait_for

PRODUCTION = {
    "DEBUG": "False",
    "SECRET_KEY": "a-long-secret-that-only-this-test-knows-0123456789-abcdefghijk",
    "ALLOWED_HOSTS": "example.com",
    "DATABASE_URL": "postgres://user:password@127.0.0.1:5432/name",
    "EMAIL_URL": "smtp+tls://user:password@127.0.0.1:587",
    "CELERY_BROKER_URL": "rediss://:password@127.0.0.1:6379/0?ssl_cert_reqs=required",
    "CELERY_RESULT_BACKEND": "rediss://:password@127.0.0.1:6379/1?ssl_cert_reqs=required",
}
FLOWER = {"FLOWER_BASIC_AUTH": "admin:password"}
ORDER = {"email": "you@example.com", "product": "Tea", "quantity": 2}
with_example = pytest.mark.parametrize("project", [True], ids=["example"], indirect=True)
CHORD = """
from jobs.tasks import *
print(chord([add.s(1, 2), add.s(3, 4)])(add_all.s()).get(timeout=20))
"""


@pytest.fixture(params=["fakeredis", "redis-server"])
def broker(request, project, tmp_path):
    """A broker that runs already: {variable: URL}. `make run` then starts none."""
    [port] = free_ports(1)
    if request.param == "fakeredis":
        command = [project / ".venv/bin/python", "-c", f"import dev; dev.serve_fakeredis({port})"]
    elif shutil.which(request.param):
        command = ["redis-server", "--port", str(port), "--save", ""]
    else:
        missing("redis-server is not installed")
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env(PYTHONPATH=project), stdout=subprocess.DEVNULL
    )
    url = f"redis://127.0.0.1:{port}"
    yield {"CELERY_BROKER_URL": f"{url}/0", "CELERY_RESULT_BACKEND": f"{url}/1"}
    process.terminate()
    process.wait()


def test_its_own_checks_pass(project):
    project.call("make", "check")


def test_its_own_tests_pass(project):
    printed = project.call("make", "test", **free_servers())
    assert re.search(r"= \d+ passed in", printed), printed  # none was skipped


def test_it_is_fit_for_production(project):
    project.manage("check", "--deploy", "--fail-level", "WARNING", **PRODUCTION, **FLOWER)


@pytest.mark.parametrize("variable", sorted(set(PRODUCTION) - {"DEBUG"}))
def test_production_does_not_start_without(project, variable):
    (project / ".env").rename(project / ".env.away")
    try:
        with pytest.raises(AssertionError, match=f"ImproperlyConfigured: .*{variable}"):
            project.manage("check", **{**PRODUCTION, variable: ""})
    finally:
        (project / ".env.away").rename(project / ".env")


@pytest.fixture
def with_tasks(project):
    """The project with tasks of our own, so that it needs no example."""
    tasks = project / "jobs/tasks.py"
    before = tasks.read_text()
    project.add_tasks()
    yield project
    tasks.write_text(before)


def test_it_runs_jobs_and_tasks(with_tasks, broker):
    project = with_tasks
    with project.up(**broker) as site:
        states = list(site.follow(site.enqueue("count", 20)))

        assert [job["state"] for job in states][-1] == "succeeded"
        assert any(0 < job["progress"] < 100 for job in states)
        assert states[-1]["result"] == 20
        assert site.request("/api/jobs/", Authorization="")[0] == 401

        assert wait_for(lambda: site.find_in_flower(states[-1]["id"]), 15, site)
        assert site.ask_flower("/api/workers", authenticated=False)[0] == 401

        assert project.shell(CHORD, **broker) == "10"

        if (project / "orders").exists():
            status, headers, order = site.request("/api/orders/", ORDER)
            assert (status, headers["Retry-After"]) == (202, "1")
            *_, job = site.follow(headers["Location"])
            assert job["state"] == "succeeded"
            assert site.request(f"/api/orders/{order['id']}/")[2]["confirmed_at"]
            assert "Thank you! You ordered 2 × Tea." in site.log


@with_example
def test_a_killed_child_loses_no_job(with_tasks):
    """With the default timings: within 60 s."""
    with with_tasks.up() as site:
        url = site.enqueue("count", 30)
        following = site.follow(url, seconds=90)
        while next(following)["progress"] < 20:
            pass
        _, *children = sorted(site.find("celery -A config worker"))
        for child in children:
            os.kill(child, signal.SIGKILL)
        killed_at = time.monotonic()
        restarted_after = None
        for job in following:
            if job["state"] == "running" and job["progress"] < 20 and not restarted_after:
                restarted_after = time.monotonic() - killed_at

        assert job["state"] == "succeeded"
        assert restarted_after < 60


@with_example
def test_ctrl_c_ends_everything(project):
    with project.up() as site:
        assert len(site.processes()) > 5
        site.stop()

        wait_for(lambda: not site.processes(), 10, site)


@with_example
def test_closing_the_terminal_ends_everything(project):
    ports = dict(zip(["PORT", "FLOWER_PORT"], free_ports(2), strict=True))
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(project)
        os.execvpe("make", ["make", "run"], env(**ports, **free_servers()))
    printed = b""
    while b"Ctrl-C ends everything" not in printed:
        printed += os.read(terminal, 4096)
    os.close(terminal)

    wait_for(lambda: not processes_in(project), 15)
    os.waitpid(child, 0)


@with_example
@pytest.mark.parametrize("command", ["serve_fakeredis|redis-server", "runserver", "beat", "flower"])
def test_when_one_process_dies_all_end(project, command):
    with project.up() as site:
        for pid in site.find(command):
            os.kill(pid, signal.SIGKILL)

        assert site.process.wait(20) != 0
        assert "A process has ended" in site.log
        wait_for(lambda: not site.processes(), 10, site)


@with_example
def test_a_taken_port_is_named(project):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AssertionError, match=f"Port {port} is taken.*PORT={port + 1}"):
            project.call("make", "run", PORT=port)


@with_example
def test_a_broker_elsewhere_gets_no_stand_in(project):
    with pytest.raises(AssertionError, match="No Redis answers at 127.0.0.2:1"):
        web, flower = free_ports(2)
        url = "redis://127.0.0.2:1/0"
        project.call("make", "run", PORT=web, FLOWER_PORT=flower, CELERY_BROKER_URL=url)
