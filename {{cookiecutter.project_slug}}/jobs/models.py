"""The Job model. The row is the job, and each change of its state is one UPDATE in this module."""

import json
import logging
import random
import re
import time
import uuid
from contextlib import suppress
from datetime import timedelta

from celery import current_app
from django.conf import settings
from django.db import IntegrityError, models, transaction
from django.db.models import Case, F, Max, Q, When
from django.db.models.functions import Coalesce, Least, Now
from kombu.utils.json import dumps

from .messages import is_connection_error, queue_of, send
from .updates import built_once

logger = logging.getLogger(__name__)

ACTIVE = ["queued", "running"]
FINAL = ["succeeded", "failed", "cancelled"]
STATES = [(state, state.title()) for state in ACTIVE + FINAL]
# In an UPDATE by ids, use these instead of state=…. With state=… and old statistics, PostgreSQL may
# choose the index `job_active` and read the whole backlog to find one row. Constraints keep these fields
# and the state consistent.
UNFINISHED = Q(finished_at=None)
QUEUED = Q(run_token=None) & UNFINISHED
OVER_TIME_LIMIT = "Over its time limit"
BATCH_SIZE = 500  # jobs per statement
MAX_LABEL = 255  # characters
STORED_FAILURES = 20  # of each job: the latest ones
# In JSON: NUL, and half of a surrogate pair. PostgreSQL stores neither.
UNSTORABLE = re.compile(r"\\u0000|\\ud[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..)\\ud[c-f]..")
MAX_COUNTDOWN = 10 * 365 * 86400  # seconds: a longer countdown is probably in milliseconds
PUBLISH_PAUSE = 10  # seconds without a try after the broker was unavailable, to keep requests fast
publish_again_at = {}  # queue: time.monotonic() of the next try


class Clock(Now):
    """The database's time when a row is written, even if the statement has waited for a lock.

    Now() is the time when the statement began. Use Now() in a WHERE clause, because it lets PostgreSQL
    use an index. Also use it if a slightly earlier time does no harm.

    On SQLite the value has Django's format, because SQLite compares times as text.
    """

    def as_postgresql(self, compiler, connection, **context):
        return self.as_sql(compiler, connection, template="CLOCK_TIMESTAMP()", **context)

    def as_sqlite(self, compiler, connection, **context):
        text = "STRFTIME('%%%%Y-%%%%m-%%%%d %%%%H:%%%%M:%%%%f000', 'NOW')"
        return self.as_sql(compiler, connection, template=text, **context)


class LockTimeout(models.Func):
    """A condition that is always true. With it, an UPDATE waits a second for a locked row, then fails.

    It needs no extra query. The timeout applies until the transaction ends, so do not use it in a
    transaction of a body.
    """

    output_field = models.BooleanField()
    template = "SET_CONFIG('lock_timeout', '1s', TRUE) IS NOT NULL"

    def as_sqlite(self, compiler, connection, **context):
        return self.as_sql(compiler, connection, template="TRUE", **context)


class AsyncCommit(LockTimeout):
    """Always true, like LockTimeout. With it, the commit does not wait until the WAL is on disk."""

    template = "SET_CONFIG('synchronous_commit', 'off', TRUE) IS NOT NULL"


def lease_end():
    """Return the end of a lease that is renewed now, but no later than the deadline of its run."""
    return Least(Clock() + timedelta(seconds=settings.JOB_LEASE_SECONDS), F("deadline"))


def to_json(value):
    """Return the JSON of a value.

    As in Celery's messages, a datetime, a UUID or a Decimal becomes a dictionary that names its type,
    and the body gets the original value. Raises TypeError, ValueError or RecursionError if a value
    cannot be JSON, or has a character that PostgreSQL cannot store.
    """
    text = dumps(value, allow_nan=False)
    # Without the backslashes of the values, which JSON doubles.
    if r"\u" in text and (found := UNSTORABLE.search(text.replace(r"\\", " "))):
        raise ValueError(f"the database cannot store the character {found[0]}")
    return text


def as_json(args, kwargs):
    """Return `args` and `kwargs` as a row stores them, and their size in bytes. See to_json()."""
    text = to_json([args, kwargs])
    return *json.loads(text), len(text)


