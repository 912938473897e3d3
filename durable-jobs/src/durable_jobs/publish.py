"""Sends the messages of new jobs after their commit. If that fails, the sweeper sends them later."""

import logging
import time
from contextlib import suppress

from django.db import Error

from durable_jobs import transitions
from durable_jobs.messages import is_connection_error, send
from durable_jobs.pools import pool

logger = logging.getLogger(__name__)

PUBLISH_PAUSE = 10  # seconds without a try after the broker was unavailable, to keep requests fast


# Of queues for which the broker was just unavailable: {queue: time.monotonic() of this process's next try}
next_tries = {}


def publish(jobs):
    """Send the messages of these jobs. Raises no error of the broker or the database."""
    for queue in sorted({job.queue for job in jobs}):
        pool.send(try_to_send, queue, [job for job in jobs if job.queue == queue])


def try_to_send(queue, jobs):
    if time.monotonic() >= next_tries.get(queue, 0):
        try:
            send(jobs)
            return
        except Exception as error:  # each transport has its own exceptions
            if is_connection_error(error):
                next_tries[queue] = time.monotonic() + PUBLISH_PAUSE
            text = "Could not publish %d jobs; will retry. The first is %s: %r"
            logger.warning(text, len(jobs), jobs[0], error)
    with suppress(Error):  # the sweeper sends them after RESEND_SECONDS
        transitions.take_back([job.pk for job in jobs])
