"""Job.objects: how jobs are enqueued, and what can be done with many jobs."""

import random
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from celery import current_app
from celery.utils.functional import chunks
from celery.utils.time import maybe_make_aware
from django.apps import apps
from django.db import IntegrityError, models, transaction
from django.db.models import Max, Q
from django.db.models.functions import Coalesce, Now
from django.utils import timezone
from kombu.utils.json import loads

from . import conf, limits, tracing, turns, updates
from .expressions import QUEUED, UNFINISHED
from .messages import MESSAGE_FIELDS, queue_of
from .publish import publish
from .values import as_json, size_error, to_json

if TYPE_CHECKING:
    from .models import Job

__all__ = ["JobManager", "JobQuerySet"]

BATCH_SIZE = 500  # jobs per statement
# A call sends as many messages itself. Workers are busy with them until the sweep sends the rest.
SENT_AT_ONCE = 2000
FROM_NOW = timedelta()  # as the time of a new job: its INSERT adds the database's
MAX_LABEL = 255  # characters
MAX_COUNTDOWN = 10 * 365 * 86400  # seconds: a longer countdown is probably in milliseconds


class JobQuerySet(models.QuerySet):
    def cancel(self) -> int:
        """Cancel those jobs that are active. Returns how many there were."""
        # With a join, Django moves all conditions into a subquery, which PostgreSQL does not check again
        # when it has waited for a lock. Then check outside of it that the job has not ended.
        by_id = self.model.objects.filter(pk__in=self.values("pk"))
        jobs = by_id if self.query.count_active_tables() > 1 else self
        keys = turns.keys_of_queued(jobs)
        cancelled = updates.cancel(jobs)
        turns.grant_after_commit(keys, using=self.db)
        return cancelled

    def start_now(self) -> int:
        """End the countdown, or the pause before a retry, of those jobs that are queued.

        Returns how many there were. Their messages are sent after the commit. A held job is due then, but
        still waits for its turn.
        """
        manager, started = self.model.objects, []
        with transaction.atomic(self.db):
            now = database_time(manager)
            early = QUEUED & Q(due_at__gt=now)
            found = list(self.filter(early).values_list("pk", flat=True))
            for ids in chunks(iter(found), BATCH_SIZE):
                rows = manager.filter(early, pk__in=ids).order_by("pk").select_for_update()
                jobs = list(rows.only(*MESSAGE_FIELDS, "held_by"))
                for job in jobs:
                    job.times_sent = 0 if job.held_by else 1
                locked = manager.filter(pk__in=[job.pk for job in jobs])
                locked.filter(held_by=None).update(**times(now))
                locked.update(due_at=now)
                started += jobs
            send_after_commit(manager, started)
        return len(started)

    def run_again(self) -> list["Job"]:
        """Run these jobs again, all in one transaction. Skip those that are active or can no longer run.

        Returns the jobs that are queued now, each once: see Job.run_again().
        """
        manager, keyed, copies, failed = self.model.objects, [], [], []
        with transaction.atomic(self.db):
            now = database_time(manager)
            for job in dict.fromkeys(self.defer("result", "error")):  # a join may repeat a job
                with suppress(TypeError, ValueError):
                    if job.unique_key:
                        keyed.append(job.run_again())
                        continue
                    fields = fields_to_run_again(job, now)
                    if job.state == "succeeded":
                        copies.append(self.model(**fields))
                    else:
                        job.limit_key = fields["limit_key"]
                        failed.append(job)
            queued = queue_again(manager, failed, now)
            return [*dict.fromkeys(keyed), *queued, *insert_many(manager, now, copies)]


