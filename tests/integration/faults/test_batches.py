"""Batches and next jobs keep their promise: a worker is killed, and Beat is away.

What starts when a batch has ended, starts once.
"""

import time

import pytest

from harness.faults import on_each, on_each_pool, ran_once
from harness.project import wait_for


def state(stack, batch):
    return stack.ask("result = Batch.objects.get(pk=batch).state", batch=batch)


# A worker is killed after the end of the last member


@pytest.mark.promise("Follow-up jobs and batch callbacks are stored exactly once")
@on_each_pool
def test_a_worker_killed_between_the_ends_of_a_job_and_its_batch_loses_no_callback(stack):
    """Beat is away, too. When it is back, it ends the batch."""
    stack.beat.stop()
    batch, job = stack.ask("""
batch = batches.enqueue(
    [quick.using(queue="test").s()],
    on_success=quick.si().set(queue="io"), on_finish=quick.si().set(queue="io"),
)
result = [str(batch.pk), str(batch.jobs.get().pk)]
""")
    worker = stack.make_worker("dying", "--queues test", FAULT="death_between_ends")
    worker.launch()
    stack.wait_until_succeeded(job, crashes=0)
    wait_for(lambda: not worker.is_running())
    assert state(stack, batch) == "open"
    stack.beat.start()
    wait_for(lambda: state(stack, batch) == "succeeded")
    ask = "result = [str(job.pk) for job in Job.objects.filter(follows=batch)]"
    callbacks = stack.ask(ask, batch=batch)
    assert len(callbacks) == 2
    stack.wait_until_succeeded(*callbacks, crashes=0)
    assert ran_once(stack, callbacks)


# Beat is unavailable


@on_each
def test_next_jobs_and_callbacks_start_without_beat(stack):
    """A worker sends their messages as soon as they are stored."""
    code = """
with batches.open_batch(on_success=quick.si()) as batch:
    batches.add(batch, step.using(queue="cpu").s(*["cpu", "io"] * 5))
    batches.add_many(batch, [quick.s()] * 5)
result = str(batch.pk)
"""
    # An earlier test has stopped the broker: until a process tries again, Beat sends its messages.
    time.sleep(stack.ask("from durable_jobs.publish import PUBLISH_PAUSE; result = PUBLISH_PAUSE"))
    stack.beat.stop()
    batch = stack.ask(code)
    wait_for(lambda: state(stack, batch) == "succeeded")
    ask = "result = [str(job.pk) for job in Job.objects.filter(follows=batch)]"
    [callback] = stack.ask(ask, batch=batch)
    stack.wait_until_final(callback)
    members = stack.ask("result = Batch.objects.get(pk=batch).counts", batch=batch)
    assert members == {"succeeded": 16}  # each next job belongs to the batch, too
    assert stack.ask("result = Job.objects.filter(state__in=ACTIVE).count()") == 0
    stack.beat.start()
