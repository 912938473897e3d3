"""Every write to a job's row: whoever reads this module knows what can happen to a job.

    new → blocked ⇄ queued ⇄ running → succeeded, failed or cancelled → queued

Each write is conditional, so of two processes that try, only one changes the row; a function returns how many rows were
changed. The last line of its docstring says from which states it leads to which, and which modules call it.
`jobs` is always a queryset of jobs.
A *blocked* job has the state "queued", too: see admission.py. Rows are deleted by beat/purge.py and drill.py.
"""

from datetime import datetime, timedelta
from uuid import uuid4

from django.db import transaction
from django.db.models import Case, DurationField, F, Q, When
from django.db.models.functions import Greatest

from durable_jobs import compiler, conf
from durable_jobs.compiler import prepared
from durable_jobs.database import (
    ASYNC_CLAIM,
    IDLE_TIMEOUT,
    LOCK_TIMEOUT,
    Clock,
    Now,
    skip_locked,
)
from durable_jobs.models import Batch, Job
from durable_jobs.pauses import is_paused
from durable_jobs.states import ADMITTED, QUEUED, SENT, STILL_RUNNING, UNFINISHED

MAX_RESEND_SECONDS = 3600  # between two messages of a job
STORED_FAILURES = 20  # of each job: the latest ones
UNSUCCESSFUL = ["failed", "cancelled"]
NEXT_RUN = {"state": "queued", "run_token": None, "lease_ends_at": None, "times_sent": 0}
# When a job starts (again)
PROGRESS = Case(When(cursor__isnull=False, then="progress"), default=0)
# The task function of a cancelled job with a limit may still run: then it has a lease.
CAN_RUN_AGAIN = Q(state__in=UNSUCCESSFUL, lease_ends_at=None)


# A new job


def store(job):
    """INSERT this job. Returns whether it is stored: see compiler.insert().

    new → queued or blocked: enqueue
    """
    return compiler.insert(job)


def store_many(jobs):
    """INSERT these jobs, all of them or none.

    new → queued or blocked: enqueue
    """
    return compiler.insert_many(jobs)


# Its message


def count_message(due):
    """Count one more message for these jobs, and set when the next one is due. Skip locked rows. Returns their ids.

    queued → queued: beat.republish
    """
    with transaction.atomic():
        jobs = list(due.select_for_update(skip_locked=True).values_list("pk", "times_sent"))
        for before in {times_sent for _, times_sent in jobs}:
            wait = min(conf.RESEND_SECONDS * 2 ** min(before, 20), MAX_RESEND_SECONDS)
            pks = [pk for pk, times_sent in jobs if times_sent == before]
            rows = Job.objects.filter(pk__in=pks)
            rows.update(times_sent=before + 1, send_at=Now() + timedelta(seconds=wait))
    return [pk for pk, _ in jobs]


@transaction.atomic
def take_back(ids):
    """Let the sweeper send these messages, which could not be sent. Skip locked rows: they are due later anyway.

    queued → queued: publish, beat.republish
    """
    # Without those whose message arrived in spite of the error.
    return send_again(skip_locked(Job.objects.filter(SENT, pk__in=ids)), 0)


def send_again(jobs, seconds):
    """Let the sweeper send a new message in so many seconds: a worker or the broker has refused the last one.

    The job keeps its due_at, and its slot. It changes nothing if the job was queued again since its message was sent.

    queued → queued: beat.republish, worker.execution
    """
    return jobs.filter(SENT).update(times_sent=0, send_at=Now() + timedelta(seconds=seconds))


def put_back(jobs):
    """Put back those of these jobs that are paused: they lose slot and message.

    Those without a limit stay due, so the sweeper sends them when the pause has ended.

    queued → queued or, with a limit, blocked: admission, worker.runs
    """
    # Jobs of one insert_many() have the same due_at, but their created_at differ: the later time keeps the order.
    send_at = Case(When(limit_key=None, then=Greatest("due_at", "created_at")))
    changes = {"blocked_by": F("limit_key"), "send_at": send_at, "times_sent": 0}
    return jobs.filter(QUEUED, is_paused()).update(**changes)


