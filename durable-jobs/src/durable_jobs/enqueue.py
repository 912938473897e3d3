"""Signatures of jobs, and how jobs are stored.

    send_confirmation.using(owner=user, queue="io").enqueue(order.pk)
    enqueue_many([resize.s(1), resize.s(2, width=80)])

Their messages are sent after the commit: see publish.py.
"""

import uuid
from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    NoReturn,
    ParamSpec,
    TypedDict,
    Unpack,
    overload,
)

from asgiref.sync import sync_to_async
from celery.result import AsyncResult
from celery.utils.abstract import CallableSignature
from celery.utils.functional import chunks
from celery.utils.time import maybe_make_aware
from django.db import IntegrityError, transaction
from django.db.models import Max, Q
from django.db.models.functions import Coalesce
from django.dispatch import Signal

from durable_jobs import admission, conf, limits, messages, transitions
from durable_jobs.compiler import CHUNK
from durable_jobs.database import Now
from durable_jobs.messages import is_job, new_headers, queue_of, storable
from durable_jobs.models import MAX_LABEL, Job, Sweep
from durable_jobs.publish import publish
from durable_jobs.states import UNFINISHED
from durable_jobs.validation import MAX_COUNTDOWN, Results, as_json, to_json

__all__ = ["JobSignature", "Options", "enqueue_many"]

if TYPE_CHECKING:  # so that JobTask alone means one with any arguments
    from typing_extensions import ParamSpec as ParamSpecWithDefault

    P = ParamSpecWithDefault("P", default=...)
else:
    P = ParamSpec("P")
Rest = ParamSpec("Rest")

# A call sends at most this many messages itself. Workers are busy with them until the sweeper sends the rest.
SENT_IMMEDIATELY = 1000
MAX_INSERTS = 100
# Stands for the time of the database: DATABASE_NOW + delay is a timedelta, to which compiler.insert() adds its clock.
DATABASE_NOW = timedelta()
runs_here = Signal()  # with CELERY_TASK_ALWAYS_EAGER, these `jobs` run in this process: see apps.py
NO_CANVAS = (
    "A job can't be part of a chain, group or chord, nor a link of a task: use a batch with on_success= or"
    " on_finish=, or self.enqueue_next()"
)
EXPIRES = (
    'Pass the time as an argument. In CELERY_BEAT_SCHEDULE, "options": {"unique": "a name"} starts no job while'
    " the last one is active"
)
CANVAS_OPTIONS = {"link", "link_error", "chain", "chord", "group_id", "root_id"}
# Options of apply_async() that are supported or harmless.
HARMLESS_OPTIONS = ("queue", "headers", "ignore_result", "producer", "retries")


class Options(TypedDict, total=False):
    """The options of a job: see JobTask.using()."""

    owner: Any
    label: str
    queue: str | None
    headers: dict[str, Any] | None
    countdown: float | None
    eta: datetime | None
    unique: str | None
    unique_until: Literal["start", "end"]
    idempotency_key: str | None


# Options that enqueue_many() does not take, those that it does, and those of a job in a batch or after another one.
SINGLE_OPTIONS = {"unique", "unique_until", "idempotency_key"}
BULK_OPTIONS = Options.__optional_keys__ - SINGLE_OPTIONS
MEMBER_OPTIONS = BULK_OPTIONS - {"owner"}


