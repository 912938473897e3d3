"""What can be done with stored jobs: cancel them, start them now, run them again.

`jobs` is a queryset of Jobs, or one Job.
"""

from collections import defaultdict
from contextlib import suppress

from celery import current_app
from celery.utils.functional import chunks
from django.db import transaction
from django.db.models import Q, QuerySet
from kombu.utils.json import loads

from durable_jobs import admission, tracing, transitions
from durable_jobs.enqueue import (
    BATCH_SIZE,
    FROM_NOW,
    create_unless_active,
    database_time,
    insert,
    insert_many,
    new_fields,
    send_after_commit,
    times,
)
from durable_jobs.messages import MESSAGE_FIELDS
from durable_jobs.models import Job
from durable_jobs.states import QUEUED
from durable_jobs.validation import Results, to_json

__all__ = ["cancel", "run_again", "start_now"]


def cancel(jobs: QuerySet | Job) -> int:
    """Cancel those jobs that are active. Returns how many there were."""
    if isinstance(jobs, Job):
        jobs = Job.objects.filter(pk=jobs.pk)
    # With a join, Django moves all conditions into a subquery, which PostgreSQL does not check again
    # when it has waited for a lock. Then check outside of it that the job has not ended.
    elif jobs.query.count_active_tables() > 1:
        jobs = Job.objects.filter(pk__in=jobs.values("pk"))
    keys = admission.keys_of_queued(jobs)
    cancelled = transitions.cancel(jobs)
    admission.admit_after_commit(keys)
    return cancelled


def start_now(jobs: QuerySet) -> int:
    """End the countdown, or the pause before a retry, of those jobs that are queued.

    Returns how many there were. Their messages are sent after the commit. A blocked job is due then, but
    still waits for its limit.
    """
    started = []
    with transaction.atomic(Job.objects.db):
        now = database_time()
        early = QUEUED & Q(due_at__gt=now)
        found = list(jobs.filter(early).values_list("pk", flat=True))
        for ids in chunks(iter(found), BATCH_SIZE):
            rows = Job.objects.filter(early, pk__in=ids).order_by("pk").select_for_update()
            locked = list(rows.only(*MESSAGE_FIELDS, "blocked_by"))
            for job in locked:
                job.times_sent = 0 if job.blocked_by else 1
            rows = Job.objects.filter(pk__in=[job.pk for job in locked])
            rows.filter(blocked_by=None).update(**times(now))
            rows.update(due_at=now)
            started += locked
        send_after_commit(started)
    return len(started)


def run_again(job: Job) -> Job:
    """Queue this job again, if it failed or was cancelled. If it succeeded, enqueue a copy.

    A job that is queued again keeps its id, its failures, its cursor and its batch. It may be retried as often
    as a new job. Its batch opens again. A copy has none of these, and `follows` is the id of this job.

    Returns this Job, its copy, or the active job with the same `unique`: then nothing is changed. Raises
    ValueError if this job is active, its task no longer exists, or its batch ended more than RETENTION_DAYS
    ago; TypeError if its task takes other arguments now.
    """
    if job.state == "succeeded":
        return insert(fields_to_run_again(job), job.unique_key)
    now = database_time()
    fields = fields_to_run_again(job, now)
    job.limit_key = fields["limit_key"]

    @transaction.atomic(Job.objects.db)
    def queue():
        if not queue_again([job], now):
            raise ValueError(
                "it was run again meanwhile, or its batch is so old that it is being deleted"
            )
        return job

    return create_unless_active(job.unique_key, queue)


def run_all_again(jobs: QuerySet) -> list[Job]:
    """Run these jobs again, all in one transaction. Skip those that are active or can no longer run.

    Returns the jobs that are queued now, each once: see run_again().
    """
    keyed, copies, failed = [], [], []
    with transaction.atomic(Job.objects.db):
        now = database_time()
        for job in dict.fromkeys(jobs.defer("result", "error")):  # a join may repeat a job
            with suppress(TypeError, ValueError):
                if job.unique_key:
                    keyed.append(run_again(job))
                    continue
                fields = fields_to_run_again(job, now)
                if job.state == "succeeded":
                    copies.append(Job(**fields))
                else:
                    job.limit_key = fields["limit_key"]
                    failed.append(job)
        queued = queue_again(failed, now)
        return [*dict.fromkeys(keyed), *queued, *insert_many(now, copies)]


def fields_to_run_again(job, now=FROM_NOW):
    """Return the fields of a copy of this job. Raises the same errors as run_again()."""
    if job.finished_at is None:
        raise ValueError("it has not ended yet")
    if job.sweep_at:
        raise ValueError("it is cancelled, but it still runs: try again when it has ended")
    if job.task not in current_app.tasks:
        raise ValueError(f"there is no task {job.task}")
    task, (args, kwargs) = current_app.tasks[job.task], loads(to_json([job.args, job.kwargs]))
    given = [Results()] if job.results_of else []
    fields = new_fields(now, task, [*given, *args], kwargs, label=job.label, queue=job.queue)
    fields["args"] = fields["args"][len(given) :]
    del fields["owner"]  # not loaded: its id is enough
    return {**fields, "owner_id": job.owner_id, "follows": job.pk, "results_of": job.results_of}


def queue_again(jobs, now):
    """Queue these jobs in their own rows, in the caller's transaction. Returns those that are queued now."""
    opened = {None, *transitions.open_again({job.batch_id for job in jobs} - {None})}
    found, queued = {job.pk: job for job in jobs if job.batch_id in opened}, []
    for ids in chunks(iter(found), BATCH_SIZE):
        # Another process may have run some of them again since they were read.
        rows = Job.objects.filter(transitions.CAN_RUN_AGAIN, pk__in=ids).order_by("pk")
        locked = set(rows.select_for_update().values_list("pk", flat=True))
        jobs, by_key = [found[pk] for pk in ids if pk in locked], defaultdict(list)
        for job in jobs:
            by_key[job.limit_key].append(job)
        for key, some in by_key.items():
            rows = Job.objects.filter(pk__in=[job.pk for job in some])
            fields = times(now, limit_key=key) | tracing.current(some[0].task)
            changes = transitions.run_again(rows, limit_key=key, **fields)
            for job in some:
                for name, value in changes.items():
                    setattr(job, name, value)
                if job.cursor is None:
                    job.progress = 0
        queued += jobs
    send_after_commit(queued)
    return queued
