"""The tables: jobs, batches of jobs, failed runs, workers, pauses, and what Beat has last done.

Models know no logic: modules such as enqueue.py, actions.py, batches.py and pauses.py import them.
"""

import uuid

from django.conf import settings
from django.db import models
from django.db.models import Q, UniqueConstraint
from django.utils import timezone

from durable_jobs.database import Clock
from durable_jobs.states import ACTIVE, ADMITTED, FINAL, HAS_SLOT, LEASED, UNFINISHED

__all__ = ["Batch", "Failure", "Job", "Pause"]

MAX_LABEL = 255  # characters
STATES = [(state, state.title()) for state in ACTIVE + FINAL]
BATCH_STATES = [(state, state.title()) for state in ["open", *FINAL]]
KEYED = Q(idempotency_key__isnull=False)
# The second condition keeps PostgreSQL from using this index for UNFINISHED alone.
UNIQUE = UNFINISHED & Q(unique_key__isnull=False)
IN_BATCH = Q(batch__isnull=False)
IS_BLOCKED = Q(blocked_by__isnull=False)
NOT_QUEUED = Q(blocked_by=None, send_at=None)
OWNED = Q(NOT_QUEUED, LEASED, run_token__isnull=False)
NOT_OWNED = Q(lease_ends_at=None, run_token=None)


class PrimaryManager(models.Manager):
    """Reads from the database that it writes to: a router may send reads to a replica, which lags behind.

    A check refuses other databases than "default".
    """

    db = property(lambda self: self._db or "default")

    def get_queryset(self):
        return super().get_queryset().using(self.db)


def cascade_ended(collector, field, jobs, using):
    """The on_delete of Job.owner and Job.batch: delete the jobs, too. Raises RestrictedError if some are active."""
    if active := jobs.filter(UNFINISHED)[:100]:  # the admin shows them
        text = f"This {field.name.replace('owner', 'user')} has active jobs: cancel them first"
        raise models.RestrictedError(text, set(active))
    models.CASCADE(collector, field, jobs, using)


class Row(models.Model):
    objects = PrimaryManager()

    class Meta:
        abstract = True
        default_permissions = ()  # the permissions for jobs apply

    def save(self, *args, update_fields=None, **options):
        """Store a new row or, of a stored one, the fields that `update_fields` names."""
        if not self._state.adding and update_fields is None:
            raise TypeError("save() would overwrite newer values: use save(update_fields=[...])")
        super().save(*args, update_fields=update_fields, **options)


def user(on_delete):
    # "+", because a project's own Job may have an owner, too
    options = {"null": True, "db_index": False, "related_name": "+"}
    return models.ForeignKey(settings.AUTH_USER_MODEL, on_delete, **options)


def index(name, fields, condition=None):
    return models.Index(name=f"durable_jobs_{name}", fields=fields.split(), condition=condition)