# Type checkers do not see the methods that Django copies from a queryset to its manager.
class JobManager(models.QuerySet if TYPE_CHECKING else models.Manager):
    # A router may send reads to a replica, which lags behind. check_database() refuses other databases.
    db = property(lambda self: self._db or "default")

    def get_queryset(self) -> JobQuerySet:
        return JobQuerySet(self.model, using=self.db, hints=self._hints)

    def all(self) -> JobQuerySet:
        return self.get_queryset()

    def filter(self, *args, **kwargs) -> JobQuerySet:
        return self.get_queryset().filter(*args, **kwargs)

    def exclude(self, *args, **kwargs) -> JobQuerySet:
        return self.get_queryset().exclude(*args, **kwargs)

    def get(self, *args, **kwargs) -> "Job":
        return self.get_queryset().get(*args, **kwargs)

    def enqueue(
        self,
        task: Any,
        args: list | tuple = (),
        kwargs: dict | None = None,
        *,
        owner: Any = None,
        label: str = "",
        queue: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        unique: str | None = None,
        idempotency_key: str | None = None,
    ) -> "Job":
        """Store a job, and send its message when the caller's transaction commits.

        `task` has `base=JobTask`; `args` and `kwargs` hold values that Celery can serialize as JSON.

        - `owner`: a user.
        - `label`: a name for people, which is cut after 255 characters.
        - `queue`: the name of a queue. It overrides CELERY_TASK_ROUTES.
        - `countdown`, `eta`: the sweep sends the message after these seconds, or at this time. As in
          Celery, a datetime without a time zone is in UTC.
        - `unique`: a text that only one active job may have, across all tasks and owners.
        - `idempotency_key`: a text that each owner can use once.

        Returns the new Job, or the queued or running one with the same `unique`. Raises TypeError if
        the task is not a JobTask, if the arguments are not JSON or do not fit the task, or if both
        `countdown` and `eta` are given; ValueError if `unique` is empty or too long, if the job would wait
        for more than ten years, if the arguments exceed DURABLE_JOBS['MAX_BYTES'], or if a text has a NUL or half of a
        surrogate pair; IntegrityError if the owner has already used the key.
        """
        times = {"countdown": countdown, "eta": eta}
        fields = new_fields(task, args, kwargs, owner_of(self, owner), label, queue, **times)
        return insert(self, {**fields, "idempotency_key": idempotency_key}, unique)

    aenqueue = sync_to_async(enqueue)

    def enqueue_many(
        self,
        task: Any,
        calls: Iterable[list | tuple],
        *,
        owner: Any = None,
        label: str = "",
        queue: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
    ) -> list["Job"]:
        """Store a job for each list of arguments in `calls`: all of them or none.

        The guarantees are those of enqueue(), at a fraction of the cost: if Beat's sweep runs, it sends all
        messages but the first SENT_AT_ONCE. Returns the Jobs.
        """
        now, owner = database_time(self), owner_of(self, owner)
        times = {"countdown": countdown, "eta": eta, "now": now}
        rows = [new_fields(task, args, None, owner, label, queue, **times) for args in calls]
        return insert_many(self, now, [self.model(**fields) for fields in rows])


def owner_of(manager, owner):
    """Return `owner`, or the user of user.job_set. Raises TypeError for batch.jobs and batch.children."""
    field = getattr(manager, "field", None)
    if field and field.name in ("batch", "parent"):  # the batch may have ended
        raise TypeError("call batch.enqueue(), not batch.jobs.enqueue()")
    return owner or (manager.instance if field and field.name == "owner" else None)


def check_text(name, text):
    """Raise ValueError if this option is neither None nor a text that fits into its column."""
    if text is not None:
        if not isinstance(text, str) or not 0 < len(text) <= 255:
            raise ValueError(f"{name}= must be a string of 1 to 255 characters, not {text!r:.50}")
        to_json(text)  # may raise ValueError


def new_fields(task, args, kwargs=None, owner=None, label="", queue=None, **when):
    """Return the fields of a new job. Raises the TypeError and ValueError of enqueue()."""
    fields = call_fields(task, args, kwargs, label, queue)
    return {**fields, "owner": owner, **times(**when, limit_key=fields["limit_key"])}