# Its slot


@prepared(seconds=DurationField())
def admit(id, seconds):
    """Give this job a slot. The caller has locked its row, and sends its message; the next one is due in `seconds`.

    blocked → queued: admission
    """
    changes = {"blocked_by": None, "times_sent": 1, "send_at": Now() + seconds}
    return Job.objects.filter(pk=id), changes


def admit_all(jobs):
    """Admit all of these jobs, whatever their limits allow.

    blocked → queued: eager
    """
    return jobs.filter(blocked_by__isnull=False).update(blocked_by=None, send_at=Now())


def release_slots(jobs):
    """Free the slots of cancelled jobs whose functions have ended, or are over their time limit.

    cancelled → cancelled: admission, worker.lease
    """
    return jobs.filter(STILL_RUNNING).update(run_token=None, lease_ends_at=None)


# Its run


@prepared(time_limit=DurationField(), lease=DurationField())
def claim(id, run_token, worker, retries, crashes, time_limit, lease):
    """Give a queued job to the run with this token.

    It changes no row if the job is no longer queued, is blocked or paused, or if it has crashed or was retried
    since its message, which has `retries` and `crashes`, was sent. `time_limit` is the time until the deadline,
    and `lease` the length of the first lease. If PostgreSQL crashes within the next second, the claim may be lost, and
    with it the run: another one starts.

    queued → running: admission
    """
    # An old message may arrive when the job is blocked: then it is not ADMITTED.
    may_start = Q(ADMITTED, run_token=None) & ~is_paused()
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
        "send_at": None,
        "lease_ends_at": Clock() + lease,
        "is_late": False,
    }


def report(jobs, **changes):
    """Store what the function of this run reports, such as its cursor, and renew the lease. Returns 0 if it lost its job.

    running → running: worker.runs
    """
    return jobs.update(**changes, **renewed())


def renew(jobs):
    """Renew the leases of these jobs. The caller has locked the rows.

    running → running, cancelled → cancelled: worker.lease
    """
    return jobs.update(**renewed())


def renew_and_report(reports):
    """Renew the leases of these jobs, and store {id: the latest progress and message}.

    running → running: worker.lease
    """
    jobs = [Job(pk=pk, **renewed(), **report) for pk, report in reports.items()]
    return Job.objects.bulk_update(jobs, ["progress", "message", *renewed()])


def renewed():
    """Return the fields of a lease that is renewed now.

    After the deadline it ends immediately, for recover(): the process is alive, but the run is over its time limit.
    """
    is_late, end = Q(deadline__lte=Clock()), Clock() + timedelta(seconds=conf.LEASE_SECONDS)
    return {
        "lease_ends_at": Case(When(is_late, then=Clock()), default=end),
        "is_late": Case(When(is_late, then=True), default=False),
    }


def wait_until_writable():
    """Wait while another transaction locks the whole table, as CREATE INDEX does. This is an UPDATE of no row.

    Meanwhile, rows can be read, but no lease can be renewed.

    queued → queued: beat.sweeper
    """
    Job.objects.filter(pk=uuid4()).update(crashes=0)


# The end of its run


@prepared()
def succeed(id, run_token, result, message):
    """Write the result of a run, if the run still owns the job.

    running → succeeded: batches
    """
    rows = Job.objects.filter(UNFINISHED, LOCK_TIMEOUT, IDLE_TIMEOUT, pk=id, run_token=run_token)
    final = {"state": "succeeded", "run_token": None, "lease_ends_at": None, "finished_at": Now()}
    return rows, {**final, "progress": 100, "result": result, "message": message}


def fail(jobs, failure=None, **changes):
    """Write that these jobs failed, unless they have ended. `failure` has the fields of a Failure: see _update().

    queued, blocked or running → failed: beat.republish, worker.lease, worker.runs
    """
    return _end(jobs, "failed", failure, **changes)


