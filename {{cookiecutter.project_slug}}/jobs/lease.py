"""Leases: what says that a run's worker lives, and what happens to a job whose worker does not.

One thread of each process renews the leases of its runs and writes what their bodies report.
"""

import logging
import random
import time
import uuid

from django.conf import settings
from django.db import close_old_connections, transaction
from django.db.models import Q
from django.db.models.functions import Now

from .models import OVER_TIME_LIMIT, Job, lease
from .pools import pool

logger = logging.getLogger(__name__)

TICK = 0.5  # seconds between two writes of what bodies reported

runs = {}  # token: Run
suspect = None  # the run that has the last try of its job
keeper_runs = False
lock = pool.Lock()


class Lost(BaseException):
    """Ends a body whose run is no longer its job's: cancelled, or fenced by a newer run."""


class Run:
    """One run of a job, which holds the job for as long as its token stands in the row.

    A context manager: inside, the lease is renewed.
    """

    def __init__(self, job_id, token=None):
        self.job_id = job_id
        self.token = token or uuid.uuid4()
        self.report = self.written = {}  # progress in percent, message
        self.cursor = []  # it alone, once it is read
        self.renew_at = time.monotonic() + settings.JOB_LEASE_SECONDS / 3
        self.retry = None  # what retry() wants
        self.cause = "Another try was asked for", ""  # of the retry: its error, its traceback
        self.lost = self.ended = False
        start_keeper()

    @property
    def row(self):
        return rows([self])

    def is_due(self):
        return not self.lost and (self.report != self.written or time.monotonic() > self.renew_at)

    def is_only_suspect(self):
        """Return whether no other job of this process has its last try; if so this one has."""
        global suspect
        with lock:
            if suspect is None or suspect.lost or suspect.ended:
                suspect = self
            return suspect is self

    def __enter__(self):
        with lock:
            runs[self.token] = self

    def __exit__(self, *exc_info):
        with lock:
            del runs[self.token]


def rows(runs):
    return Job.objects.filter(pk__in=[r.job_id for r in runs], run__in=[r.token for r in runs])


def start_keeper():
    """Start the thread, once. Not when this is imported: no thread survives the fork of a child."""
    global keeper_runs
    with lock:
        if not keeper_runs:
            pool.start_thread(keep)
            keeper_runs = True


def keep():
    """Write reports at every tick and renew each lease three times in its length; for ever."""
    while True:
        time.sleep(TICK)
        with lock:
            current = list(runs.values())
        try:
            close_old_connections()
            if due := [run for run in current if run.is_due()]:
                write(due)
        except Exception as error:  # whatever it is: without this thread all leases would lapse
            logger.warning("cannot renew leases: %r", error)


def write(due):
    """Write what these runs reported, and renew their leases. Finds out who has lost its job.

    Locked rows are left to the next tick: who waits for one lets all other leases lapse.
    """
    reports = {run: run.report for run in due}
    with transaction.atomic():
        unlocked = rows(due).select_for_update(skip_locked=True)
        held = set(unlocked.values_list("run", flat=True))
        written = [run for run in due if run.token in held]
        jobs = [Job(pk=run.job_id, wake_at=lease(), **reports[run]) for run in written]
        Job.objects.bulk_update(jobs, ["progress", "message", "wake_at"])
    for run in written:
        run.written, run.renew_at = reports[run], time.monotonic() + settings.JOB_LEASE_SECONDS / 3
    if len(held) < len(due):
        held = set(rows(due).values_list("run", flat=True))
        for run in due:
            run.lost = run.token not in held


@transaction.atomic
def renew(jobs):
    """Renew the leases of these jobs, of runs in other processes. Locked rows are left alone."""
    unlocked = jobs.select_for_update(skip_locked=True).values_list("pk", flat=True)
    Job.objects.filter(pk__in=list(unlocked)).update(wake_at=lease())


@transaction.atomic
def judge(jobs):
    """End or queue again these jobs, whose workers are dead. Locked rows are left alone."""
    late = Q(deadline__lte=Now())
    for job in jobs.select_for_update(skip_locked=True).only("crashes").annotate(late=late):
        row, crashes = Job.objects.filter(pk=job.pk), job.crashes + 1
        error = OVER_TIME_LIMIT if job.late else "Its worker died"
        attempts = row.attempts_with(error)
        died = {"crashes": crashes, "attempts": attempts}
        if job.late:
            row.finish("failed", error=error, attempts=attempts)
        elif crashes >= settings.JOB_MAX_CRASHES:
            row.finish("failed", error=f"Its worker died {crashes} times", **died)
        else:
            delay = 5 * 2**job.crashes * random.uniform(0.8, 1.2)
            row.requeue(delay, message="Its worker died, so it starts again soon", **died)
            logger.warning("job %s lost its worker: again in %.0f s", job.pk, delay)
