"""Each change of a job's state is one conditional UPDATE, here or in worker.shutdown.release(). `jobs` is always a
queryset of jobs.
"""

from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import Case, DurationField, Q, When
from django.db.models.functions import Coalesce
from django.db.models.lookups import IsNull

from durable_jobs import conf
from durable_jobs.compiler import prepared
from durable_jobs.database import ASYNC_CLAIM, IDLE_TIMEOUT, LOCK_TIMEOUT, Clock, Now
from durable_jobs.models import Batch, Job
from durable_jobs.pauses import is_paused
from durable_jobs.states import SENT, STILL_RUNNING, UNFINISHED

STORED_FAILURES = 20  # of each job: the latest ones
UNSUCCESSFUL = ["failed", "cancelled"]
# When a job starts (again)
PROGRESS = Case(When(cursor__isnull=False, then="progress"), default=0)
# The task function of a cancelled job with a limit may still run: then it has a sweep_at.
CAN_RUN_AGAIN = Q(state__in=UNSUCCESSFUL, sweep_at=None)


def requeue(jobs, delay=0, failure=None, **changes):
    """Queue these jobs (again). The sweeper sends their messages in `delay` seconds, or at the time `delay`.

    A running job with a limit gives its slot up: it is blocked again, see admission.py. Returns how many rows were
    changed. `failure` has the fields of a Failure to store, see update().
    """
    due = delay if isinstance(delay, datetime) else Now() + timedelta(seconds=delay)
    # A queued job keeps its due_at. So does a job with a limit that Run.release() queues (no delay, no failure):
    # hand_over() may admit it in this transaction, and SQLite takes a new due_at for later than now until the next
    # millisecond. A retry or a crash sets a new due_at.
    is_queued, has_limit = Q(state="queued"), Q(limit_key__isnull=False)
    keeps_due_at = is_queued if delay or failure else is_queued | has_limit
    changes["due_at"] = Case(When(keeps_due_at, then="due_at"), default=due)
    key_if_running = Case(When(state="running", then="limit_key"))
    changes["blocked_by"] = key = Coalesce("blocked_by", key_if_running)
    changes["sweep_at"] = Case(When(IsNull(key, True), then=due))
    changes |= {"state": "queued", "run_token": None, "times_sent": 0}
    return update(jobs, changes, failure)


@transaction.atomic
def take_back(ids):
    """Queue these jobs again, whose messages could not be sent. Skip locked rows: they are due later anyway."""
    # Without those whose message arrived in spite of the error.
    requeue(skip_locked(Job.objects.filter(SENT, pk__in=ids)))


def finish(jobs, state, failure=None, **changes):
    """Write a final state, unless the job already has one. Returns how many rows were changed."""
    final = {"state": state, "run_token": None, "sweep_at": None, "blocked_by": None}
    return update(jobs.filter(UNFINISHED), {**final, "finished_at": Now(), **changes}, failure)


def cancel(jobs):
    """Cancel these jobs, unless they have ended. Returns how many rows were changed.

    A job with a limit keeps its slot, and its run the token, until the task function or the lease ends.
    """
    keeps_slot = Q(state="running", limit_key__isnull=False)
    kept = {name: Case(When(keeps_slot, then=name)) for name in ("run_token", "sweep_at")}
    return finish(jobs, "cancelled", **kept)


def release_slots(jobs):
    """Free the slots of cancelled jobs whose functions have ended, or are over their time limit."""
    jobs.filter(STILL_RUNNING).update(run_token=None, sweep_at=None)


def run_again(jobs, **fields):
    """Queue these jobs again that failed or were cancelled. Returns how many rows were changed.

    The caller has opened their batches, see open_again(), and sends their messages. `fields` has the new
    limit_key, headers and times.
    """
    changes = {**fields, "state": "queued", "finished_at": None, "retries": 0, "crashes": 0}
    changes |= {"result": None, "message": "", "error": "", "public_error": ""}
    return jobs.filter(CAN_RUN_AGAIN).update(**changes, progress=PROGRESS)