def size_error(size):
    """Return the error text for arguments of this size in bytes, or None if they are not too large."""
    limit = getattr(settings, "JOB_MAX_BYTES", 16_000_000)
    if size > limit:
        return f"The arguments have {size:,} bytes, but JOB_MAX_BYTES is {limit:,}: pass an id"


def cascade_ended(collector, field, jobs, using):
    """The on_delete of Job.owner: delete the jobs, too. Raises RestrictedError if some are active."""
    if active := jobs.filter(UNFINISHED)[:100]:  # the admin shows them
        raise models.RestrictedError("This user has active jobs: cancel them first", set(active))
    models.CASCADE(collector, field, jobs, using)


class JobQuerySet(models.QuerySet):
    def enqueue(
        self,
        task,
        args=(),
        kwargs=None,
        *,
        countdown=None,
        queue=None,
        unique=None,
        label="",
        **fields,
    ):
        """Store a job, and send its message when the caller's transaction commits.

        With a `countdown`, the sweep sends the message when the time has come.

        `task` has `base=JobTask`; `args` and `kwargs` hold values that Celery can serialize as JSON;
        `countdown` is in seconds; `queue` overrides CELERY_TASK_ROUTES. `unique` is a string that only
        one active job may have, across all tasks and owners. `label` is a name for people, which is cut
        after 255 characters. Other fields: `owner` (a user), `pk`, and for views `idempotency_key` (each
        owner can use a key once) and `fingerprint` (a digest of the request).

        Returns the new Job, or the queued or running one with the same `unique`. Raises TypeError if
        the task is not a JobTask, or if the arguments are not JSON or do not fit the task; ValueError
        if `unique` is empty or too long, if `countdown` is more than ten years, if the arguments exceed
        JOB_MAX_BYTES, or if a text has a NUL or half of a surrogate pair; IntegrityError if the owner
        has already used the key.
        """
        to_json([label, unique, fields.get("idempotency_key")])  # may raise ValueError
        fields |= self.prepare(Now(), task, args, kwargs, countdown, queue)
        fields["label"] = label[:MAX_LABEL]
        return self.store(fields, unique)

    def store(self, fields, unique):
        """Create the job, unless a job with this `unique` is active. See enqueue()."""
        if unique is None:
            job = self.create(**fields)
        else:
            job, is_new = self.get_or_create_active(unique, fields)
            if not is_new:
                return job
        if job.times_sent:
            transaction.on_commit(lambda: publish([job]), using=self.db, robust=True)
        return job

    def get_or_create_active(self, unique, fields):
        """Return the active job with this `unique`, or a new one, and whether it is new."""
        if not isinstance(unique, str) or not 0 < len(unique) <= 255:
            raise ValueError(f"unique= must be a string of 1 to 255 characters, not {unique!r:.50}")
        active = self.model.objects.filter(UNFINISHED)  # not self, which may be filtered
        for tries_left in reversed(range(21)):
            try:
                return active.get_or_create(fields, unique_key=unique)
            except IntegrityError as error:  # its first line names the constraint or the column
                if not tries_left or "unique_key" not in str(error).partition("\n")[0]:
                    raise
            # The conflicting job has finished before we could read it, so try again. Without a pause,
            # greenlets can conflict forever.
            time.sleep(random.uniform(0, 0.01))

    def enqueue_many(self, task, calls, *, countdown=None, queue=None, owner=None, label=""):
        """Store a job for each list of arguments in `calls`: all of them or none.

        The guarantees are those of enqueue(), at a fraction of the cost. Returns the Jobs.
        """
        to_json(label)  # may raise ValueError
        now = self.now()
        calls = [self.prepare(now, task, args, None, countdown, queue) for args in calls]
        return self.create_all(
            now, [Job(owner=owner, label=label[:MAX_LABEL], **fields) for fields in calls]
        )

    def run_again(self):
        """Enqueue a copy of each of these jobs. Skip those that are active or can no longer run.

        All copies are stored, or none. Returns them, each once. If a job with the same `unique` is
        active, the list has that one instead: see Job.run_again().
        """
        with transaction.atomic(self.db):
            now, again, new = self.now(), [], []
            for job in dict.fromkeys(self.defer("result", "error")):  # a join may repeat a job
                with suppress(TypeError, ValueError):
                    if job.unique_key:
                        again.append(job.run_again())
                    else:
                        new.append(Job(**job.fields_to_run_again(now)))
            return [*dict.fromkeys(again), *self.create_all(now, new)]

    def now(self):
        """Return the database's time as a value: PostgreSQL inserts values much faster than expressions."""
        # No row has this new id, so Max() is NULL and the query returns Now().
        latest = Coalesce(Max("created_at"), Now())
        return Job.objects.using(self.db).filter(pk=uuid.uuid4()).aggregate(now=latest)["now"]

    def create_all(self, now, jobs):
        for place, job in enumerate(jobs):
            job.created_at = now + timedelta(microseconds=place)  # pages sort by this time
        self.bulk_create(jobs, batch_size=BATCH_SIZE)
        for queue in sorted({job.queue for job in jobs}):
            to_send = [job for job in jobs if job.times_sent and job.queue == queue]
            for start in range(0, len(to_send), BATCH_SIZE):
                part = to_send[start : start + BATCH_SIZE]
                transaction.on_commit(lambda part=part: publish(part), using=self.db, robust=True)
        return jobs

    def prepare(self, now, task, args, kwargs, countdown, queue):
        """Return the fields of a new job. Raises the TypeError and ValueError of enqueue()."""
        if not getattr(task, "is_job", False):
            raise TypeError(f"{task!r} is not a job: declare it with @shared_task(base=JobTask)")
        try:
            args, kwargs, size = as_json(args, kwargs or {})
        except (RecursionError, ValueError) as error:
            raise TypeError(f"The arguments cannot be stored as JSON: {error}") from error
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise TypeError("args must be a list, such as [10], and kwargs a dictionary")
        if error := size_error(size):
            raise ValueError(error)
        if countdown and countdown > MAX_COUNTDOWN:
            raise ValueError(f"countdown={countdown} is longer than ten years: it is in seconds")
        task.__header__(*args, **kwargs)
        queue = queue or queue_of(task, args, kwargs)
        fields = {"task": task.name, "args": args, "kwargs": kwargs, "queue": queue}
        due_at = now + timedelta(seconds=countdown or 0)
        sweep_at = due_at if countdown else now + timedelta(seconds=settings.JOB_RESEND_SECONDS)
        return {
            **fields,
            "times_sent": 0 if countdown else 1,
            "due_at": due_at,
            "sweep_at": sweep_at,
        }

    def requeue(self, delay=0, failure=None, **changes):
        """Queue these jobs (again). The sweep sends their messages in `delay` seconds."""
        due = Now() + timedelta(seconds=delay)
        # A job that is already queued keeps its due_at.
        changes["due_at"] = Case(When(state="queued", then="due_at"), default=due)
        changes |= {"state": "queued", "run_token": None, "times_sent": 0, "sweep_at": due}
        return self.change(failure, changes)

    def finish(self, state, failure=None, **changes):
        """Write a final state, unless the job already has one. Returns how many rows were changed."""
        changes |= {"state": state, "run_token": None, "sweep_at": None, "finished_at": Now()}
        return self.filter(UNFINISHED).change(failure, changes)

    def change(self, failure, changes):
        """Update these rows. Returns how many. `failure` has the fields of a Failure to store, or is None.

        A Failure belongs to one job, so with `failure` there must be only one row.
        """
        if failure is None:
            return self.update(**changes)
        with transaction.atomic():
            job = self.only("started_at", "worker").first()
            changed = self.update(**changes)
            if job and changed:
                failure = failure | {"error": failure["error"][:1000]}
                job.failures.create(started_at=job.started_at, worker=job.worker, **failure)
                old = job.failures.order_by("-pk")[STORED_FAILURES:]
                Failure.objects.filter(pk__in=old.values("pk")).delete()
        return changed

    def skip_locked(self):
        """Lock these rows, except those that another transaction has locked, and return them."""
        keys = self.select_for_update(skip_locked=True).values_list("pk", flat=True)
        return self.model.objects.filter(pk__in=list(keys))

    def cancel(self):
        """Cancel those jobs that are active. Returns how many there were."""
        # With a join, Django moves all conditions into a subquery, which PostgreSQL does not check again
        # when it has waited for a lock. Then check outside of it that the job has not ended.
        by_id = self.model.objects.filter(pk__in=self.values("pk"))
        return (by_id if self.query.count_active_tables() > 1 else self).finish("cancelled")


