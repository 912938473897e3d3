"""Each worker has a row: what it is, from which queues it takes jobs, how busy, and if it lives.

Heartbeats come each second, not each ten.
"""

import signal
import time

import pytest

from harness.faults import on_each_pool, on_prefork_and_threads, stacks
from harness.project import wait_for


def find(stack, name="mine"):
    """Return the row of a worker, or None."""
    code = """
heartbeat.STALE_SECONDS = 6
rows = Worker.objects.filter(name__startswith=f"{name}@")
result = rows.values("pool", "slots", "busy", "queues", "version", "seen_at").first()
if result:
    result["is_alive"] = heartbeat.alive().filter(name__startswith=f"{name}@").exists()
"""
    return stack.ask(code, name=name)


def wait_until(stack, **fields):
    """Wait until the row has these values. Return the row."""

    def has_them():
        row = find(stack)
        return row and all(row[name] == value for name, value in fields.items()) and row

    return wait_for(has_them)


def wait_for_next(stack):
    """Wait for the second heartbeat from now: the next one may be on its way. Return the row."""
    for _ in range(2):
        seen = find(stack)["seen_at"]
        row = wait_for(lambda seen=seen: (row := find(stack))["seen_at"] != seen and row)
    return row


@pytest.fixture
def mine(stack):
    """A function that starts a worker with two slots for the queue `cpu`, which no other has."""
    stack.worker.stop()

    def start(**options):
        options = {"FAULT": "quick_heartbeat", "WORKER_CONCURRENCY": 2, **options}
        worker = stack.make_worker("mine", "--queues cpu", **options).start()
        wait_until(stack, is_alive=True)
        return worker

    yield start
    stack.ask("Worker.objects.all().delete()")


@on_each_pool
def test_a_row_shows_slots_queues_and_how_busy_a_worker_is(stack, mine, gate):
    mine(RELEASE="1.2.3")
    row = find(stack)
    pool = stack.project.answers["worker_pool"]
    shown = [row[name] for name in ("pool", "slots", "busy", "queues", "version")]
    assert shown == [pool, 2, 0, ["cpu"], "1.2.3"]
    jobs = [stack.enqueue("hold", gate, queue="cpu") for _ in range(6)]
    wait_until(stack, busy=2)
    assert wait_for_next(stack)["busy"] == 2  # not the messages that it holds
    gate.touch()
    stack.wait_until_final(*jobs)
    wait_until(stack, busy=0)


CONTROL = "from config.celery import app\nresult = app.control.{}"


@stacks(brokers=["redis", "rabbitmq"], pools=["prefork", "gevent"], every_pair=True)
def test_a_row_follows_remote_control(stack, mine):
    mine()
    # A worker on Redis is ready a moment before it listens to remote control.
    wait_for(lambda: "mine@" in str(stack.ask(CONTROL.format("ping()"))))
    stack.ask(CONTROL.format("add_consumer('io')"))
    wait_until(stack, queues=["cpu", "io"])
    stack.ask(CONTROL.format("cancel_consumer('cpu')"))
    wait_until(stack, queues=["io"])
    stack.ask(CONTROL.format("pool_grow(2)"))
    wait_until(stack, slots=4)
    stack.ask(CONTROL.format("pool_shrink(1)"))
    wait_until(stack, slots=3)


# Not with SQS, which has no connection that could be lost.
@stacks(brokers=["redis", "rabbitmq"], pools=["prefork"])
def test_a_worker_without_its_broker_takes_from_no_queue(stack, mine):
    worker = mine()
    with stack.supervised(worker):
        stack.broker.kill()
        wait_until(stack, queues=[])
        assert wait_for_next(stack)["is_alive"]
        stack.broker.start()
        wait_until(stack, queues=["cpu"], is_alive=True)


@on_each_pool
def test_the_row_goes_however_a_worker_ends(stack, mine, gate):
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGQUIT:
        mine().stop(number)
        assert not find(stack), number
    job = stack.enqueue("hold", gate, queue="cpu")
    for number in signal.SIGTERM, signal.SIGQUIT:  # prefork ends at SIGINT only after the function
        worker = mine()
        stack.wait_until_started(job, times=1 + (number == signal.SIGQUIT))
        # After the end of a later job, the worker's main process knows that this one has started.
        stack.wait_until_final(stack.enqueue("quick", queue="cpu"))
        worker.stop(number)
        assert not find(stack), number
    stack.ask("cancel(Job.objects.all())")
    worker = mine(FAULT="no_reconnect")
    stack.broker.kill()
    assert worker.wait()
    assert "an error of Celery" in worker.printed and not find(stack)


@on_prefork_and_threads
def test_a_worker_that_ends_takes_from_no_queue(stack, mine, gate):
    worker = mine(SOFT_SHUTDOWN_SECONDS=30)
    job = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(job)
    worker.process.terminate()
    wait_until(stack, queues=[], is_alive=True)
    gate.touch()
    worker.wait()
    assert not find(stack)


@on_each_pool
def test_a_worker_that_is_killed_or_frozen_is_no_longer_alive(stack, mine):
    worker = mine()
    worker.pause()
    wait_until(stack, is_alive=False)
    worker.resume()
    wait_until(stack, is_alive=True)
    worker.kill()
    wait_until(stack, is_alive=False)
    stack.ask("Worker.objects.update(seen_at=Now() - timedelta(minutes=61))")
    wait_for(lambda: not find(stack))  # Beat deletes it


@on_each_pool
def test_the_heartbeat_outlives_the_database(stack, mine):
    mine()
    stack.database.kill()
    time.sleep(3)
    stack.database.start()
    stack.ask("Worker.objects.all().delete()")
    wait_until(stack, is_alive=True, queues=["cpu"])
    stack.database.pause()
    time.sleep(3)
    stack.database.resume()
    wait_for_next(stack)
