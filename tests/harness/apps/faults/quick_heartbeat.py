"""For celery -A: the project, with a worker whose heartbeat comes each second."""

from celery import signals
from config.celery import app  # noqa: F401


@signals.worker_init.connect
def hurry(**kwargs):
    from durable_jobs.worker import heartbeat  # not earlier: Django's models are loaded now

    heartbeat.BEAT_SECONDS = 1
