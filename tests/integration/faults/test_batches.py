"""Batches and next jobs keep their promise while Beat is away.

What starts when a batch has ended, starts once.
"""

import time

from harness.faults import on_each
from harness.project import wait_for


def state(stack, batch):
    return stack.ask("result = Batch.objects.get(pk=batch).state", batch=batch)


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
