"""Batches: jobs that belong together, and what starts when they have ended. Chains, groups and chords.

Whoever ends a job of a batch asks afterwards, in a query of its own, whether another one is unfinished. If
two jobs end at the same moment, each asks after its own commit, so one of them sees that both have ended.
It then locks the row of the batch, asks again, and stores what starts next. So jobs that end share no lock.
The sweep asks, too: jobs may be cancelled or deleted, and a worker may die before it has asked.

What starts next is a list of *steps*, as JSON. A step is a job, or a group of such lists:

    chain(a, b)            [a, b]
    group(a, chain(b, c))  [{"group": [[a], [b, c]]}]
    chord([a, b])(c)       [{"group": [[a], [b]]}, c]

A job of a chain has the steps after it in its row, as Celery's messages carry them. A group is a batch, and
has the steps after it in the row of the batch.
"""

import logging
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from celery import current_app, group
from celery.canvas import Signature, maybe_signature
from django.apps import apps
from django.db import connections, models, transaction
from django.db.models import Count, Exists, OuterRef, Q, Subquery
from django.db.models.functions import Now
from django.utils import timezone

from . import tracing, updates
from .celery import check_options
from .database import in_transaction, may_succeed_later, timeouts, wait_for
from .expressions import IDLE_TIMEOUT, LOCK_TIMEOUT, UNFINISHED
from .queryset import (
    BATCH_SIZE,
    MAX_LABEL,
    call_fields,
    database_time,
    insert_many,
    owner_of,
    times,
)
from .values import Results, as_json, size_error, to_json

if TYPE_CHECKING:
    from .models import Batch, Job

__all__ = ["BatchManager"]

logger = logging.getLogger(__name__)


def fill(args):
    """Return the arguments of a body, with results in place of each Results.

    Those of a batch are in the order of its members. Raises LookupError if they were deleted.
    """
    if not any(isinstance(arg, Results) for arg in args):
        return args
    return [wait_for(read, *arg.source) if isinstance(arg, Results) else arg for arg in args]


def read(kind, pk):
    if kind == "job":
        for result in job_manager().filter(pk=pk).values_list("result", flat=True):
            return result
    members = job_manager().filter(batch=pk)
    for counts in batch_manager().filter(pk=pk).values_list("counts", flat=True):
        if members.count() >= sum(counts.values()):
            # All jobs of a chain but the last have `then`.
            last = members.filter(then__isnull=True).order_by("created_at", "pk")
            return list(last.values_list("result", flat=True))
    raise LookupError(f"it needs the results of the {kind} {pk}, which were deleted")


# models.py imports this module.


def job_manager():
    return apps.get_model("durable_jobs.Job").objects


def batch_manager():
    return apps.get_model("durable_jobs.Batch").objects


# Steps


def step(
    task, args, kwargs=None, label="", queue=None, countdown=None, eta=None, task_id=None, given=0
):
    """Return a step that is a job. `given` is how many arguments the step before passes on.

    Raises the errors of Job.objects.enqueue().
    """
    sample = [Results(["batch", str(uuid.uuid4())])] * given
    fields = call_fields(task, [*sample, *args] if given else args, kwargs, label, queue)
    times(timezone.now(), countdown, eta)  # may raise ValueError
    fields |= {"args": fields["args"][given:], "given": given, "id": new_id(task_id)}
    return {**fields, "countdown": countdown, "eta": eta and eta.isoformat()}


