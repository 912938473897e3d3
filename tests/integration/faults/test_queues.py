"""Queues: which jobs they get, and how fast a worker takes from them."""

import os

from harness.faults import on_each_broker, on_one


@on_one
def test_a_job_goes_to_the_queue_of_its_task(stack):
    """Its decorator or CELERY_TASK_ROUTES names it, here `io`. enqueue(queue=…) overrides both."""
    for task in ["declared", "routed"]:
        said, overruled = stack.enqueue(task), stack.enqueue(task, queue="cpu")
        stack.wait_until_final(said, overruled)
        workers = [os.getpgid(stack.notes("start", job)[0]) for job in [said, overruled]]
        assert workers == [stack.other.pid, stack.worker.pid]


@on_each_broker
def test_a_worker_whose_slots_were_full_fetches_the_next_jobs_without_a_pause(stack):
    """250 short jobs on 4 slots. By default Kombu's SQS pauses for a second after every eight."""
    jobs = stack.ask("result = [j.pk for j in enqueue_many([quick.using(queue='cpu').s()] * 250)]")
    stack.wait_until_succeeded(*jobs, crashes=0)
    code = """
starts = sorted(Job.objects.filter(pk__in=jobs).values_list("started_at", flat=True))
result = [(later - at).total_seconds() for at, later in zip(starts, starts[1:])]
"""
    pauses = [seconds for seconds in stack.ask(code, jobs=jobs) if seconds > 0.9]
    assert len(pauses) < 15, pauses  # it would be 31
