"""Runs jobs in the process that calls it, without a broker: for tests."""

from durable_jobs import admission, batches
from durable_jobs.models import Job
from durable_jobs.publish import publish


def run(jobs):
    """Run those of these jobs that are queued. Wait for no countdown and no limit."""
    admission.ignore_limits(jobs)
    for job in jobs.filter(state="queued"):
        publish([job])


def run_jobs():
    """Run all queued jobs and those that they enqueue, one by one. Wait for no countdown and no limit."""
    queued = Job.objects.filter(state="queued").order_by("created_at")
    # (id, retries): a job that the broker refuses stays queued, so publish it only once
    ran = set()
    while True:
        batches.end_all()  # as the sweeper does
        tries = set(queued.values_list("pk", "retries")) - ran
        if not tries:
            return
        ran |= tries
        run(queued.filter(pk__in=[pk for pk, _ in tries]))