class Batch(Row):
    """Jobs that belong together, and the callbacks that start after them: see batches.py."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = user(models.CASCADE)
    label = models.CharField(max_length=MAX_LABEL, help_text="human-readable name")
    on_success = models.JSONField(null=True, help_text="the callback once all jobs have succeeded")
    on_finish = models.JSONField(null=True, help_text="the callback once all jobs have ended")
    state = models.CharField(max_length=9, choices=BATCH_STATES, default="open")
    error = models.TextField(help_text="why `on_success` has not started")
    counts = models.JSONField(default=dict, help_text="how many jobs ended in each state")
    created_at = models.DateTimeField(db_default=Clock())
    ended_at = models.DateTimeField(null=True)

    class Meta(Row.Meta):
        base_manager_name = "objects"
        indexes = [
            index("batch_owner", "owner -created_at"),
            index("batch_created", "-created_at"),
            index("batch_ended", "ended_at"),
        ]
        verbose_name_plural = "batches"

    def __str__(self):
        return self.label or f"Batch {self.id}"


class Job(Row):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = user(cascade_ended)
    task = models.CharField(max_length=255)
    args = models.JSONField(default=list)
    kwargs = models.JSONField(default=dict)
    queue = models.CharField(max_length=255)
    idempotency_key = models.CharField(max_length=255, null=True)  # noqa: DJ001
    fingerprint = models.CharField(max_length=64)  # of the API's request: see api/views.py
    unique_key = models.CharField(max_length=255, null=True)  # noqa: DJ001
    unique_until_start = models.BooleanField(default=False)  # then a claim clears unique_key
    label = models.CharField(max_length=MAX_LABEL, help_text="human-readable name")

    state = models.CharField(max_length=9, choices=STATES, default="queued")
    progress = models.PositiveSmallIntegerField(default=0, help_text="percent")
    message = models.CharField(max_length=255)
    cursor = models.JSONField(null=True, help_text="where the next run continues")
    steps = models.JSONField(default=dict, help_text="what its steps have returned, by name")
    result = models.JSONField(null=True)
    error = models.TextField()
    public_error = models.TextField(help_text="why it failed, for its owner")
    created_at = models.DateTimeField(db_default=Clock())
    started_at = models.DateTimeField(null=True, help_text="of the last run")
    finished_at = models.DateTimeField(null=True)

    run_token = models.UUIDField(null=True, help_text="token of the run that owns this job")
    worker = models.CharField(max_length=255, help_text="of the last run")
    due_at = models.DateTimeField(null=True, help_text="when a worker may start it")
    # Only while it is queued and not blocked
    send_at = models.DateTimeField(null=True, help_text="when its message is sent (again)")
    # Only while its task function runs, even if it is cancelled: see transitions.renewed()
    lease_ends_at = models.DateTimeField(null=True, help_text="when its worker counts as dead")
    deadline = models.DateTimeField(null=True, help_text="when the run is over its time limit")
    is_late = models.BooleanField(default=False, help_text="whether the run is over its time limit")
    times_sent = models.PositiveSmallIntegerField(default=0, help_text="messages since queued")
    retries = models.PositiveIntegerField(default=0)
    crashes = models.PositiveSmallIntegerField(default=0, help_text="times its worker died")

    limit_key = models.CharField(max_length=255, null=True, help_text="of its limit")  # noqa: DJ001
    blocked_by = models.CharField(max_length=255, null=True, help_text="the key it waits for")  # noqa: DJ001

    batch = models.ForeignKey(Batch, cascade_ended, null=True, db_index=False, related_name="jobs")
    follows = models.UUIDField(null=True, help_text="the job or batch that it continues or repeats")
    results_of = models.UUIDField(null=True, help_text="the batch whose results are its argument")

    headers = models.JSONField(default=dict, help_text="of its messages, such as a trace")

    is_new = False  # whether enqueue() has just stored it

    class Meta:  # not Row.Meta: it has permissions
        base_manager_name = "objects"  # for refresh_from_db(), and for foreign keys to a job
        indexes = [
            index("job_created", "-created_at"),
            # Without members of batches: a list shows the batch, not its 100,000 jobs.
            index("job_owner_alone", "owner -created_at", Q(batch=None)),
            index("job_batch", "batch -created_at state", IN_BATCH),
            index("job_batch_active", "batch -created_at", IN_BATCH & UNFINISHED),
            index("job_follows", "follows", Q(follows__isnull=False)),
            index("job_owner_state", "owner state -created_at"),
            index("job_finished", "finished_at", ~UNFINISHED),
            # The last fields of these three are for the metrics.
            index("job_queued", "queue times_sent send_at due_at", ADMITTED),
            index("job_leased", "lease_ends_at state queue", LEASED),
            index("job_blocked", "blocked_by created_at due_at queue", IS_BLOCKED),
            index("job_slot", "limit_key", HAS_SLOT),
        ]
        constraints = [
            # Without the condition, each UPDATE of a job without a key would write to these indexes.
            UniqueConstraint(
                fields=["owner", "idempotency_key"], name="durable_jobs_job_key", condition=KEYED
            ),
            UniqueConstraint(
                fields=["idempotency_key"],
                name="durable_jobs_job_key_unowned",
                condition=KEYED & Q(owner=None),
            ),
            UniqueConstraint(
                fields=["task", "unique_key"], name="durable_jobs_job_unique_key", condition=UNIQUE
            ),
            # A queued job is blocked or sent, and a running one has a lease: otherwise it would be lost.
            models.CheckConstraint(
                name="durable_jobs_job_state",
                condition=Q(NOT_OWNED, state="queued", finished_at=None)
                & (Q(IS_BLOCKED, send_at=None) | Q(ADMITTED, blocked_by=None))
                | Q(OWNED, state="running", finished_at=None)
                | Q(OWNED, state="cancelled", finished_at__isnull=False)
                | Q(NOT_QUEUED, NOT_OWNED, state__in=FINAL, finished_at__isnull=False),
            ),
        ]

    def __str__(self):
        return f"{self.task} {self.id}"


class Failure(Row):
    """A run that failed, was retried, or lost its worker."""

    job = models.ForeignKey(Job, models.CASCADE, related_name="failures")
    worker = models.CharField(max_length=255)
    started_at = models.DateTimeField()
    ended_at = models.DateTimeField(db_default=Clock())
    error = models.TextField()
    exception = models.CharField(max_length=255, help_text="its class")
    traceback = models.TextField()

    class Meta(Row.Meta):
        ordering = ["pk"]

    def __str__(self):
        return self.error


class Sweep(Row):  # noqa: DJ008
    """One row: when the sweeper's last round ended, and when Beat's next tick is due."""

    ended_at = models.DateTimeField()
    tick_due_at = models.DateTimeField()
    refused = models.JSONField(help_text="why the broker takes no message, by queue")


class Worker(Row):
    """A worker that runs, or has run less than an hour ago: see worker/heartbeat.py."""

    name = models.CharField(max_length=255, primary_key=True)
    pool = models.CharField(max_length=255)
    slots = models.PositiveIntegerField(help_text="how many jobs it can run concurrently")
    busy = models.PositiveIntegerField(help_text="how many of them are taken")
    queues = models.JSONField(help_text="from which it takes jobs; none without the broker")
    version = models.CharField(max_length=255, help_text="of its code")
    started_at = models.DateTimeField()
    seen_at = models.DateTimeField(db_default=Clock())

    class Meta(Row.Meta):
        ordering = ["name"]

    def __str__(self):
        return self.name


class Key(Row):  # noqa: DJ008
    """The key of a limit, to lock it and for its rate: see admission.py."""

    key = models.CharField(max_length=255, primary_key=True)
    next_at = models.DateTimeField(db_default=Clock(), help_text="when its rate lets a job start")


class Pause(Row):
    """A queue or a task of which no job starts: see pauses.py."""

    name = models.CharField(max_length=255, primary_key=True, help_text="of a queue or a task")
    reason = models.CharField(max_length=255, blank=True)
    since = models.DateTimeField(db_default=Clock())

    class Meta(Row.Meta):
        ordering = ["name"]
        verbose_name_plural = "queues"  # the page in the admin shows both

    def __str__(self):
        since = timezone.localtime(self.since)
        day = "" if since.date() == timezone.localdate() else f"{since:%Y-%m-%d} "
        return f"Paused since {day}{since:%H:%M}" + (f": {self.reason}" if self.reason else "")
