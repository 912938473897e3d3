"""The settings: `conf.LEASE_SECONDS` is DURABLE_JOBS["LEASE_SECONDS"], or else the default."""

from django.conf import settings

CONSUMER = "durable_jobs.worker.consumer:Consumer"  # the default of Celery's worker_consumer
DEFAULTS = {
    "LEASE_SECONDS": 30,  # a worker that does not respond for this time counts as dead
    "SWEEP_SECONDS": 5,  # between two sweeps
    "RESEND_SECONDS": 30,  # until a message counts as missing
    "MAX_CRASHES": 3,  # a job fails when its worker has died this many times
    "RETENTION_DAYS": 30,  # until a job that has ended is deleted
    "LIMITS": {},  # {name: limit}, see limits.py
    "SET_CONFIG": True,  # whether transactions call set_config(), see database.py
    "VERSION": "",  # of the code, which the page "Workers" shows
}


def __getattr__(name):
    if name not in DEFAULTS:
        raise AttributeError(name)
    return getattr(settings, "DURABLE_JOBS", {}).get(name, DEFAULTS[name])
