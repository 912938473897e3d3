"""Each worker has a row: from which queues it takes jobs, how many slots it has, and if it lives.

Heartbeats come each second, not each ten.
"""

import signal

import pytest

from harness.faults import on_each_pool, stacks
from harness.project import wait_for


def find(stack):
    """Return the row of the worker `mine`, or None."""
    code = """
statistics.STALE_SECONDS = 6
result = Worker.objects.filter(name__startswith="mine@").values("slots", "queues").first()
if result:
    result["is_alive"] = statistics.alive().filter(name__startswith="mine@").exists()
"""
    return stack.ask(code)


def wait_until(stack, **fields):
    """Wait until the row has these values."""
    wait_for(lambda: fields.items() <= (find(stack) or {}).items())


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
