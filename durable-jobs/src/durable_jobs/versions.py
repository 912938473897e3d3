"""Which parts are on: they make jobs faster. Jobs are safe without them."""

from functools import partial

from celery_steady import versions

NEWEST = versions.NEWEST  # of Celery and kombu
SINCE = {  # part: the first version that it fits
    "fast recovery of child processes": ("celery", (5, 5)),
    "batched confirms from RabbitMQ": ("kombu", (5, 7)),
    "Redis without copies": ("kombu", (5, 5)),
}
fits = partial(versions.fits, since=SINCE)
log_what_is_off = partial(versions.log_what_is_off, "durable-jobs", SINCE)
