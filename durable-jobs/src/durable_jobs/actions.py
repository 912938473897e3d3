"""What can be done with stored jobs: cancel them, run them again."""

from contextlib import suppress
from operator import attrgetter

from celery.utils.functional import chunks
from django.db import IntegrityError, transaction
from django.db.models import QuerySet

from durable_jobs import admission, hooks, transitions
from durable_jobs.compiler import CHUNK
from durable_jobs.database import Now
from durable_jobs.enqueue import active_with, call_fields, insert, send_after_commit, times
from durable_jobs.messages import arguments_of, find_task, new_headers
from durable_jobs.models import Job
from durable_jobs.states import UNFINISHED

__all__ = ["cancel", "run_again"]


def cancel(jobs: QuerySet | Job) -> int:
    """Cancel this job, or those of these jobs that are active. Returns how many there were."""
    if isinstance(jobs, Job):
        jobs = Job.objects.filter(pk=jobs.pk)
    cancelled = 0
    with transaction.atomic():
        # Lock the rows in one order, and change only these: otherwise two calls for the same jobs could deadlock.
        rows = Job.objects.filter(UNFINISHED, pk__in=jobs.values("pk")).order_by("created_at", "pk")
        columns = rows.select_for_update().values_list("pk", "limit_key", "state")
        locked = {pk: (limit_key, state) for pk, limit_key, state in columns}
        # Without those that changed while this waited, so that they are no longer meant.
        pks = locked.keys() & set(jobs.values_list("pk", flat=True))
        for part in chunks(iter(pks), CHUNK):
            cancelled += transitions.cancel(Job.objects.filter(pk__in=part))
            # The end of a running one says so itself: see Run.ignored().
            hooks.revoked_after_commit([pk for pk in part if locked[pk][1] == "queued"])
        admission.admit_after_commit({locked[pk][0] for pk in pks} - {None})
    return cancelled


def run_again(job: Job) -> Job:
    """Queue this job again, if it failed or was cancelled. If it succeeded, enqueue a copy.

    A job that is queued again keeps its id, its failures, its cursor, its steps and its batch. It may be retried as often
    as a new job. Its batch opens again. A copy has none of these, and `follows` is the id of this job or, if
    it gets the results of a batch, that of the batch.

    Returns this Job, its copy, or the active job with the same `unique`: then nothing is changed. Raises
    ValueError if this job is active, its task no longer exists, or its batch ended more than RETENTION_DAYS
    ago; TypeError if its task takes other arguments now.
    """
    fields = fields_to_run_again(job)
    limit_key = fields["limit_key"]
    if job.state == "succeeded":
        return insert({**fields, **times(limit_key=limit_key)}, unique=job.unique_key)
    changes = {"limit_key": limit_key, **times(Now(), limit_key=limit_key)}
    # Another job with this `unique` may be stored meanwhile, and may end before this looks again: see insert().
    while (active := active_with(job)) is None:
        try:
            with transaction.atomic():
                is_open = job.batch_id is None or transitions.open_again(job.batch_id)
                changes["headers"] = new_headers(job)
                row = Job.objects.filter(pk=job.pk)
                if not (is_open and transitions.run_again(row, **changes)):
                    raise ValueError("it was run again meanwhile, or its batch is too old")
                job.refresh_from_db()
                send_after_commit([job])
                return job
        except IntegrityError as error:
            if "unique_key" not in str(error):  # both databases name it
                raise
    return active


def run_all_again(jobs: QuerySet) -> list[Job]:
    """Run these jobs again, one by one. Skip those that are active or can no longer run.

    Returns the jobs that are queued now, each once: see run_again().
    """
    again = []
    # The oldest first, as cancel() does: both may run in transactions of their callers.
    for job in sorted(jobs.defer("result", "error"), key=attrgetter("created_at", "pk")):
        with suppress(TypeError, ValueError):
            again.append(run_again(job))
    return list(dict.fromkeys(again))


def fields_to_run_again(job):
    """Return the fields of a copy of this job. Raises the same errors as run_again()."""
    if job.finished_at is None:
        raise ValueError("it has not ended yet")
    if job.lease_ends_at:
        raise ValueError("it was cancelled but is still running: try again when it has ended")
    if (task := find_task(job.task)) is None:
        raise ValueError(f"there is no task {job.task}")
    args, kwargs = arguments_of(job)
    options = {"label": job.label, "queue": job.queue, "results_of": job.results_of}
    fields = call_fields(task, args, kwargs, **options)
    # It follows the batch whose results it gets, because the purge keeps these for what follows the batch.
    return {**fields, "owner_id": job.owner_id, "follows": job.results_of or job.pk}
