"""The states of a job, and what they mean for its row."""

from django.db.models import Q

from durable_jobs.database import Now

ACTIVE = ["queued", "running"]
FINAL = ["succeeded", "failed", "cancelled"]
# A constraint keeps these fields and the state consistent.
UNFINISHED = Q(finished_at=None)
QUEUED = Q(run_token=None) & UNFINISHED  # or blocked
ADMITTED = Q(send_at__isnull=False)  # queued, and not blocked
LEASED = Q(lease_ends_at__isnull=False)  # running, or STILL_RUNNING
HAS_SLOT = Q(limit_key__isnull=False) & (ADMITTED | LEASED)
# Its message was sent, or is being sent, since it was last queued: times_sent is counted first.
SENT = QUEUED & Q(times_sent__gt=0)
RUNNING = Q(state="running", lease_ends_at__gt=Now())
STALLED = Q(state="running", lease_ends_at__lte=Now())  # its worker does not respond, or it is late
STILL_RUNNING = Q(LEASED, state="cancelled")  # a job with a limit, see admission.py
