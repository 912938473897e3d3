"""The pools: what differs between them, and that a process finds out which one it has."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from settings import OUTPUT

from jobs import pools, worker

WORKER = "/bin/celery -A config worker"


@pytest.mark.parametrize(
    ("command", "pool"),
    [
        (WORKER, "the default"),
        (f"{WORKER} --queues threads", "the default"),
        (f"{WORKER} --pool threads -n one@%h", "threads"),
        (f"{WORKER} --pool=gevent", "gevent"),
        (f"{WORKER} -P solo", "solo"),
        (f"{WORKER} -Psolo", "solo"),
        (f"{WORKER} --pool processes", "prefork"),
        ("/x/celery/__main__.py -A config worker", "the default"),
        ("/bin/celery -A config beat", ""),
        ("manage.py runserver", ""),
    ],
)
def test_the_command_line_names_the_pool(monkeypatch, command, pool):
    monkeypatch.setattr(sys, "argv", command.split())
    assert pools.named("the default") == pool


@pytest.mark.parametrize(
    ("command", "before", "after"),
    [
        (WORKER, None, "SIGQUIT"),
        (WORKER, "SIGQUIT", None),
        (f"{WORKER} --pool threads", None, None),
        (f"{WORKER} --pool threads", "SIGQUIT", ""),
        ("/bin/celery -A config beat", None, None),
    ],
)
def test_a_prefork_worker_starts_again_to_end_softly(monkeypatch, command, before, after):
    """And a worker of another pool if it has inherited the variable."""
    started = []
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr("os.execv", lambda *command: started.append(command))
    monkeypatch.delenv("REMAP_SIGTERM", raising=False)
    if before is not None:
        monkeypatch.setenv("REMAP_SIGTERM", before)
    pools.remap_sigterm(pools.named("prefork"))
    assert len(started) == (after is not None)
    assert pools.os.environ.get("REMAP_SIGTERM") == (before if after is None else after)


@pytest.mark.parametrize(
    ("pool", "ready", "shutting_down"),
    [("prefork", 1, 0), ("threads", 0, 1), ("solo", 0, 1)],
)
def test_a_worker_does_what_its_pool_needs(monkeypatch, pool, ready, shutting_down):
    connected = {"worker_ready": [], "worker_shutting_down": []}
    signals = {name: SimpleNamespace(connect=done.append) for name, done in connected.items()}
    monkeypatch.setattr(worker, "signals", SimpleNamespace(**signals))
    monkeypatch.setattr(worker, "follow_revokes", lambda: None)
    worker.start(SimpleNamespace(pool_cls=pool))
    counts = [len(done) for done in connected.values()]
    assert counts == [ready, shutting_down]


def test_greenlets_without_a_patched_python_are_refused():
    pytest.importorskip("gevent")
    with pytest.raises(SystemExit, match="--pool gevent"):
        worker.start(SimpleNamespace(pool_cls="gevent"))


GREENLETS = """
import gevent.monkey; gevent.monkey.patch_all()
import gevent, threading, time
from jobs.pools import pool
main, ticks = threading.get_native_id(), []
assert pool.query(threading.get_native_id) != main
lock = pool.Lock()
def tick():
    with lock:
        ticks.append(threading.get_native_id() != main)
pool.start_thread(tick)
time.sleep(0.2)
assert ticks == [True]
assert pool.is_shutdown(gevent.GreenletExit()) and not pool.is_shutdown(SystemExit())
assert isinstance(gevent.Timeout(1), pool.time_limits)
"""
NO_GREENLETS = """
import sys
from jobs.pools import pool
assert "gevent" not in sys.modules and not pool.is_shutdown(SystemExit())
assert pool.query(max, 1, 2) == 2
"""


@pytest.mark.parametrize("code", [GREENLETS, NO_GREENLETS], ids=["gevent", "threads"])
def test_a_process_has_the_pool_that_it_was_patched_for(code):
    if code is GREENLETS:
        pytest.importorskip("gevent")
    subprocess.run([sys.executable, "-c", code], cwd=OUTPUT, check=True)
