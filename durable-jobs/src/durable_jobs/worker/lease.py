"""Leases: the lease of a running job says that its worker is alive. When it lapses, the job is recovered.

In each process, one thread renews the leases of all runs, and writes what their functions report. The
main process of a prefork worker also renews the leases of its children, and a report() with a cursor
renews the lease of its job.
"""

import logging
import random

from celery.exceptions import TimeLimitExceeded, WorkerLostError
from django.db import close_old_connections, transaction
from django.db.models import Q

from durable_jobs import admission, conf, hooks, transitions
from durable_jobs.database import Now, locking, skip_locked
from durable_jobs.exceptions import OVER_TIME_LIMIT
from durable_jobs.messages import MESSAGE_FIELDS
from durable_jobs.models import Job
from durable_jobs.pools import pool
from durable_jobs.process import process
from durable_jobs.worker.runs import jobs_of

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # seconds between two checks of reports, leases and dead children
STOPPED = "The worker running this job stopped unexpectedly"  # for owners: its worker died
RECOVERY_DELAY = 5  # seconds until the job of a dead worker starts again; doubles up to 43 minutes


def start_thread():
    """Start the thread at the first run, not earlier: a forked child has no threads of its parent."""
    with process.lock:
        if not process.renews_leases:
            pool.start_thread(renew_leases)
            process.renews_leases = True


def renew_leases():
    """Write reports every POLL_SECONDS, and renew each lease when a third of it has passed. Never returns."""
    while True:
        pool.sleep(POLL_SECONDS)
        with process.lock:
            current = list(process.runs.values())
        try:
            close_old_connections()
            if to_write := [run for run in current if run.needs_write()]:
                write_and_renew(to_write)
        except Exception as error:  # without this thread all leases would lapse
            logger.warning("cannot renew leases: %r", error)


def write_and_renew(to_write):
    """Write what these runs reported, renew their leases, and find out which runs have lost their job.

    A cancelled job with a limit has a lease, too: it keeps its slot until its function ends. Skip locked rows
    until the next call: waiting for one would let all other leases lapse.
    """
    reports = {run: run.report for run in to_write}
    with transaction.atomic():
        rows = locking(jobs_of(to_write))
        ended_at = dict(rows.values_list("run_token", "finished_at"))  # a time if it is cancelled
        ours = [run for run in to_write if run.token in ended_at]
        reported = [run for run in ours if reports[run] and not ended_at[run.token]]
        others = set(ours) - set(reported)  # without a report, or cancelled: renew only the lease
        transitions.renew(jobs_of(others))
        transitions.renew_and_report({run.job_id: reports[run] for run in reported})
    for run in ours:
        run.stored_report, run.lost = reports[run], bool(ended_at[run.token])
        run.plan_renewal()
    if len(ours) < len(to_write):
        # Read again, without locks: the other rows are locked by others, or belong to other runs now.
        tokens = set(jobs_of(to_write).values_list("run_token", flat=True))
        for run in to_write:
            if run.token not in tokens:
                run.lost = True
                run.plan_renewal()


@transaction.atomic
def renew(jobs):
    """Renew the leases of these jobs. Skip locked rows."""
    transitions.renew(skip_locked(jobs))


@transaction.atomic
def recover(jobs, are_late=False):
    """Queue the jobs of dead workers again, or fail them. Free the slots of cancelled ones. Skip locked rows.

    A job over its time limit fails, whatever its `crashes`. There are two signs: its worker has written so, see
    transitions.renewed(), or Celery killed the child (`are_late`). A child whose lease had lapsed has crashed: it was
    frozen, or dead, before its limit.
    """
    late, keys = Q(is_late=True), set()
    if are_late:
        late |= Q(lease_ends_at__gt=Now())
    fields = ["state", *MESSAGE_FIELDS]
    for job in locking(jobs).only(*fields).annotate(late=late):
        crashes = job.crashes + 1
        keys |= {job.limit_key} - {None}
        died = {"error": "Its worker died", "exception": "celery.exceptions.WorkerLostError"}
        if job.state == "cancelled":  # its function has ended or is late: free its slot
            transitions.release_slots(Job.objects.filter(pk=job.pk))
        elif job.late:
            over = {"error": OVER_TIME_LIMIT, "exception": "celery.exceptions.TimeLimitExceeded"}
            fail(job, TimeLimitExceeded, over, OVER_TIME_LIMIT)
        elif crashes >= conf.MAX_CRASHES:
            public_error = f"{STOPPED} {crashes} times"
            error = f"Its worker died {crashes} times"
            fail(job, WorkerLostError, died, error, public_error, crashes=crashes)
        else:
            delay = RECOVERY_DELAY * 2 ** min(job.crashes, 9) * random.uniform(0.8, 1.2)
            row = Job.objects.filter(pk=job.pk)
            transitions.recover(row, died, delay, crashes=crashes, public_error=STOPPED)
            hooks.after_commit(hooks.retried, job, WorkerLostError(died["error"]))
            text = "job %s lost its worker and will start again in %.0f s"
            logger.warning(text, job.pk, delay)
    admission.admit_after_commit(keys)


def fail(job, exception, failure, error, public_error="", **changes):
    texts = {"error": error, "public_error": public_error or error}
    transitions.fail(Job.objects.filter(pk=job.pk), failure, **texts, **changes)
    hooks.after_commit(hooks.failed, job, exception(error))
    logger.error("job %s failed: %s", job.pk, error)
