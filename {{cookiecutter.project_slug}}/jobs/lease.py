"""Leases: a running job's lease says that its worker is alive. Without one, the job is recovered.

In each process, one thread renews the leases of all runs, and writes what their bodies report.
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

runs = {}  # token: Run, of the bodies that run in this process
last_try = None  # the Run of this process whose job gets no other try
keeper_runs = False
lock = pool.Lock()


class Lost(BaseException):
    """Ends a body whose job was cancelled, or was given to a newer run."""


class Run:
    """One run of a job. The job is its own as long as the row has its token.

    A context manager: the lease is renewed inside.
    """

    def __init__(self, job_id, token=None):
        self.job_id = job_id
        self.token = token or uuid.uuid4()
        self.report = self.written = {}  # progress in percent, message
        self.cursor = []  # empty until it was read, then [cursor]
        self.renew_at = time.monotonic() + settings.JOB_LEASE_SECONDS / 3
        self.retry = None  # what retry() asked for: options of requeue()
        self.failure = {"error": "Another try was asked for"}  # why: fields of an Attempt
        self.lost = self.ended = False
        start_keeper()

    @property
    def row(self):
        return rows([self])

    def is_due(self):
        return not self.lost and (self.report != self.written or time.monotonic() > self.renew_at)

    def takes_last_try(self):
        """Return whether this is the only run of this process whose job gets no other try.

        If the process dies, then there is one job to blame.
        """
        global last_try
        with lock:
            if last_try is None or last_try.lost or last_try.ended:
                last_try = self
            return last_try is self

    def __enter__(self):
        with lock:
            runs[self.token] = self

    def __exit__(self, *exc_info):
        with lock:
            del runs[self.token]


def rows(runs):
    return Job.objects.filter(pk__in=[r.job_id for r in runs], run__in=[r.token for r in runs])


def start_keeper():
    """Start the thread once, at the first run: a thread does not survive the fork of a child."""
    global keeper_runs
    with lock:
        if not keeper_runs:
            pool.start_thread(keep)
            keeper_runs = True


def keep():
    """Write reports at every tick, and renew each lease three times in its length. Never ends."""
    while True:
        time.sleep(TICK)
        with lock:
            current = list(runs.values())
        try:
            close_old_connections()
            if due := [run for run in current if run.is_due()]:
                write(due)
        except Exception as error:  # without this thread all leases would lapse
            logger.warning("cannot renew leases: %r", error)


def write(due):
    """Write what these runs reported, renew their leases, and find out which ones lost their job.

    Locked rows wait for the next tick, for while one is waited for, all other leases would lapse.
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
    """Renew the leases of these jobs, which run in other processes. Skip locked rows."""
    unlocked = jobs.select_for_update(skip_locked=True).values_list("pk", flat=True)
    Job.objects.filter(pk__in=list(unlocked)).update(wake_at=lease())


@transaction.atomic
def recover(jobs):
    """Queue these jobs again, whose workers are dead, or end them. Skip locked rows."""
    late = Q(deadline__lte=Now())
    for job in jobs.select_for_update(skip_locked=True).only("crashes").annotate(late=late):
        row, crashes = Job.objects.filter(pk=job.pk), job.crashes + 1
        died = {"attempt": {"error": "Its worker died"}, "crashes": crashes}
        if job.late:
            row.finish("failed", attempt={"error": OVER_TIME_LIMIT}, error=OVER_TIME_LIMIT)
        elif crashes >= settings.JOB_MAX_CRASHES:
            row.finish("failed", error=f"Its worker died {crashes} times", **died)
        else:
            delay = 5 * 2**job.crashes * random.uniform(0.8, 1.2)
            row.requeue(delay, message="Its worker died, so it starts again soon", **died)
            logger.warning("job %s lost its worker: again in %.0f s", job.pk, delay)