class Enqueueable(Generic[P]):
    """What tasks and their signatures have in common. `P` are the parameters that have no argument yet."""

    @overload
    def s(self, *args: P.args, **kwargs: P.kwargs) -> "JobSignature[[]]": ...
    @overload  # a batch adds the first argument
    def s(
        self: "Enqueueable[Concatenate[Any, Rest]]", *args: Rest.args, **kwargs: Rest.kwargs
    ) -> "JobSignature[[Any]]": ...
    def s(self, *args: Any, **kwargs: Any) -> Any:
        """Return a call with these arguments, such as a job of a batch. As `on_success`, it gets the results first."""
        return self._with(args, kwargs)

    def si(self, *args: P.args, **kwargs: P.kwargs) -> "JobSignature[[]]":
        """Return a call that does not get the results of a batch: see s()."""
        return self._with(args, kwargs, immutable=True)

    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> Job:
        """Enqueue a job with these arguments. Returns the Job. See JobTask.using()."""
        call = self._with(args, kwargs)
        return enqueue(call.task, call.args, call.kwargs, **call.options)

    async def aenqueue(self, *args: P.args, **kwargs: P.kwargs) -> Job:
        """Do the same as enqueue(), in async code."""
        return await sync_to_async(self.enqueue)(*args, **kwargs)

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult:
        """Enqueue a job with these arguments. Returns its AsyncResult."""
        return self.apply_async(args, kwargs)