def plan(signature, given=0, args=(), kwargs=None, label="", **options):
    """Return the steps of a signature. `args`, `kwargs` and `options` are those of apply_async().

    Raises TypeError if a task is not a job, or for options that a job cannot have, and the errors of
    Job.objects.enqueue().
    """
    if not isinstance(signature, dict):
        raise TypeError(f"{signature!r:.200} is not a signature, such as task.s(10)")
    sig = maybe_signature(signature, current_app)
    options = {**sig.options, **options}
    check_options({"owner": options.pop("owner", None)})
    label = options.pop("label", "") or label
    if sig.subtask_type not in ("chain", "group", "chord"):
        sig = sig.clone(args, kwargs) if args or kwargs else sig
        check_options(options, ["countdown", "eta", "task_id"])
        options = {name: options.get(name) for name in ("queue", "countdown", "eta", "task_id")}
        task = current_app.tasks.get(sig.task, sig.task)
        options["given"] = 0 if sig.immutable else given
        return [step(task, sig.args, sig.kwargs, label, **options)]
    args = sig.args if sig.immutable else [*args, *sig.args]
    task_id = options.pop("task_id", None)
    if sig.subtask_type == "group":
        members = []
        for each in sig.tasks:
            steps = plan(each, given, args, kwargs, label, **options)
            is_group = len(steps) == 1 and "group" in steps[0]  # Celery unrolls it, too
            members += steps[0]["group"] if is_group else [steps] if steps else []
        return [{"group": members, "id": new_id(task_id), "label": label}]
    # As in Celery, options of a chain are for its first task. Those of a chord are also for its body.
    tasks, rest = sig.tasks, {}
    if sig.subtask_type == "chord":
        kwargs = {**sig.kwargs["kwargs"], **(kwargs or {})}
        tasks = [group(getattr(tasks, "tasks", tasks)), kwargs.pop("body", None) or sig.body]
        rest = {name: options[name] for name in options if name not in ("countdown", "eta")}
    steps = []
    for place, task in enumerate(tasks, start=1):
        members = steps[-1].get("group", ()) if steps else ()
        if any("group" in member[-1] for member in members):
            raise TypeError("a chain in the header of a chord cannot end with a group")
        if place == len(tasks) and task_id:
            options = {**options, "task_id": task_id}
        steps += plan(task, given, args, kwargs, label, **options)
        given, args, kwargs, options = 1, [], None, rest
    return steps


def new_id(task_id):
    return str(uuid.UUID(task_id) if task_id else uuid.uuid4())


class Rows:
    """The jobs and batches that some steps start with, until they are stored together.

    `now` is the database's time. `place` is the time by which members of a batch are sorted: what
    continues a member takes its place. `follows` is the id of the job or batch that comes before, and
    `request` has what tracing.py says of its request.
    """

    def __init__(self, now, owner_id=None, place=None, follows=None, request=None):
        self.now, self.place, self.owner_id, self.follows = now, place or now, owner_id, follows
        self.request = request
        self.jobs, self.batches = [], []

    def add(self, steps, given=(), batch_id=None):
        """Add what these steps start with. `given` are the first arguments, as a row stores them."""
        first, *rest = steps
        created_at = self.place + timedelta(microseconds=len(self.jobs))
        if "group" not in first:
            fields = {name: first[name] for name in ("task", "kwargs", "queue", "label")}
            fields["limit_key"] = first.get("limit_key")  # an older version stored none
            eta = first["eta"] and datetime.fromisoformat(first["eta"])
            fields |= times(self.now, first["countdown"], eta, fields["limit_key"])
            fields |= {"pk": first["id"], "args": [*given[: first["given"]], *first["args"]]}
            fields |= {"batch_id": batch_id, "then": rest or None, "follows": self.follows}
            self.jobs.append(job_manager().model(**fields, owner_id=self.owner_id))
            return
        if rest or batch_id is None:
            fields = {"pk": first["id"], "label": first["label"][:MAX_LABEL], "then": rest or None}
            fields |= {"parent_id": batch_id, "created_at": created_at}
            self.batches.append(batch_manager().model(**fields, owner_id=self.owner_id))
            batch_id = first["id"]
        for member in first["group"]:
            self.add(member, given, batch_id)

    def store(self):
        batch_manager().bulk_create(self.batches, batch_size=BATCH_SIZE)
        insert_many(job_manager(), self.place, self.jobs, self.request)
        with_members = {row.batch_id for row in self.jobs} | {row.parent_id for row in self.batches}
        for batch in self.batches:
            if batch.pk not in with_members:
                end(batch.pk)


