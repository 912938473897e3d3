"""Batches and next jobs keep their promise: real processes are killed, stopped and emptied.

What starts when a batch has ended, starts once.
"""

import time

import pytest

from harness.faults import on_each, on_each_broker, on_each_pool, on_prefork, ran_once
from harness.project import wait_for


def enqueue(stack, task, *args, count=3, queue="cpu"):
    """Enqueue a batch of jobs, and two jobs that start afterwards."""
    code = f"""
batch = batches.enqueue(
    [{task}.using(queue=queue).s(*args)] * count,
    on_success=quick.si().set(queue="io"), on_finish=quick.si().set(queue="io"),
)
result = [str(batch.pk), [str(job.pk) for job in batch.jobs.all()]]
"""
    return stack.ask(code, args=[str(arg) for arg in args], count=count, queue=queue)


def state(stack, batch):
    return stack.ask("result = Batch.objects.get(pk=batch).state", batch=batch)


def wait_until_ended(stack, batch):
    """Wait until the batch has succeeded, and what starts afterwards too. Each ran once."""
    wait_for(lambda: state(stack, batch) == "succeeded")
    ask = "result = [str(job.pk) for job in Job.objects.filter(follows=batch)]"
    callbacks = stack.ask(ask, batch=batch)
    assert len(callbacks) == 2
    stack.wait_until_succeeded(*callbacks, crashes=0)
    assert ran_once(stack, callbacks)


# A worker is killed after the end of the last member


def kill_between_the_ends(stack, **variables):
    """Let a worker run the last job of a batch, and die before it has ended the batch."""
    stack.beat.stop()
    batch, jobs = enqueue(stack, "quick", count=1, queue="test")
    worker = stack.make_worker("dying", "--queues test", FAULT="death_between_ends", **variables)
    worker.launch()
    stack.wait_until_succeeded(*jobs, crashes=0)
    return batch, worker


@pytest.mark.promise("Follow-up jobs and batch callbacks are stored exactly once")
@on_each_pool
def test_a_worker_killed_between_the_ends_of_a_job_and_its_batch_loses_no_callback(stack):
    """Beat is away, too. When it is back, it ends the batch."""
    batch, worker = kill_between_the_ends(stack, DIES="worker")
    wait_for(lambda: not worker.is_running())
    assert state(stack, batch) == "open"
    stack.beat.start()
    wait_until_ended(stack, batch)


@on_prefork
def test_a_child_killed_between_the_ends_of_a_job_and_its_batch_loses_no_callback(stack):
    batch, worker = kill_between_the_ends(stack, DIES="child")
    wait_for(lambda: "WorkerLostError" in worker.printed)
    assert state(stack, batch) == "open"
    stack.beat.start()
    wait_until_ended(stack, batch)


# A worker is stopped


@on_each
def test_a_worker_stopped_while_jobs_of_a_batch_run_loses_no_callback(stack, gate):
    batch, jobs = enqueue(stack, "hold", gate)
    stack.wait_until_started(*jobs)
    stack.worker.stop()
    assert state(stack, batch) == "open"
    gate.touch()
    stack.worker.start()
    wait_until_ended(stack, batch)


# The broker is unavailable, or loses its messages


@on_each
def test_a_batch_ends_while_its_broker_is_away(stack, gate):
    batch, jobs = enqueue(stack, "hold", gate)
    stack.wait_until_started(*jobs)
    with stack.supervised(*stack.workers):
        stack.broker.kill()
        gate.touch()
        wait_for(lambda: state(stack, batch) == "succeeded")
        stack.broker.start()
        wait_until_ended(stack, batch)


def steps(stack, first):
    """Return the ids of this job and of those that it and its next jobs have enqueued, in order."""
    code = """
result = [first]
while following := Job.objects.filter(follows=result[-1]).values_list("pk", flat=True).first():
    result.append(str(following))
"""
    return stack.ask(code, first=first)


@pytest.mark.promise("Follow-up jobs and batch callbacks are stored exactly once")
@on_each_broker
def test_an_emptied_broker_loses_no_next_job(stack):
    """The message of the second step is lost. It is in `cpu`: SQS empties a queue once a minute."""
    stack.worker.stop()
    first = stack.enqueue("step", "cpu", "cpu", queue="io")
    wait_for(lambda: len(steps(stack, first)) == 2)
    stack.beat.pause()
    wait_for(lambda: stack.messages_in("cpu"))
    stack.empty("cpu")
    stack.worker.start()
    stack.beat.resume()
    wait_for(lambda: len(steps(stack, first)) == 3)
    jobs = steps(stack, first)
    stack.wait_until_succeeded(*jobs, crashes=0)
    assert ran_once(stack, jobs)


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