class JobSignature(Enqueueable[P]):
    """A task with arguments and options. Made by JobTask.using(), s() and si().

    Celery's own signatures are for its canvas. A job is no part of that: see NO_CANVAS.
    """

    def __init__(self, task, args=(), kwargs=None, options=None, immutable=False):
        self.task, self.args, self.kwargs = task, tuple(args), kwargs or {}
        self.options, self.immutable = options or {}, immutable
        self.app, self.name = task.app, task.name  # the canvas reads these

    def _with(self, args, kwargs, immutable=False):
        if self.immutable:  # as in Celery
            args, kwargs = (), {}
        args, kwargs = (*args, *self.args), {**self.kwargs, **kwargs}
        return JobSignature(self.task, args, kwargs, self.options, immutable)

    def set(self, **options: Unpack[Options]) -> "JobSignature[P]":
        """Add options to this signature, and return it, as Celery does. Raises TypeError for unknown ones."""
        check_options(options, Options.__optional_keys__)
        self.options = {**self.options, **options}
        return self

    def apply_async(
        self, args: Any = (), kwargs: dict[str, Any] | None = None, **options: Any
    ) -> AsyncResult:
        """Enqueue a job as JobTask.apply_async() does. Returns its AsyncResult."""
        call = self._with(args or (), kwargs or {})
        return self.task.apply_async(call.args, call.kwargs, **{**self.options, **options})

    # What Celery calls to combine signatures, or to store one in a message

    def clone(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{self.task.name}: {NO_CANVAS}")

    apply = freeze = link = link_error = AsyncResult = __or__ = __ror__ = __json__ = clone


CallableSignature.register(JobSignature)  # so that Celery's canvas calls clone()


def check_call(call, allowed):
    """Raise TypeError unless this is a JobSignature that has no other options than these."""
    if not isinstance(call, JobSignature):
        raise TypeError(f"{call!r:.200} is not the signature of a job, such as task.s(10)")
    if others := call.options.keys() - allowed:
        raise TypeError(f"{call.task.name}: this job does not take {', '.join(sorted(others))}")


def check_options(options, supported=()):
    """Raise TypeError for options of apply_async() that a job cannot have."""
    known = [*HARMLESS_OPTIONS, *supported]
    if refused := [name for name in options if name not in known and options[name]]:
        hint = NO_CANVAS if CANVAS_OPTIONS & {*refused} else "See the options of using()"
        if "expires" in refused:
            hint = EXPIRES
        raise TypeError(f"a job does not take {', '.join(refused)}. {hint}")


def enqueue(task, args=(), kwargs=None, **options):
    """Store a job, and send its message when the caller's transaction commits. See JobTask.using()."""
    single = {name: options.pop(name, None) for name in SINGLE_OPTIONS}
    return insert(new_fields(task, args, kwargs, **options), **single)


def enqueue_many(calls: Iterable[JobSignature[[]]]) -> list[Job]:
    """Store a job for each of these calls, such as task.s(1): all of them or none. Returns the Jobs.

    The guarantees are those of enqueue(), at a fraction of the cost: while the sweeper runs, it sends all
    messages but the first SENT_IMMEDIATELY. Raises TypeError for a call with `unique` or `idempotency_key`.
    """
    now, jobs, queues = database_time(), [], messages.Queues()
    for call in calls:
        check_call(call, BULK_OPTIONS)
        options = {**call.options, "queue": queues.of(call)}
        fields = new_fields(call.task, call.args, call.kwargs, now, **options)
        jobs.append(new_job(**fields))
    return insert_many(now, jobs)


# The fields of a new job

COLUMNS = {field.attname: field for field in Job._meta.concrete_fields}
CONSTANTS = {name: field.get_default() for name, field in COLUMNS.items()}
MADE = {
    name: field.default
    for name, field in COLUMNS.items()
    if field.has_default() and callable(field.default)
}


def new_fields(
    task, args, kwargs=None, now=DATABASE_NOW, /, countdown=None, eta=None, owner=None, **options
):
    """Return the fields of a new job. Raises the TypeError and ValueError of enqueue()."""
    fields = call_fields(task, args, kwargs, **options)
    return {**fields, "owner": owner, **times(now, countdown, eta, fields["limit_key"])}


def call_fields(task, args, kwargs=None, label="", queue=None, headers=None, results_of=None):
    """Return what a new job is to do. Raises the TypeError and ValueError of enqueue().

    With `results_of`, the id of a batch, the results of its jobs will be the first argument.
    """
    if not is_job(task):
        raise TypeError(f"{task!r} is not a job: declare it with @job")
    arguments = ([Results(), *args] if results_of else args), kwargs or {}
    args, kwargs = as_json(*arguments)
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise TypeError("args must be a list, such as [10], and kwargs a dictionary")
    task.__header__(*args, **kwargs)
    label = str(label or "")
    if label:
        to_json(label)  # may raise ValueError
    check_text("queue", queue or None)
    queue = queue or queue_of(task, *arguments)
    fields = {"task": task.name, "args": args[1:] if results_of else args, "kwargs": kwargs}
    fields |= {"label": label[:MAX_LABEL], "queue": queue, "headers": storable(headers)}
    return {**fields, "results_of": results_of, "limit_key": limits.key_of(task, *arguments)}


def check_text(name, text):
    """Raise ValueError if this option is neither None nor a text that fits into its column."""
    if text is not None:
        if not isinstance(text, str) or not 0 < len(text) <= 255:
            raise ValueError(f"{name}= must be a string of 1 to 255 characters, not {text!r:.50}")
        to_json(text)  # may raise ValueError


def check_times(countdown=None, eta=None):
    """Raise TypeError if these options are neither None nor of the right type."""
    if not isinstance(countdown, int | float | None):
        raise TypeError(f"countdown= must be a number of seconds, not {countdown!r:.50}")
    if not isinstance(eta, datetime | None):
        raise TypeError(f"eta= must be a datetime, not {eta!r:.50}")


def times(now=DATABASE_NOW, countdown=None, eta=None, limit_key=None):
    """Return the fields of a new job that say when it is due, and when its message is sent, or which limit blocks it.

    `now` is a time or Now(). With DATABASE_NOW and no `eta`, due_at and send_at are timedeltas, for compiler.insert().
    An `eta` is compared with the database's clock: that of this process may be wrong.
    """
    check_times(countdown, eta)
    if eta is not None:
        if countdown is not None:
            raise TypeError("give countdown= or eta=, not both")
        now = database_time() if now is DATABASE_NOW else now
        countdown = (maybe_make_aware(eta) - now).total_seconds()
    if (delay := max(countdown or 0, 0)) > MAX_COUNTDOWN:
        raise ValueError(f"countdown={delay:.0f} is longer than ten years: it is in seconds")
    due_at = now + timedelta(seconds=delay)
    if limit_key:
        return {"times_sent": 0, "due_at": due_at, "send_at": None, "blocked_by": limit_key}
    resend_at = now + timedelta(seconds=conf.RESEND_SECONDS)
    send_at = due_at if delay else resend_at
    return {"times_sent": 0 if delay else 1, "due_at": due_at, "send_at": send_at}


# The rows


def insert(fields, unique=None, unique_until=None, idempotency_key=None):
    """Store the job, unless a job of its task with this `unique` is active. Returns that one then."""
    check_text("idempotency_key", idempotency_key)
    check_text("unique", unique)
    if unique_until not in (None, "start", "end") or (unique_until and not unique):
        raise ValueError(
            f'give unique= and unique_until="start" or "end", not {unique_until!r:.50}'
        )
    keys = {"unique_key": unique, "idempotency_key": idempotency_key}
    job = Job(**fields, **keys, unique_until_start=unique_until == "start")
    # Another job with this `unique` may be stored after active_with() found none: then the INSERT stores nothing. If
    # that job has ended when active_with() looks again, try once more.
    for _ in range(MAX_INSERTS):
        if active := active_with(job):
            return active
        job.headers = new_headers(job)
        if transitions.store(job):
            job.is_new = True
            send_after_commit([job])
            return job
        used = Q(owner_id=job.owner_id, idempotency_key=idempotency_key or "")
        if Job.objects.filter(Q(pk=job.pk) | used).exists():
            raise IntegrityError(f"used before: idempotency_key={idempotency_key!r} or id={job.pk}")
    raise IntegrityError("a constraint refuses this job")  # SQLite would ignore it


def active_with(job):
    """Return the active job with the task and the unique_key of this one, or None.

    If it is unique until its start, lock it: it starts after the caller's transaction, and reads what that has changed.
    """
    if not job.unique_key:
        return None
    rows = Job.objects.filter(UNFINISHED, task=job.task, unique_key=job.unique_key)
    if not job.unique_until_start:
        return rows.first()
    with transaction.atomic():
        return rows.select_for_update().first()


def new_job(**fields):
    """Return an unsaved job with the headers of its messages."""
    made = {name: make() for name, make in MADE.items() if name not in fields}
    values = CONSTANTS | made | fields
    job = Job(*[values.pop(name) for name in COLUMNS])  # by name it would take three times as long
    for name, value in values.items():  # such as `owner`
        setattr(job, name, value)
    job.is_new = True
    job.headers = new_headers(job)
    return job


def insert_many(now, jobs):
    """Store these jobs. Returns them."""
    for index, job in enumerate(jobs):
        job.created_at = now + timedelta(microseconds=index)  # pages sort by this time
    later = [job for job in jobs if job.times_sent][SENT_IMMEDIATELY:]
    recently = Now() - timedelta(seconds=3 * conf.SWEEP_SECONDS)
    # If the sweeper runs, let it send the rest: the call takes a fifth of the time.
    if later and Sweep.objects.filter(ended_at__gt=recently).exists():
        for job in later:
            job.times_sent, job.send_at = 0, job.created_at  # which keeps their order
    transitions.store_many(jobs)
    send_after_commit(jobs)
    return jobs


def send_after_commit(jobs):
    if messages.is_eager():
        for part in chunks(iter(jobs), CHUNK):
            rows = Job.objects.filter(pk__in=[job.pk for job in part])
            transaction.on_commit(partial(runs_here.send, Job, jobs=rows), robust=True)
        return
    for part in chunks((job for job in jobs if job.times_sent), CHUNK):
        transaction.on_commit(lambda part=part: publish(part), robust=True)
    admission.admit_after_commit({job.blocked_by for job in jobs if job.blocked_by})


def database_time():
    """SELECT now(), as a value: PostgreSQL inserts values much faster than expressions."""
    # No row has this new id, so Max() is NULL and the query returns Now().
    latest = Coalesce(Max("created_at"), Now())
    return Job.objects.filter(pk=uuid.uuid4()).aggregate(now=latest)["now"]