@transaction.atomic
def enqueue(signature, args=(), kwargs=None, *, owner=None, **options):
    """Store the jobs of a signature: all of them or none. Returns its steps.

    `options` are those of apply_async(). Raises the errors of plan().
    """
    owner = owner or signature.options.get("owner")
    owner = job_manager().model(owner=owner)  # may raise ValueError
    steps = plan(signature, 0, args or (), kwargs, owner=None, **options)
    rows = Rows(database_time(job_manager()), owner.owner_id)
    rows.add(steps)
    for row in [*rows.jobs, *rows.batches]:
        check_size(row.then)
    rows.store()
    return steps


def check_size(steps):
    """Raise ValueError if these steps of one row exceed DURABLE_JOBS['MAX_BYTES']. Those that are left later do not."""
    if steps and (error := size_error(len(to_json(steps)))):
        raise ValueError(error)


def succeed(manager, id, run_token, next_steps=(), **end):
    """Write the result of a run, and store what comes next. Returns 0 if the run has lost its job."""
    if not next_steps and updates.succeed(manager, id=id, run_token=run_token, **end):
        return 1
    # Either the job has steps to start, or the run has lost it.
    with transaction.atomic():
        owned = manager.filter(LOCK_TIMEOUT, IDLE_TIMEOUT, pk=id, run_token=run_token)
        fields = "owner_id", "batch_id", "created_at", "then", *tracing.FIELDS
        job = owned.only(*fields).annotate(now=Now()).select_for_update().first()
        if job is None:
            return 0
        changes = {"then": []} if job.then else {}
        updates.finish(owned, "succeeded", progress=100, **end, **changes)
        if job.then:
            place = job.created_at if job.batch_id else None
            rows = Rows(job.now, job.owner_id, place, id, tracing.of(job))
            rows.add(job.then, stored(Results(["job", str(id)])), job.batch_id)
            rows.store()
        rows = Rows(job.now, job.owner_id, None, id, tracing.of(job))
        for steps in next_steps:
            rows.add(steps, batch_id=job.batch_id)
        rows.store()
    return 1


def stored(*args):
    return as_json(args, {})[0]


# The end of a batch


def newest_active(manager, batch):
    """Return the id of the newest unfinished job of this batch, as a queryset."""
    # The newest: PostgreSQL need not read the index entries of thousands of jobs that have ended. With batch=…
    # it could use the index `job_created`, and read all jobs that are newer than those of the batch.
    members = manager.filter(UNFINISHED, batch__gte=batch, batch__lte=batch)
    return members.order_by("batch_id", "-created_at").values_list("pk")[:1]


@updates.prepared()
def an_active(manager, batch):
    return newest_active(manager, batch), None


def is_active(pk):
    """Return whether a job of this batch is unfinished."""
    return bool(an_active(job_manager(), batch=pk))


def end(pk, skip_locked=False):
    """If all jobs of this batch have ended, end it and store what starts next.

    With `skip_locked`, do nothing if another transaction has locked the batch.
    """
    if is_active(pk):
        return
    rows = batch_manager().filter(*timeouts(), pk=pk, ended_at=None)
    with transaction.atomic():
        rows = rows.annotate(now=Now(), **request_of_first()).select_for_update(
            skip_locked=skip_locked
        )
        batch = rows.first()
        # Ask again: while the row is locked, no job can run again, and no transaction that adds a job or an
        # inner batch can commit, because PostgreSQL checks its foreign key.
        if batch is None or is_active(pk) or batch.children.filter(ended_at=None).exists():
            return
        count_ended(batch)
        try:
            start_next(batch)
        except Exception as error:
            if may_succeed_later(error):
                raise
            logger.exception("what comes after the batch %s cannot start", pk)
            batch.state, batch.error = "failed", f"What comes next cannot start: {error!r:.500}"
        batch.save(update_fields=["state", "counts", "error", "ended_at", "then", "ended"])
    if batch.parent_id:
        end(batch.parent_id, skip_locked)


def request_of_first():
    """Return annotations of a batch: the request of its oldest job. That of others may have come later."""
    oldest = job_manager().filter(batch=OuterRef("pk")).order_by("created_at")
    return {name: Subquery(oldest.values(name)[:1]) for name in tracing.FIELDS}


