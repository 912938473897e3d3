"""The settings of jobs. `conf.JOB_LEASE_SECONDS` is the project's setting, or else the default."""

from django.conf import settings

DEFAULTS = {
    "JOB_LEASE_SECONDS": 30,  # a worker that is silent for this time counts as dead
    "JOB_SWEEP_SECONDS": 5,  # between two sweeps
    "JOB_RESEND_SECONDS": 30,  # until a message counts as missing
    "JOB_MAX_CRASHES": 3,  # a job fails when its worker has died this many times
    "JOB_RETENTION_DAYS": 30,  # until a job that has ended is deleted
    "JOB_MAX_BYTES": 16_000_000,  # of a job's arguments as JSON
    "JOB_LIMITS": {},  # {name: limit}, see limits.py
    "JOB_VERSION": "",  # of the code, which the page "Workers" shows
}


def __getattr__(name):
    if name not in DEFAULTS:
        raise AttributeError(name)
    return getattr(settings, name, DEFAULTS[name])
