"""Jobs whose task this worker does not know: another worker may know it, as in a deploy."""

from datetime import timedelta

from django.db.models import F
from django.db.models.functions import Now

from durable_jobs import transitions
from durable_jobs.admission import admit, postpone
from durable_jobs.database import in_thread
from durable_jobs.models import Job
from durable_jobs.states import QUEUED
from durable_jobs.worker.lease import RECOVERY_DELAY


def requeue_unknown(id, message, **kwargs):
    """If an unknown task is that of a job, requeue the job: another worker may know the task."""
    if "job" in (message.headers or {}):
        in_thread(requeue_later, Job.objects.filter(QUEUED, pk=id))


def requeue_later(row):
    """Requeue a job whose task is unknown, after a pause that grows with the time it has waited.

    With a short pause, jobs whose task was removed from the code would keep Beat and the broker busy. A job
    with a limit is blocked again: it must not keep its slot meanwhile.
    """
    if keys := list(row.filter(limit_key__isnull=False).values_list("limit_key", flat=True)):
        postpone(row)
        admit(keys)
        return
    waited = row.values_list(Now() - F("due_at"), flat=True).first() or timedelta()
    transitions.requeue(row, max(RECOVERY_DELAY, waited.total_seconds() / 10))