def count_ended(batch):
    """Set how this batch has ended."""
    counts = dict(batch.jobs.values_list("state").annotate(count=Count("*")))
    all_counts = Counter(counts) + Counter(batch.children.values_list("state", flat=True))
    bad = {state: all_counts[state] for state in ("failed", "cancelled") if all_counts[state]}
    batch.state, batch.counts, batch.ended_at = next(iter(bad), "succeeded"), counts, batch.now
    if bad:
        texts = [f"{count:,} {state}" for state, count in bad.items()]
        batch.error = f"{' and '.join(texts)} of {sum(all_counts.values()):,}"


@transaction.atomic
def start_next(batch):
    place = batch.created_at if batch.parent_id else None
    # Without a member, its request is unknown.
    request = None if batch.trace is None else tracing.of(batch)
    rows = Rows(batch.now, batch.owner_id, place, batch.pk, request)
    if batch.then and batch.state == "succeeded":
        rows.add(batch.then, stored(Results(["batch", str(batch.pk)])), batch.parent_id)
        batch.then = []
    if batch.ended:
        rows.add(batch.ended)
        batch.ended = []
    rows.store()


def try_to_end(pk, skip_locked=False):
    """Do the same as end(). If it fails, the sweep tries again."""
    try:
        end(pk, skip_locked)
    except Exception as error:
        logger.warning("the batch %s has not ended yet: %r", pk, error)


def end_all():
    """End batches whose jobs have ended. The sweep calls this. It continues in its next round."""
    active = Subquery(newest_active(job_manager(), OuterRef("pk")))
    is_open = batch_manager().filter(ended_at=None)
    has_inner = Exists(is_open.filter(parent=OuterRef("pk")))
    ended = is_open.alias(active=active).filter(~has_inner, active=None)
    for pk in list(ended.order_by("?").values_list("pk", flat=True)[:BATCH_SIZE]):
        try_to_end(pk, skip_locked=True)  # the sweep must not wait


def unneeded(model, old_batches):
    """Return the condition for an old Job or Batch to be deleted. `old_batches` are ids: see lock_batches().

    What a job or a batch has started reads its results, so they are kept as long as each other.
    """
    before = updates.retention_end()
    next_jobs = job_manager().filter(follows=OuterRef("pk")).exclude(finished_at__lt=before)
    if model._meta.model_name == "job":
        callbacks = job_manager().filter(follows__in=old_batches).exclude(finished_at__lt=before)
        kept = callbacks.values_list("follows", flat=True)
        return (Q(batch=None) | Q(batch__in=set(old_batches) - set(kept))) & ~Exists(next_jobs)
    members = job_manager().filter(batch=OuterRef("pk"))
    children = batch_manager().filter(parent=OuterRef("pk"))
    return Q(pk__in=old_batches) & ~Exists(members) & ~Exists(children) & ~Exists(next_jobs)


def unsuccessful(batch):
    """Return the failed and the cancelled jobs of this batch, and of the batches inside of it."""
    family, new = set(), {batch.pk}
    while new:
        family |= new
        new = set(batch_manager().filter(parent__in=new).values_list("pk", flat=True))
    return job_manager().filter(batch__in=family, state__in=updates.UNSUCCESSFUL)


