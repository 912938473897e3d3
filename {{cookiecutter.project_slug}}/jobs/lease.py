"""Leases: the lease of a running job says that its worker is alive. When it lapses, the job is recovered.

In each process, one thread renews the leases of all runs, and writes what their bodies report. The
main process of a prefork worker also renews the leases of its children, and a report() with a cursor
renews the lease of its job.
"""

import logging
import random
import time
import uuid

from django.conf import settings
from django.db import close_old_connections, transaction
from django.db.models import Q
from django.db.models.functions import Now

from .database import store_outcome
from .models import OVER_TIME_LIMIT, Job, LockTimeout, lease_end
from .pools import pool

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # seconds between two checks of reports, leases and dead children
FLUSH_SECONDS = 1  # by then a claim is on disk: by default PostgreSQL writes it within 0.6 s
RECOVERY_DELAY = 5  # seconds until the job of a dead worker starts again; doubles up to 43 minutes

runs = {}  # {token: Run} of the bodies that run in this process
suspect = None  # the Run of this process whose job fails at its next crash: see become_suspect()
lease_thread_started = False
lock = pool.Lock()


class JobLost(BaseException):
    """Ends a body whose job was cancelled or given to a newer run."""


class WorkerStopping(BaseException):
    """Ends a body that has stored a cursor, because its worker is shutting down."""


class Run:
    """One run of a job. It owns the job as long as `Job.run_token` is its token.

    Use it as a context manager: the lease is renewed inside the block.
    """

    def __init__(self, job_id, token=None, task=None):
        self.task = task
        self.job_id = job_id
        self.token = token or uuid.uuid4()
        self.report = self.written = {}  # progress in percent, message
        self.cursor = []  # empty until it is read, then [cursor]
        self.claim = None  # a function that claims the job, and can be called again
        self.in_body = False
        # The first renewal finds out whether a crash of PostgreSQL has lost the claim.
        self.renew_at = time.monotonic() + FLUSH_SECONDS
        self.retry = None  # after retry(): options of requeue()
        # Why it is retried: the fields of a Failure.
        self.failure = {
            "error": "The task requested another try",
            "exception": "celery.exceptions.Retry",
        }
        self.lost = self.ended = False
        start_lease_thread()

    @property
    def row(self):
        return jobs_of([self])

    @property
    def row_with_lock_timeout(self):
        """The row, to store how the body ended. An UPDATE that waits too long for a lock is tried again."""
        return self.row.filter(LockTimeout())

    def needs_write(self):
        return not self.lost and (self.report != self.written or time.monotonic() > self.renew_at)

    def become_suspect(self):
        """Become the suspect of this process, unless there is one. Returns whether it did.

        The job of a suspect fails if its process dies. A process has only one suspect, so that its
        death makes at most one job fail.
        """
        global suspect
        with lock:
            if suspect is None or suspect.lost or suspect.ended:
                suspect = self
            return suspect is self

    def store(self, update, *args, **kwargs):
        """Store how the body ended. Returns 0 if the run has lost its job.

        If the database has lost the claim in a crash, the job is claimed again and the update repeated.
        """
        written = store_outcome(update, *args, **kwargs)
        if written or not store_outcome(self.claim):
            return written
        return store_outcome(update, *args, **kwargs)

    def __enter__(self):
        with lock:
            runs[self.token] = self

    def __exit__(self, *exc_info):
        with lock:
            del runs[self.token]


def jobs_of(runs):
    return Job.objects.filter(
        pk__in=[r.job_id for r in runs], run_token__in=[r.token for r in runs]
    )


def start_lease_thread():
    """Start the thread at the first run, not earlier: a forked child has no threads of its parent."""
    global lease_thread_started
    with lock:
        if not lease_thread_started:
            pool.start_thread(renew_leases)
            lease_thread_started = True


def renew_leases():
    """Write reports every POLL_SECONDS, and renew each lease when a third of it has passed. Never returns."""
    while True:
        time.sleep(POLL_SECONDS)
        with lock:
            current = list(runs.values())
        try:
            close_old_connections()
            if to_write := [run for run in current if run.needs_write()]:
                write_and_renew(to_write)
        except Exception as error:  # without this thread all leases would lapse
            logger.warning("cannot renew leases: %r", error)


def write_and_renew(to_write):
    """Write what these runs reported, renew their leases, and find out which runs have lost their job.

    Skip locked rows until the next call: waiting for one would let all other leases lapse.
    """
    reports = {run: run.report for run in to_write}
    with transaction.atomic():
        rows = jobs_of(to_write).select_for_update(skip_locked=True)
        tokens = set(rows.values_list("run_token", flat=True))
        written = [run for run in to_write if run.token in tokens]
        silent = [run for run in written if not reports[run]]  # these keep progress and message
        jobs_of(silent).update(sweep_at=lease_end())
        reported = [run for run in written if reports[run]]
        jobs = [Job(pk=run.job_id, sweep_at=lease_end(), **reports[run]) for run in reported]
        Job.objects.bulk_update(jobs, ["progress", "message", "sweep_at"])
    for run in written:
        run.written, run.renew_at = reports[run], time.monotonic() + settings.JOB_LEASE_SECONDS / 3
    if len(written) < len(to_write):
        # Read again, without locks. If a crash of the database has lost a claim, claim the job again.
        tokens = set(jobs_of(to_write).values_list("run_token", flat=True))
        for run in to_write:
            if run.token not in tokens:
                run.lost = not (run.in_body and run.claim())


@transaction.atomic
def renew_for_children(jobs):
    """Renew the leases of these jobs, which run in child processes. Skip locked rows."""
    jobs.skip_locked().update(sweep_at=lease_end())


@transaction.atomic
def recover(jobs):
    """Queue the jobs of dead workers again, or fail them. Skip locked rows.

    A job past its deadline fails, however many crashes it has: Celery killed its child process, or its
    thread never ended.
    """
    late = Q(deadline__lte=Now())
    for job in jobs.select_for_update(skip_locked=True).only("crashes").annotate(late=late):
        row, crashes = Job.objects.filter(pk=job.pk), job.crashes + 1
        died = {"error": "Its worker died", "exception": "celery.exceptions.WorkerLostError"}
        if job.late:
            over = {"error": OVER_TIME_LIMIT, "exception": "celery.exceptions.TimeLimitExceeded"}
            row.finish("failed", failure=over, error=OVER_TIME_LIMIT, public_error=OVER_TIME_LIMIT)
        elif crashes >= settings.JOB_MAX_CRASHES:
            error = f"Its worker died {crashes} times"
            row.finish("failed", failure=died, error=error, public_error=error, crashes=crashes)
        else:
            delay = RECOVERY_DELAY * 2 ** min(job.crashes, 9) * random.uniform(0.8, 1.2)
            message = "Its worker died, so it starts again soon"
            row.requeue(delay, failure=died, message=message, crashes=crashes)
            logger.warning("job %s lost its worker and starts again in %.0f s", job.pk, delay)
