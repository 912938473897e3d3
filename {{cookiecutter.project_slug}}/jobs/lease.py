{% from "chosen.jinja" import worker_pool with context %}
"""The jobs that this process runs: one thread renews their leases and writes what they report."""

{% print worker_pool.lease_imports %}
from django.conf import settings
from django.db import close_old_connections

from .models import Job

logger = logging.getLogger(__name__)

TICK = 0.5  # seconds between two writes of what bodies reported

runs = {}  # token: Run
keeper = None
{% print worker_pool.lease_lock %}


class Lost(BaseException):
    """Ends a body whose run is no longer its job's: cancelled, or fenced by a newer run."""


class Run:
    """One run of a job, which holds the job for as long as its token stands in the row.

    A context manager: inside, the lease is renewed.
    """

    def __init__(self, job_id):
        self.job_id = job_id
        self.token = uuid.uuid4()
        self.report = self.written = {}  # progress in percent, message
        self.lost = False

    @property
    def row(self):
        return rows([self])

    def __enter__(self):
        global keeper
        with lock:
            runs[self.token] = self
{% print worker_pool.lease_start %}

    def __exit__(self, *exc_info):
        with lock:
            del runs[self.token]


def rows(runs):
    return Job.objects.filter(pk__in=[r.job_id for r in runs], run__in=[r.token for r in runs])


def keep():
    """Write reports at every tick and renew all leases three times in their length; for ever."""
    renew_at = time.monotonic() + settings.JOB_LEASE_SECONDS / 3
    while True:
        time.sleep(TICK)
        with lock:
            current = list(runs.values())
        try:
            write_reports([run for run in current if run.report != run.written])
            if time.monotonic() >= renew_at:
                close_old_connections()
                find_lost(current, held=rows(current).renew())
                renew_at = time.monotonic() + settings.JOB_LEASE_SECONDS / 3
        except Exception as error:  # whatever it is: without this thread all leases would lapse
            logger.warning("cannot renew leases: %r", error)
            close_old_connections()


def write_reports(reporting):
    reports = [(run, run.report) for run in reporting]
    jobs = [Job(pk=run.job_id, **report) for run, report in reports]
    if jobs:
        find_lost(reporting, held=rows(reporting).bulk_update(jobs, ["progress", "message"]))
    for run, report in reports:
        run.written = report


def find_lost(candidates, held):
    """Mark the runs that the database no longer knows; `held` is how many it does know."""
    if held < len(candidates):
        tokens = set(rows(candidates).values_list("run", flat=True))
        for run in candidates:
            run.lost = run.token not in tokens
{% print worker_pool.lease_end | default %}