class JobManager(models.Manager.from_queryset(JobQuerySet)):
    # A router may send reads to a replica, which lags behind. check_database() refuses other databases.
    db = property(lambda self: self._db or "default")

    def get_queryset(self):
        return super().get_queryset().using(self.db)

    @built_once
    def claim(self, id, run_token, worker, retries, crashes, times_sent, limit, lease):
        """Give a queued job to the run with this token. Returns how many rows were changed.

        This is 0 if the job is no longer queued, or if it has crashed or was retried since the message
        was sent. `limit` is the time until the deadline, and `lease` the length of the first lease.
        `retries`, `crashes` and `times_sent` come from the message; `times_sent` says which message of the job this
        is, 1 for the first. If PostgreSQL crashes within a second, the claim may be lost: then the run
        must claim the job again.
        """
        # Q(run_token=run_token): this UPDATE was sent before and committed, but its answer was lost.
        claimable = Q(run_token=None) | Q(run_token=run_token)
        is_current = Q(retries=retries, crashes=crashes)
        rows = self.filter(claimable, UNFINISHED, is_current, LockTimeout(), AsyncCommit(), pk=id)
        return rows, {
            "state": "running",
            "run_token": run_token,
            "worker": worker,
            "times_sent": times_sent,
            "progress": Case(When(cursor__isnull=False, then="progress"), default=0),
            "message": "",
            "started_at": Clock(),
            "deadline": Clock() + limit,
            "sweep_at": Clock() + lease,
        }

    @built_once
    def succeed(self, id, run_token, result, message):
        """Write the result of a run, if it still owns the job."""
        final = {"state": "succeeded", "run_token": None, "sweep_at": None, "finished_at": Now()}
        rows = self.filter(UNFINISHED, LockTimeout(), pk=id, run_token=run_token)
        return rows, {**final, "progress": 100, "result": result, "message": message}