# Type checkers do not see the methods that Django copies from a queryset to its manager.
class BatchManager(models.QuerySet if TYPE_CHECKING else models.Manager):
    db = property(lambda self: self._db or "default")  # as for jobs

    def get_queryset(self) -> "models.QuerySet[Batch]":
        return models.QuerySet(self.model, using=self.db, hints=self._hints)

    @contextmanager
    def open(
        self,
        *,
        owner: Any = None,
        label: str = "",
        then: Signature | None = None,
        ended: Signature | None = None,
    ) -> Iterator["Batch"]:
        """Store a batch, and its members when the block ends: all of them or none.

            with Batch.objects.open(owner=user, then=send_summary.si(10)) as batch:
                batch.enqueue(resize, [1])

        - `owner`: a user. The members and what comes next belong to this user, too.
        - `label`: a name for people, which is cut after 255 characters.
        - `then`: what starts when all members have succeeded: a signature of a job, a chain, group or chord.
          Its first argument is the list of their results, in the order in which they were added. With .si(),
          it does not get them.
        - `ended`: what starts when all members have ended, in whatever state. It gets no argument.

        Raises TypeError and ValueError as Job.objects.enqueue() does.
        """
        to_json(label)  # may raise ValueError
        fields = {"owner": owner_of(self, owner), "label": label[:MAX_LABEL]}
        fields["then"] = None if then is None else plan(then, 1)
        fields["ended"] = None if ended is None else plan(ended)
        check_size(fields["then"])
        check_size(fields["ended"])
        with transaction.atomic(self.db):
            batch = self.create(**fields)
            yield batch
            end(batch.pk)  # if it has no members
        batch.refresh_from_db()

    def enqueue(
        self,
        task: Any,
        calls: Iterable[list | tuple],
        *,
        owner: Any = None,
        label: str = "",
        queue: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        then: Signature | None = None,
        ended: Signature | None = None,
    ) -> "Batch":
        """Store a batch with a job for each list of arguments in `calls`. Returns it. See open()."""
        with self.open(owner=owner, label=label, then=then, ended=ended) as batch:
            batch.enqueue_many(task, calls, queue=queue, countdown=countdown, eta=eta)
        return batch

    aenqueue = sync_to_async(enqueue)


class BatchActions:
    """What can be done with a Batch."""

    def enqueue(
        self,
        task: Any,
        args: list | tuple = (),
        kwargs: dict | None = None,
        *,
        label: str = "",
        queue: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
    ) -> "Job":
        """Add a job. Raises ValueError if the batch has ended. See Job.objects.enqueue()."""
        fields = call_fields(task, args, kwargs, label, queue)
        return self._add([fields], countdown, eta)[0]

    aenqueue = sync_to_async(enqueue)

    def enqueue_many(
        self,
        task: Any,
        calls: Iterable[list | tuple],
        *,
        label: str = "",
        queue: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
    ) -> list["Job"]:
        """Add a job for each list of arguments in `calls`: all of them or none. See enqueue()."""
        rows = [call_fields(task, args, None, label, queue) for args in calls]
        return self._add(rows, countdown, eta)

    def _add(self, rows, countdown, eta):
        manager = job_manager()
        with transaction.atomic(manager.db):
            self._keep_open()
            now = database_time(manager)
            common = {"batch": self, "owner_id": self.owner_id}
            # The time of a transaction stands still. Results are sorted by the times of their jobs.
            place = self._next_place = max(getattr(self, "_next_place", now), now)
            self._next_place += timedelta(microseconds=len(rows))
            rows = [{**row, **times(now, countdown, eta, row["limit_key"])} for row in rows]
            return insert_many(manager, place, [manager.model(**row, **common) for row in rows])

    def _keep_open(self):
        """Lock the batch so that it cannot end before this transaction does. Others can do so, too.

        Raises ValueError if it has ended.
        """
        manager = batch_manager()
        connection = connections[manager.db]
        rows = manager.filter(pk=self.pk, ended_at=None).values("pk")
        sql, params = rows.query.get_compiler(manager.db).as_sql()
        if connection.features.has_select_for_update:
            sql += " FOR KEY SHARE"  # Django knows only locks that exclude each other
        with connection.cursor() as cursor:
            cursor.execute(sql, params)
            if not cursor.fetchone():
                raise ValueError("the batch has ended: no job can be added to it")

    def cancel(self) -> int:
        """Cancel the members that are active, and what would start after them. Returns how many there were."""
        count = 0
        while True:  # again, because a chain or an inner batch may have started its next job
            for rows in [*self.children.filter(ended_at=None), self.jobs.all()]:
                count += rows.cancel()
            # A caller's transaction must not wait for the batch: it has locked jobs of it.
            try_to_end(self.pk, skip_locked=in_transaction())
            if not is_active(self.pk):
                break
        transaction.on_commit(lambda: try_to_end(self.pk))  # it raises nothing
        self.refresh_from_db()
        return count

    def run_failed_again(self) -> list["Job"]:
        """Run the failed and the cancelled members again. Returns them. See JobQuerySet.run_again()."""
        again = unsuccessful(self).order_by("created_at", "pk").run_again()
        self.refresh_from_db()
        return again
