"""Sends the messages of new jobs after their commit. If that fails, the sweep sends them later."""

import logging
import time

from . import updates
from .expressions import QUEUED
from .messages import is_connection_error, send
from .pools import pool

logger = logging.getLogger(__name__)

PUBLISH_PAUSE = 10  # seconds without a try after the broker was unavailable, to keep requests fast
publish_again_at = {}  # queue: time.monotonic() of the next try


def publish(jobs):
    """Send the messages of these jobs. Raises no error of the broker."""
    for queue in sorted({job.queue for job in jobs}):
        pool.send(try_to_send, [job for job in jobs if job.queue == queue])


def try_to_send(jobs):
    queue = jobs[0].queue
    if time.monotonic() >= publish_again_at.get(queue, 0):
        try:
            send(jobs)
            return
        except Exception as error:  # each transport has its own exceptions
            if is_connection_error(error):
                publish_again_at[queue] = time.monotonic() + PUBLISH_PAUSE
            logger.warning("stored but not sent: %d jobs, first %s: %r", len(jobs), jobs[0], error)
    # All had times_sent=1. If one has 0 now, its message arrived in spite of the error, and a worker has
    # queued it again: skip it.
    rows = type(jobs[0]).objects.filter(QUEUED, pk__in=[job.pk for job in jobs])
    updates.requeue(rows.filter(times_sent__gt=0))