class Job(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, cascade_ended, null=True, db_index=False)
    task = models.CharField(max_length=255)
    args = models.JSONField(default=list)
    kwargs = models.JSONField(default=dict)
    queue = models.CharField(max_length=255)
    idempotency_key = models.CharField(max_length=255, null=True)  # noqa: DJ001
    fingerprint = models.CharField(max_length=64)
    unique_key = models.CharField(max_length=255, null=True)  # noqa: DJ001
    label = models.CharField(
        max_length=MAX_LABEL, default="", db_default="", help_text="its name, for people"
    )

    state = models.CharField(max_length=9, choices=STATES, default="queued")
    progress = models.PositiveSmallIntegerField(default=0, help_text="percent")
    message = models.CharField(max_length=255)
    cursor = models.JSONField(null=True, help_text="where the next run continues")
    result = models.JSONField(null=True)
    error = models.TextField()
    public_error = models.TextField(
        default="", db_default="", help_text="why it failed, for its owner"
    )
    created_at = models.DateTimeField(db_default=Clock())
    started_at = models.DateTimeField(null=True, help_text="of the last run")
    finished_at = models.DateTimeField(null=True)

    run_token = models.UUIDField(null=True, help_text="token of the run that owns this job")
    worker = models.CharField(max_length=255, default="", help_text="of the last run")
    due_at = models.DateTimeField(null=True, help_text="when a worker may start it")
    # Of a running job: the end of its lease. Of a queued job: when its message is sent (again).
    sweep_at = models.DateTimeField(null=True, help_text="when the sweep must look at it")
    deadline = models.DateTimeField(null=True, help_text="when the run is over its time limit")
    times_sent = models.PositiveSmallIntegerField(default=0, help_text="messages since it was queued")
    retries = models.PositiveIntegerField(default=0)
    crashes = models.PositiveSmallIntegerField(default=0, help_text="times its worker died")

    objects = JobManager()

    class Meta:
        base_manager_name = "objects"  # for refresh_from_db(), and for foreign keys to a job
        indexes = [
            models.Index(fields=["-created_at"], name="job_created"),
            models.Index(fields=["owner", "-created_at"], name="job_owner"),
            models.Index(fields=["owner", "state", "-created_at"], name="job_owner_state"),
            models.Index(fields=["finished_at"], name="job_finished", condition=~UNFINISHED),
            models.Index(
                fields=[
                    "state",
                    "queue",
                    "times_sent",
                    "sweep_at",
                    "due_at",
                ],  # due_at for the metrics
                name="job_active",
                condition=Q(state__in=ACTIVE),
            ),
        ]
        constraints = [
            models.UniqueConstraint(fields=["owner", "idempotency_key"], name="job_key"),
            models.UniqueConstraint(
                fields=["idempotency_key"], name="job_key_unowned", condition=Q(owner=None)
            ),
            models.UniqueConstraint(
                fields=["unique_key"],
                name="job_unique_key",
                # The second condition keeps PostgreSQL from using this index for UNFINISHED alone.
                condition=UNFINISHED & Q(unique_key__isnull=False),
            ),
            models.CheckConstraint(
                name="job_running", condition=Q(state="running") ^ Q(run_token=None)
            ),
            models.CheckConstraint(
                name="job_active_or_finished",
                condition=Q(state__in=ACTIVE, sweep_at__isnull=False, finished_at=None)
                | Q(state__in=FINAL, sweep_at=None, finished_at__isnull=False),
            ),
        ]

    def __str__(self):
        return f"{self.task} {self.id}"

    def save(self, *args, update_fields=None, **options):
        """Store a new job or, of a stored one, the fields that `update_fields` names."""
        if not self._state.adding and update_fields is None:
            raise TypeError("save() would overwrite newer values: use save(update_fields=[...])")
        super().save(*args, update_fields=update_fields, **options)

    def run_again(self):
        """Enqueue a new job like this one, which has ended. Unless it succeeded, copy its cursor.

        Returns the new Job, or the active one with the same `unique`. Raises ValueError if this job
        is active or its task no longer exists; TypeError if its task takes other arguments now.
        """
        return Job.objects.store(self.fields_to_run_again(Now()), self.unique_key)

    def fields_to_run_again(self, now):
        """Return the fields of a new job like this one. Raises the same errors as run_again()."""
        if self.state in ACTIVE:
            raise ValueError("it has not ended yet")
        if self.task not in current_app.tasks:
            raise ValueError(f"there is no task {self.task}")
        task = current_app.tasks[self.task]
        fields = Job.objects.prepare(now, task, self.args, self.kwargs, None, self.queue)
        fields["cursor"] = None if self.state == "succeeded" else self.cursor
        return {**fields, "owner_id": self.owner_id, "label": self.label}


