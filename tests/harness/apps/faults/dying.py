"""For celery -A: the project. Its worker dies after the end of a job, before that of the batch."""

import os
import signal

from config.celery import app  # noqa: F401

from durable_jobs import batches


def die(pk):
    if os.environ["DIES"] == "child":
        os.kill(os.getpid(), signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)


batches.try_to_end = die