def retry(jobs, failure, delay, **changes):
    """Queue the job of this run again, as retry() said, in `delay` seconds or at the time `delay`.

    running → queued or, with a limit, blocked: worker.runs
    """
    due = delay if isinstance(delay, datetime) else Now() + timedelta(seconds=delay)
    return _queue(jobs, due, failure, **changes)


def recover(jobs, failure, seconds, **changes):
    """Queue the job of a dead worker again.

    running → queued or, with a limit, blocked: worker.lease
    """
    return _queue(jobs, Now() + timedelta(seconds=seconds), failure, **changes)


def release(jobs):
    """Queue the job of a run for another worker, whose function has ended because this worker stops.

    With a limit it keeps its due_at: hand_over() may admit it in this transaction, and SQLite takes a new due_at for
    later than now until the next millisecond.

    running → queued or, with a limit, blocked: worker.runs
    """
    return _queue(jobs, Now(), due_at=Case(When(limit_key=None, then=Now()), default="due_at"))


def release_before_exit(jobs, seconds, keeping):
    """Queue these jobs for other workers. Their functions run until this process ends, in less than so many seconds.

    Those whose limit_key is in `keeping` keep their slots.

    running → queued or blocked: worker.shutdown
    """
    due = Now() + timedelta(seconds=seconds)
    jobs.filter(limit_key__in=keeping).update(**NEXT_RUN, send_at=due)
    _queue(jobs, due)


# From outside


def cancel(jobs):
    """Cancel these jobs, unless they have ended.

    A job with a limit keeps its slot, and its run the token, until the task function or the lease ends.

    queued, blocked or running → cancelled: actions
    """
    keeps_slot = Q(state="running", limit_key__isnull=False)
    kept = {name: Case(When(keeps_slot, then=name)) for name in ("run_token", "lease_ends_at")}
    return _end(jobs, "cancelled", **kept)


def run_again(jobs, **fields):
    """Queue these jobs again.

    The caller has opened their batches, see open_again(), and sends their messages. `fields` has the new
    limit_key, headers and times.

    failed or cancelled → queued or blocked: actions
    """
    changes = {**fields, "state": "queued", "finished_at": None, "retries": 0, "crashes": 0}
    changes |= {"result": None, "message": "", "error": "", "public_error": ""}
    return jobs.filter(CAN_RUN_AGAIN).update(**changes, progress=PROGRESS)


def open_again(pk):
    """Open this batch, because one of its jobs runs again in this transaction. Returns 0 if it is old.

    Call it before the job is changed: batches.end() also locks the batch first, and then reads its jobs. A batch that
    ended more than RETENTION_DAYS ago does not open again, because the purge may be deleting its jobs.

    failed or cancelled → queued or blocked: actions
    """
    rows = Batch.objects.filter(pk=pk).exclude(ended_at__lt=retention_end())
    return rows.update(state="open", error="", counts={}, ended_at=None)


def retention_end():
    """Return the time before which a job or a batch must have ended to be deleted."""
    return Now() - timedelta(days=conf.RETENTION_DAYS)


# What these have in common


def _queue(jobs, due, failure=None, **changes):
    """Queue running jobs again. One with a limit gives its slot up: it is blocked.

    running → queued or blocked
    """
    fields = {**NEXT_RUN, "due_at": due, "blocked_by": F("limit_key")}
    fields |= {"send_at": Case(When(limit_key=None, then=due)), **changes}
    return _update(jobs.filter(UNFINISHED, run_token__isnull=False), fields, failure)


def _end(jobs, state, failure=None, **changes):
    """Write a final state, unless the job already has one.

    queued, blocked or running → failed or cancelled
    """
    cleared = dict.fromkeys(["run_token", "send_at", "lease_ends_at", "blocked_by"])
    fields = {**cleared, "state": state, "finished_at": Now(), **changes}
    return _update(jobs.filter(UNFINISHED), fields, failure)


def _update(jobs, changes, failure=None):
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
