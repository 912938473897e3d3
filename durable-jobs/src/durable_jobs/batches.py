"""Batches: jobs that belong together, and the callbacks that start when they have ended.

Whoever ends a job of a batch asks afterwards, in a query of its own, whether another one is unfinished. If
two jobs end at the same moment, each asks after its own commit, so one of them sees that both have ended.
It then locks the row of the batch, asks again, and stores the callbacks. So jobs that end share no lock.
The sweeper asks, too: jobs may be cancelled or deleted, and a worker may die before it has asked.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from asgiref.sync import sync_to_async
from celery.utils.functional import maybe_list
from django.db import Error, connection, transaction
from django.db.models import Count, Exists, OuterRef, Q, Subquery
from django.utils import timezone

from durable_jobs import actions, messages, transitions
from durable_jobs.compiler import prepared
from durable_jobs.database import Now, in_transaction, may_succeed_later, timeouts
from durable_jobs.enqueue import (
    MEMBER_OPTIONS,
    JobSignature,
    call_fields,
    check_call,
    database_time,
    insert_many,
    new_job,
    times,
)
from durable_jobs.models import MAX_LABEL, Batch, Job
from durable_jobs.states import UNFINISHED
from durable_jobs.validation import to_json, uuids

__all__ = ["add", "add_many", "cancel", "enqueue", "open_batch", "run_failed_again"]

logger = logging.getLogger(__name__)

Callback = JobSignature[[]] | JobSignature[[Any]]
MAX_PER_ROUND = 500  # batches that the sweeper ends


@contextmanager
def open_batch(
    *,
    owner: Any = None,
    label: str = "",
    on_success: Callback | None = None,
    on_finish: Callback | None = None,
) -> Iterator[Batch]:
    """Store a batch, and its members when the block ends: all of them or none.

        with batches.open_batch(owner=user, on_success=send_summary.si(10)) as batch:
            batches.add(batch, resize.s(1))

    - `owner`: a user. The members and the callbacks belong to this user, too.
    - `label`: a human-readable name, which is cut after 255 characters.
    - `on_success`: the job that starts once all members have succeeded, such as `send_summary.s("Summary")`.
      Its first argument is the list of their results, in the order in which they were added. With .si(), it
      does not get them.
    - `on_finish`: the job that starts once all members have ended, in whatever state.

    Raises TypeError and ValueError as enqueue() does.
    """
    to_json(label)  # may raise ValueError
    batch = Batch(owner=owner, label=label[:MAX_LABEL])
    batch.on_success = on_success and planned(on_success, results_of=batch.pk)
    batch.on_finish = on_finish and planned(on_finish)
    with transaction.atomic():
        batch.save()
        yield batch
        end(batch.pk)  # if it has no members
    batch.refresh_from_db()


def enqueue(
    calls: Iterable[JobSignature[[]]],
    *,
    owner: Any = None,
    label: str = "",
    on_success: Callback | None = None,
    on_finish: Callback | None = None,
) -> Batch:
    """Store a batch with a job for each of these calls. Returns it. See open_batch()."""
    with open_batch(owner=owner, label=label, on_success=on_success, on_finish=on_finish) as batch:
        add_many(batch, calls)
    return batch


def add(batch: Batch, call: JobSignature[[]]) -> Job:
    """Add a job to a batch, such as task.s(1). Its owner is that of the batch.

    Raises ValueError if the batch has ended, TypeError if the call has other options than `label`, `queue`, `countdown`
    and `eta`, and the errors of enqueue().
    """
    return add_many(batch, [call])[0]


def add_many(batch: Batch, calls: Iterable[JobSignature[[]]]) -> list[Job]:
    """Add a job for each of these calls: all of them or none. See add()."""
    queues = messages.Queues()
    members = [fields_of(call, queues) for call in calls]
    with transaction.atomic():
        keep_open(batch)
        now = database_time()
        common = {"batch": batch, "owner_id": batch.owner_id}
        # Results are sorted by created_at, which grows by a microsecond. `now` stands still in a transaction, and has
        # only milliseconds on SQLite, so continue after the last call's times.
        first = max(getattr(batch, "_next_member_at", now), now)
        batch._next_member_at = first + timedelta(microseconds=len(members))
        rows = [{**row, **times(now, *when, row["limit_key"])} for row, when in members]
        return insert_many(first, [new_job(**row, **common) for row in rows])


aenqueue, aadd = sync_to_async(enqueue), sync_to_async(add)


def fields_of(call, queues=None, results_of=None):
    """Return the fields of a call, and its countdown and eta. Raises TypeError, and the errors of enqueue()."""
    check_call(call, MEMBER_OPTIONS)
    options = {"countdown": None, "eta": None, **call.options}
    if queues:
        options["queue"] = queues.of(call)
    when = options.pop("countdown"), options.pop("eta")
    if results_of and not call.immutable:
        options["results_of"] = str(results_of)
    return call_fields(call.task, call.args, call.kwargs, **options), when


def keep_open(batch):
    """Lock the batch so that it cannot end before this transaction does. Others can do so, too.

    Raises ValueError if it has ended.
    """
    rows = Batch.objects.filter(pk=batch.pk, ended_at=None).only("pk")
    sql, params = rows.query.sql_with_params()
    # Django knows only locks that exclude each other.
    lock = " FOR KEY SHARE" if connection.features.has_select_for_update else ""
    if not Batch.objects.raw(sql + lock, params):
        raise ValueError("the batch has ended: no job can be added to it")


def cancel(batch: Batch) -> int:
    """Cancel the members that are active. The batch ends. Returns how many there were."""
    cancelled = 0
    while is_active(batch=batch.pk):  # again, because a job that ends may store its next job
        cancelled += actions.cancel(batch.jobs.all())
    # End it now, so that refresh_from_db() reads its state. A caller's transaction has locked jobs above, so it must not
    # wait for the batch, too. If the batch was locked, try again after the commit.
    try_to_end(batch.pk, skip_locked=in_transaction())
    transaction.on_commit(lambda: try_to_end(batch.pk))  # raises nothing
    batch.refresh_from_db()
    return cancelled


def run_failed_again(batch: Batch, most: int | None = None) -> list[Job]:
    """Run the failed and the cancelled members again, or the first of them. Returns them. See actions.run_again()."""
    again = actions.run_all_again(unsuccessful(batch).order_by("created_at", "pk")[:most])
    batch.refresh_from_db()
    return again


def unsuccessful(batch):
    """Return the failed and the cancelled jobs of this batch."""
    return batch.jobs.filter(state__in=transitions.UNSUCCESSFUL)


def cancel_ids(ids):
    """Cancel this job or batch, or each in a list. Ignore other ids. Returns the ids of jobs."""
    keys = uuids(maybe_list(ids) or [])
    jobs = Job.objects.filter(pk__in=list(keys))
    actions.cancel(jobs)
    for batch in Batch.objects.filter(pk__in=list(keys), ended_at=None):
        cancel(batch)
    return [keys[pk] for pk in jobs.values_list("pk", flat=True)]


# Callbacks and next jobs. They are stored as JSON: the fields of a job, and when it is due.


def planned(call, results_of=None):
    """Return a job that is stored later, as JSON. Raises TypeError, and the errors of enqueue()."""
    fields, (countdown, eta) = fields_of(call, results_of=results_of)
    times(timezone.now(), countdown, eta)  # may raise ValueError
    job = new_job(**fields)  # its headers, such as a trace, are those of now
    fields |= {"id": str(job.pk), "headers": job.headers}
    return {**fields, "countdown": countdown, "eta": eta and eta.isoformat()}


def job_of(now, *, countdown, eta, **fields):
    """Return the unsaved job of a plan that planned() has made."""
    when = times(now, countdown, eta and datetime.fromisoformat(eta), fields["limit_key"])
    return Job(**fields, **when)


def results_of(pk):
    """Return the results of a batch, in the order of its members. Raises LookupError if they were deleted."""
    members = Job.objects.filter(batch=pk)
    for counts in Batch.objects.filter(pk=pk).values_list("counts", flat=True):
        if members.count() >= sum(counts.values()):
            return list(members.order_by("created_at", "pk").values_list("result", flat=True))
    raise LookupError(f"it needs the results of the batch {pk}, which were deleted")


def succeed(id, run_token, next_jobs=(), **end):
    """Write the result of a run, and store the next jobs. Returns 0 if the run has lost its job."""
    if not next_jobs:
        return transitions.succeed(id=id, run_token=run_token, **end)
    with transaction.atomic():
        if written := transitions.succeed(id=id, run_token=run_token, **end):
            job = Job.objects.annotate(now=Now()).only("owner_id", "batch_id").get(pk=id)
            fields = {"owner_id": job.owner_id, "batch_id": job.batch_id, "follows": id}
            insert_many(job.now, [job_of(job.now, **plan, **fields) for plan in next_jobs])
    return written


# The end of a batch


def newest_active(batch):
    """Return the id of the newest unfinished job of this batch, as a queryset."""
    # The newest: PostgreSQL need not read the index entries of thousands of jobs that have ended. With batch=…
    # it could use the index `durable_jobs_job_created`, and read all jobs that are newer than those of the batch.
    members = Job.objects.filter(UNFINISHED, batch__gte=batch, batch__lte=batch)
    return members.order_by("batch_id", "-created_at").values_list("pk")[:1]


@prepared()
def is_active(batch):
    """Return whether this batch has an unfinished job: a list with the id of one, or an empty list."""
    return newest_active(batch), None


def end(pk, skip_locked=False):
    """If all jobs of this batch have ended, end it and store its callbacks.

    With `skip_locked`, do nothing if another transaction has locked the batch.
    """
    if is_active(batch=pk):
        return
    rows = Batch.objects.annotate(now=Now()).filter(*timeouts(), pk=pk, ended_at=None)
    with transaction.atomic():
        batch = rows.select_for_update(skip_locked=skip_locked).first()
        # Ask again: while the row is locked, open_again() and keep_open() wait, so no job is added or runs
        # again.
        if batch is None or is_active(batch=pk):
            return
        count_ended(batch)
        try:
            start_callbacks(batch)
        except Exception as error:
            if may_succeed_later(error):
                raise
            logger.exception("the callbacks of the batch %s cannot start", pk)
            detail = "" if isinstance(error, Error) else f": {error!r:.500}"  # owners read no SQL
            batch.state, batch.error = "failed", f"Its callbacks cannot start{detail}"
        fields = ["state", "counts", "error", "ended_at", "on_success", "on_finish"]
        batch.save(update_fields=fields)


def count_ended(batch):
    """Set how this batch has ended."""
    counts = dict(batch.jobs.values_list("state").annotate(count=Count("*")))
    bad = {state: counts[state] for state in ("failed", "cancelled") if counts.get(state)}
    batch.state, batch.counts, batch.ended_at = next(iter(bad), "succeeded"), counts, batch.now
    if bad:
        texts = [f"{count:,} {state}" for state, count in bad.items()]
        batch.error = f"{' and '.join(texts)} of {sum(counts.values()):,}"


@transaction.atomic
def start_callbacks(batch):
    """Store the callbacks that are due. A batch that opens again does not start them a second time."""
    due = ["on_success", "on_finish"] if batch.state == "succeeded" else ["on_finish"]
    plans = [plan for name in due if (plan := getattr(batch, name))]
    fields = {"owner_id": batch.owner_id, "follows": batch.pk}
    insert_many(batch.now, [job_of(batch.now, **plan, **fields) for plan in plans])
    for name in due:
        setattr(batch, name, None)


def try_to_end(pk, skip_locked=False):
    """Do the same as end(). If it fails, the sweeper tries again."""
    try:
        end(pk, skip_locked)
    except Exception as error:
        logger.warning("the batch %s has not ended yet: %r", pk, error)


def end_all():
    """End batches whose jobs have ended. The sweeper calls this. It continues in its next round."""
    active = Subquery(newest_active(OuterRef("pk")))
    ended = Batch.objects.filter(ended_at=None).alias(active=active).filter(active=None)
    for pk in list(ended.order_by("?").values_list("pk", flat=True)[:MAX_PER_ROUND]):
        try_to_end(pk, skip_locked=True)  # the sweeper must not wait


# What the purge may delete. `old_batches` are the ids of the old batches, whose rows are locked. A callback, or its
# copy, reads the results of the batch that it follows, so these are kept as long as the callback may run.


def unneeded_jobs(old_batches):
    """Return the condition for an old job to be deleted."""
    kept = retained_jobs().filter(follows__in=old_batches).values_list("follows", flat=True)
    return Q(batch=None) | Q(batch__in=set(old_batches) - set(kept))


def unneeded_batches(old_batches):
    """Return the condition for an old batch to be deleted."""
    members, of_this = Job.objects.filter(batch=OuterRef("pk")), Q(follows=OuterRef("pk"))
    return Q(pk__in=old_batches) & ~Exists(members) & ~Exists(retained_jobs().filter(of_this))


def retained_jobs():
    """Return the jobs that are not old. Callbacks among them may run (again)."""
    return Job.objects.exclude(finished_at__lt=transitions.retention_end())