def update(jobs, changes, failure=None):
    """Update these rows. Returns how many.

    With `failure`, the fields of a Failure, there must be only one row. The latest failures are kept.
    """
    if failure is None:
        return jobs.update(**changes)
    with transaction.atomic():
        job = jobs.only("started_at", "worker").first()
        changed = jobs.update(**changes)
        if job and changed:
            failure = failure | {"error": failure["error"][:1000]}
            job.failures.create(started_at=job.started_at, worker=job.worker, **failure)
            old = job.failures.order_by("-pk")[STORED_FAILURES:]
            job.failures.filter(pk__in=old.values("pk")).delete()
    return changed


def locking(rows):
    """Return these rows, without those that another transaction has locked. A query of them locks them."""
    return rows.filter(IDLE_TIMEOUT).select_for_update(skip_locked=True)


def skip_locked(rows):
    """Lock these rows, except those that another transaction has locked, and return them."""
    keys = locking(rows).values_list("pk", flat=True)
    return rows.model.objects.filter(pk__in=list(keys))


def retention_end():
    """Return the time before which a job or a batch must have ended to be deleted."""
    return Now() - timedelta(days=conf.RETENTION_DAYS)


def open_again(pk):
    """Open this batch, because one of its jobs runs again in this transaction. Returns 0 if it is old.

    Call it before the job is changed: batches.end() also locks the batch first, and then reads its jobs. A batch that
    ended more than RETENTION_DAYS ago does not open again, because the purge may be deleting its jobs.
    """
    rows = Batch.objects.filter(pk=pk).exclude(ended_at__lt=retention_end())
    return rows.update(state="open", error="", counts={}, ended_at=None)


@prepared(time_limit=DurationField(), lease=DurationField())
def claim(id, run_token, worker, retries, crashes, time_limit, lease):
    """The UPDATE that gives a queued job to the run with this token.

    It changes no row if the job is no longer queued, is blocked or paused, or if it has crashed or was retried
    since its message, which has `retries` and `crashes`, was sent. `time_limit` is the time until the deadline,
    and `lease` the length of the first lease. If PostgreSQL crashes within the next second, the claim may be lost, and
    with it the run: another one starts.
    """
    # An old message may arrive when the job is blocked: then it has no sweep_at.
    may_start = Q(run_token=None, sweep_at__isnull=False) & ~is_paused()
    # Q(run_token=run_token): this UPDATE was sent before and committed, but its answer was lost.
    claimable = may_start | Q(run_token=run_token)
    is_current = Q(retries=retries, crashes=crashes)
    rows = Job.objects.filter(claimable, UNFINISHED, is_current, pk=id)
    return rows.filter(LOCK_TIMEOUT, IDLE_TIMEOUT, ASYNC_CLAIM), {
        "state": "running",
        "run_token": run_token,
        "unique_key": Case(When(unique_until_start=False, then="unique_key")),
        "worker": worker,
        "progress": PROGRESS,
        "message": "",
        "public_error": "",
        "started_at": Clock(),
        "deadline": Clock() + time_limit,
        "sweep_at": Clock() + lease,
    }


@prepared()
def succeed(id, run_token, result, message):
    """The UPDATE that writes the result of a run, if the run still owns the job."""
    rows = Job.objects.filter(UNFINISHED, LOCK_TIMEOUT, IDLE_TIMEOUT, pk=id, run_token=run_token)
    final = {"state": "succeeded", "run_token": None, "sweep_at": None, "finished_at": Now()}
    return rows, {**final, "progress": 100, "result": result, "message": message}


def lease_end():
    """Return the end of a lease that is renewed now.

    After the deadline, it is `started_at`, a mark for recover(): the process is alive, but the run is over its time
    limit. No other lease ends at its `started_at`.
    """
    end = Clock() + timedelta(seconds=conf.LEASE_SECONDS)
    return Case(When(deadline__lte=Clock(), then="started_at"), default=end)