class Failure(models.Model):
    """A run that failed, was retried, or lost its worker."""

    job = models.ForeignKey(Job, models.CASCADE, related_name="failures")
    worker = models.CharField(max_length=255)
    started_at = models.DateTimeField()
    ended_at = models.DateTimeField(db_default=Clock())
    error = models.TextField()
    exception = models.CharField(max_length=255, help_text="its class")
    traceback = models.TextField()

    class Meta:
        default_permissions = ()  # the permissions for the job apply
        ordering = ["pk"]

    def __str__(self):
        return self.error


class Sweep(models.Model):  # noqa: DJ008
    """One row: when the last round of the sweep ended, when Beat's next tick is due, Beat's errors."""

    ended_at = models.DateTimeField()
    tick_due_at = models.DateTimeField(null=True)
    schedule_errors = models.PositiveBigIntegerField(
        default=0, db_default=0, help_text="how many Beat has logged"
    )


def publish(jobs):
    """Send the messages of these jobs of one queue. If that fails, the sweep sends them later."""
    queue = jobs[0].queue
    if time.monotonic() >= publish_again_at.get(queue, 0):
        try:
            send(jobs)
            return
        except Exception as error:  # each transport has its own exceptions
            if is_connection_error(error):
                publish_again_at[queue] = time.monotonic() + PUBLISH_PAUSE
            logger.warning("stored but not sent: %d jobs, first %s: %r", len(jobs), jobs[0], error)
    # All had times_sent=1. If one has times_sent=0 now, its message arrived in spite of the error, and a worker has
    # queued it again: skip it.
    Job.objects.filter(QUEUED, pk__in=[job.pk for job in jobs], times_sent__gt=0).requeue()
