"""For celery -A: the project. Its worker dies after the end of a job, before that of the batch."""

import os
import signal

from celery import signals
from config.celery import app  # noqa: F401


@signals.worker_init.connect
def prepare(**kwargs):
    from durable_jobs import batches  # not earlier: Django's models are loaded now

    batches.try_to_end = die


def die(pk):
    if os.environ["DIES"] == "child":
        os.kill(os.getpid(), signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)