def call_fields(task, args, kwargs=None, label="", queue=None):
    """Return what a new job is to do. Raises the TypeError and ValueError of enqueue()."""
    if hasattr(task, "_for_call"):  # Django's @task has decorated it
        task, label, queue = task._for_call(label, queue)
    if not getattr(task, "_is_job", False):
        raise TypeError(f"{task!r} is not a job: declare it with @shared_task(base=JobTask)")
    given = args, kwargs or {}
    try:
        args, kwargs, size = as_json(*given)
    except (RecursionError, ValueError) as error:
        raise TypeError(f"The arguments cannot be stored as JSON: {error}") from error
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise TypeError("args must be a list, such as [10], and kwargs a dictionary")
    if error := size_error(size):
        raise ValueError(error)
    task.__header__(*args, **kwargs)
    to_json(label)  # may raise ValueError
    check_text("queue", queue or None)
    queue = queue or queue_of(task, args, kwargs)
    fields = {"task": task.name, "args": args, "kwargs": kwargs, "label": label[:MAX_LABEL]}
    return {**fields, "queue": queue, "limit_key": limits.key_of(task, *given)}


def times(now=FROM_NOW, countdown=None, eta=None, limit_key=None):
    """Return when a new job is due, and when the sweep sends its message, or that it is held."""
    if (delay := seconds_until(countdown, eta)) > MAX_COUNTDOWN:
        raise ValueError(f"countdown={delay:.0f} is longer than ten years: it is in seconds")
    due_at = now + timedelta(seconds=delay)
    if limit_key:
        return {"times_sent": 0, "due_at": due_at, "sweep_at": None, "held_by": limit_key}
    resend_at = now + timedelta(seconds=conf.RESEND_SECONDS)
    sweep_at = due_at if delay else resend_at
    return {"times_sent": 0 if delay else 1, "due_at": due_at, "sweep_at": sweep_at}


def seconds_until(countdown=None, eta=None):
    """Return in how many seconds a job is due, 0 if at once. Raises TypeError if both are given."""
    if eta is not None:
        if countdown is not None:
            raise TypeError("give countdown= or eta=, not both")
        countdown = (maybe_make_aware(eta) - timezone.now()).total_seconds()
    return max(countdown or 0, 0)


def fields_to_run_again(job, now):
    """Return the fields of a copy of this job. Raises the same errors as Job.run_again()."""
    if job.finished_at is None:
        raise ValueError("it has not ended yet")
    if job.sweep_at:
        raise ValueError("it is cancelled, but its body still runs: try again when it has ended")
    if job.task not in current_app.tasks:
        raise ValueError(f"there is no task {job.task}")
    task, calls = current_app.tasks[job.task], loads(to_json([job.args, job.kwargs]))
    fields = new_fields(task, *calls, label=job.label, queue=job.queue, now=now)
    del fields["owner"]  # not loaded: its id is enough
    return {**fields, "owner_id": job.owner_id, "follows": job.pk}


def run_again(job):
    """See Job.run_again()."""
    manager = type(job).objects
    now = database_time(manager)
    fields = fields_to_run_again(job, now)
    if job.state == "succeeded":
        return insert(manager, fields, job.unique_key)
    job.limit_key = fields["limit_key"]

    @transaction.atomic(manager.db)
    def queue():
        if not queue_again(manager, [job], now):
            raise ValueError(
                "it was run again meanwhile, or its batch is so old that it is being deleted"
            )
        return job

    return create_unless_active(manager, job.unique_key, queue)


