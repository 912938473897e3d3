"""Sends the messages of new jobs after their commit. If that fails, the sweeper sends them later."""

import logging
import time
from contextlib import suppress

from django.db import Error

from durable_jobs import transitions
from durable_jobs.messages import is_connection_error, send
from durable_jobs.worker.pools import pool

logger = logging.getLogger(__name__)

PUBLISH_PAUSE = 10  # seconds without a try after the broker was unavailable, to keep requests fast


class Publisher:
    """What this process knows of the broker: the queues for which it was just unavailable."""

    def __init__(self):
        self.again_at = {}  # queue: time.monotonic() of the next try

    def publish(self, jobs):
        """Send the messages of these jobs. Raises no error of the broker or the database."""
        for queue in sorted({job.queue for job in jobs}):
            pool.send(self.try_to_send, [job for job in jobs if job.queue == queue])

    def try_to_send(self, jobs):
        queue = jobs[0].queue
        if time.monotonic() >= self.again_at.get(queue, 0):
            try:
                send(jobs)
                return
            except Exception as error:  # each transport has its own exceptions
                if is_connection_error(error):
                    self.again_at[queue] = time.monotonic() + PUBLISH_PAUSE
                text = "Could not publish %d jobs; will retry. The first is %s: %r"
                logger.warning(text, len(jobs), jobs[0], error)
        with suppress(Error):  # the sweeper sends them after RESEND_SECONDS
            transitions.take_back([job.pk for job in jobs])


publisher = Publisher()
publish = publisher.publish
