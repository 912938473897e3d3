"""The pools: how they differ, and how a process finds out which one it uses."""

import signal
import subprocess
import sys
from ctypes import c_bool
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from celery import current_app as app
from celery.concurrency import get_implementation
from celery.platforms import signals
from celery.signals import worker_init
from celery_steady.shutdown import SoftStop
from kombu.asynchronous.timer import Timer
from settings import SOURCE

from durable_jobs import pools
from durable_jobs.process import process
from durable_jobs.worker import shutdown, startup


def test_a_pool_has_the_name_that_celery_has_for_it():
    for name in "prefork", "threads", "solo":
        assert pools.pool_name(name) == name
        assert pools.pool_name(get_implementation(name)) == name  # as a worker gets it
    assert pools.pool_name("processes") == "prefork"


@pytest.mark.parametrize("connection", [None, Mock()])
def test_sigterm_starts_a_soft_shutdown_between_two_events(monkeypatch, connection):
    """Or at once, if the broker is down: then no event comes."""
    monkeypatch.setitem(app.conf, "worker_soft_shutdown_timeout", 20)  # it is changed
    before = {name: signals[name] for name in ("SIGTERM", "SIGQUIT")}
    children = {"pool._pool._pool": []}
    consumer, seen = Mock(app=app, connection=connection, timer=Timer(), **children), []

    def next_event():
        _, entry = next(iter(consumer.timer))
        if entry:
            entry()

    try:
        signals["SIGQUIT"] = lambda *args: seen.append("cold shutdown")
        SoftStop(consumer).start(consumer)
        signals["SIGTERM"] = lambda *args: seen.append("another step of the worker")
        next_event()
        signal.raise_signal(signal.SIGTERM)
        assert bool(seen) == (connection is None)
        while not seen:
            next_event()
    finally:
        signals.update(before)
    assert seen == ["cold shutdown"]


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_limits_its_shutdown_as_its_pool_needs(monkeypatch, pool):
    started = []
    start_thread = lambda function: started.append((function.func.__name__, *function.args))  # noqa: E731
    monkeypatch.setattr(shutdown, "pool", SimpleNamespace(start_thread=start_thread))
    monkeypatch.setattr(shutdown, "shutting_down", c_bool(False))
    monkeypatch.setattr(process, "is_prefork", None)
    monkeypatch.setattr(startup, "cancel_revoked_jobs", lambda: None)
    worker_init.send(Mock(pool_cls=pool, consumer_cls=None))
    for exitcode in 1, 0:
        shutdown.begin("consumer", exitcode)
    ends = [] if pool == "prefork" else [("requeue_and_exit", "consumer", 1)]
    assert started == ends and shutdown.shutting_down.value


def test_gevent_without_monkey_patching_is_refused(monkeypatch):
    monkeypatch.setattr(startup, "IS_GEVENT", False)
    with pytest.raises(SystemExit, match="--pool gevent"):
        worker_init.send(Mock(pool_cls="gevent", consumer_cls=None))


GREENLETS = """
import gevent.monkey; gevent.monkey.patch_all()
import gevent, threading, time
from gevent._hub_local import get_hub_if_exists
from durable_jobs.pools import pool
main, ticks = threading.get_native_id(), []
assert pool.query(threading.get_native_id) != main
lock = pool.Lock()
def tick():
    with lock:
        pool.sleep(0.001)  # not in a greenlet: if the process ended meanwhile, it would crash
        ticks.append((threading.get_native_id() != main, get_hub_if_exists()))
pool.start_thread(tick)
time.sleep(0.2)
assert ticks == [(True, None)]
assert pool.is_terminated(gevent.GreenletExit()) and not pool.is_terminated(SystemExit())
assert isinstance(gevent.Timeout(1), pool.time_limit_errors)
sent = []
pool.send(sent.append, "here")
assert sent == ["here"]
pool.query(pool.send, lambda: sent.append(threading.get_native_id() == main))
time.sleep(0.2)
assert sent == ["here", True]  # a connection to the broker belongs to one thread
"""
COROUTINES = """
import gevent.monkey; gevent.monkey.patch_all()
import gevent, os, psutil
from durable_jobs.pools import pool
async def function():
    return process.num_threads(), process.num_fds()
process = psutil.Process()
threads, descriptors = pool.run_coroutine(function)
for _ in range(30):
    pool.run_coroutine(function)
with gevent.Timeout(50):
    while process.num_threads() > threads or process.num_fds() > descriptors:
        gevent.sleep(0.1)
os._exit(0)  # not by the end of the interpreter, in which gevent's threads may crash
"""
NO_GREENLETS = """
import sys
from durable_jobs.pools import pool
assert "gevent" not in sys.modules and not pool.is_terminated(SystemExit())
assert pool.query(max, 1, 2) == 2
"""


def test_the_thread_of_a_coroutine_ends_with_it():
    """With gevent. A thread also has two descriptors, and a process can have 1,024."""
    subprocess.run([sys.executable, "-c", COROUTINES], cwd=SOURCE, check=True)


@pytest.mark.parametrize("code", [GREENLETS, NO_GREENLETS], ids=["gevent", "threads"])
def test_a_process_uses_gevent_only_if_it_was_monkey_patched(code):
    subprocess.run([sys.executable, "-c", code], cwd=SOURCE, check=True)
