"""The tests run an output on the servers that its choices name."""

from contextlib import nullcontext
from types import SimpleNamespace

from harness import servers
from harness.bake import chosen


def test_a_new_broker_is_not_tested_on_another_server_with_the_same_protocol(monkeypatch, tmp_path):
    started = []
    made = {name: lambda _, name=name, port=None: (name, port) for name in servers.SERVERS}
    broker = SimpleNamespace(server="valkey", required="CELERY_BROKER_URL")
    parts = SimpleNamespace(broker=broker, result_backend=chosen().result_backend)
    monkeypatch.setattr(servers, "chosen", lambda: parts)
    monkeypatch.setattr(servers, "SERVERS", made)
    monkeypatch.setattr(servers, "started", lambda *all: nullcontext(started.extend(all)))
    addresses = {"CELERY_BROKER_URL": "redis://h:1/0", "CELERY_RESULT_BACKEND": "redis://h:2/0"}
    output = SimpleNamespace(answers={}, free_servers=lambda: addresses)
    with servers.real(output, tmp_path) as variables:
        assert (variables, started) == (addresses, [("redis", 2)])
