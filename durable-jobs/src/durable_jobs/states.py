"""The states of a job, and what they mean for its row."""

from django.db.models import F, Q

from durable_jobs.database import Now

ACTIVE = ["queued", "running"]
FINAL = ["succeeded", "failed", "cancelled"]
# In an UPDATE by ids, use UNFINISHED and QUEUED instead of state=…. With state=… and old statistics, PostgreSQL may
# choose the index `durable_jobs_job_active` and read the whole backlog to find one row. STILL_RUNNING may use that
# index: few cancelled jobs have a sweep_at. A constraint keeps these fields and the state consistent.
UNFINISHED = Q(finished_at=None)
HAS_SLOT = Q(limit_key__isnull=False, sweep_at__isnull=False)
QUEUED = Q(run_token=None) & UNFINISHED
# Its message was sent, or is being sent, since it was last queued: times_sent is counted first.
SENT = QUEUED & Q(times_sent__gt=0)
RUNNING = Q(state="running", sweep_at__gt=Now())  # its lease has not lapsed
PAST_DEADLINE = Q(sweep_at=F("started_at"))  # see transitions.lease_end()
STALLED = Q(state="running", sweep_at__lte=Now())  # its lease has lapsed, or it is PAST_DEADLINE
STILL_RUNNING = Q(state="cancelled", sweep_at__isnull=False)  # jobs with a limit, see admission.py