def queue_again(manager, jobs, now):
    """Queue these jobs in their own rows, in the caller's transaction. Returns those that are queued now."""
    batches = manager.model._meta.get_field("batch").related_model.objects
    opened = {None, *updates.open_again(batches, {job.batch_id for job in jobs})}
    found, queued = {job.pk: job for job in jobs if job.batch_id in opened}, []
    for ids in chunks(iter(found), BATCH_SIZE):
        # Another process may have run some of them again since they were read.
        rows = manager.filter(updates.CAN_RUN_AGAIN, pk__in=ids).order_by("pk")
        locked = set(rows.select_for_update().values_list("pk", flat=True))
        jobs, by_key = [found[pk] for pk in ids if pk in locked], defaultdict(list)
        for job in jobs:
            by_key[job.limit_key].append(job)
        for key, some in by_key.items():
            rows = manager.filter(pk__in=[job.pk for job in some])
            fields = times(now, limit_key=key) | tracing.current(some[0].task)
            changes = updates.run_again(rows, limit_key=key, **fields)
            for job in some:
                for name, value in changes.items():
                    setattr(job, name, value)
                if job.cursor is None:
                    job.progress = 0
        queued += jobs
    send_after_commit(manager, queued)
    return queued


def insert(manager, fields, unique=None):
    """Create the job, unless a job with this `unique` is active. Returns that one then."""
    check_text("idempotency_key", fields.get("idempotency_key"))

    def create():
        request = tracing.current(fields["task"])
        job = manager.create(**fields, **request, unique_key=unique)
        send_after_commit(manager, [job])
        return job

    return create_unless_active(manager, unique, create)


def create_unless_active(manager, unique, create):
    """Return the active job with this `unique`, or else the one that create() returns."""
    if unique is None:
        return create()
    check_text("unique", unique)
    active = manager.model.objects.filter(UNFINISHED)  # not `manager`, which may be a user's jobs
    for tries_left in reversed(range(42)):
        with suppress(manager.model.DoesNotExist):
            return active.get(unique_key=unique)
        try:
            with transaction.atomic(manager.db):
                return create()
        except IntegrityError as error:  # its first line names the constraint or the column
            if not tries_left or "unique_key" not in str(error).partition("\n")[0]:
                raise
        # Read the conflicting job at once. If it has ended in between, try again. Without a pause, greenlets
        # can conflict forever.
        if tries_left % 2:
            time.sleep(random.uniform(0, 0.01))


def insert_many(manager, now, jobs, request=None):
    """Create these jobs. Returns them. `request` has the FIELDS of tracing.py; None means the current ones."""
    if jobs and request is None:
        request = tracing.current(jobs[0].task)
    for place, job in enumerate(jobs):
        job.created_at = now + timedelta(microseconds=place)  # pages sort by this time
        job.trace, job.request_id = request["trace"], request["request_id"]
    leave_to_sweep(manager, [job for job in jobs if job.times_sent][SENT_AT_ONCE:])
    manager.bulk_create(jobs, batch_size=BATCH_SIZE)
    send_after_commit(manager, jobs)
    return jobs


def leave_to_sweep(manager, jobs):
    """Let the sweep send the messages of these new jobs, if it runs: the call takes a fifth of the time."""
    if jobs:
        newest = Now() - timedelta(seconds=3 * conf.SWEEP_SECONDS)
        sweeps = apps.get_model("durable_jobs.Sweep").objects.using(manager.db)
        if sweeps.filter(ended_at__gt=newest).exists():
            for job in jobs:
                job.times_sent, job.sweep_at = 0, job.created_at  # which keeps their order


def send_after_commit(manager, jobs):
    for part in chunks((job for job in jobs if job.times_sent), BATCH_SIZE):
        transaction.on_commit(lambda part=part: publish(part), using=manager.db, robust=True)
    turns.grant_after_commit({job.held_by for job in jobs if job.held_by}, using=manager.db)


def database_time(manager):
    """SELECT now(), as a value: PostgreSQL inserts values much faster than expressions."""
    # No row has this new id, so Max() is NULL and the query returns Now().
    latest = Coalesce(Max("created_at"), Now())
    return manager.filter(pk=uuid.uuid4()).aggregate(now=latest)["now"]
