"""The sweep: a thread of Beat's process that finds what was lost and lets it run (again)."""

import logging
import os
import random
import threading
import time
from datetime import timedelta
from pathlib import Path

from celery import current_app
from django.conf import settings
from django.db import Error, close_old_connections
from django.db.models import Min, Q
from django.db.models.functions import Now

from .models import OVER_TIME_LIMIT, Job

logger = logging.getLogger(__name__)

BATCH = 1000  # jobs of a queue; then leases are looked at again
RESEND_AT_LEAST_EVERY = 3600  # seconds
PURGE_EVERY = 3600  # seconds


def start(**kwargs):
    threading.Thread(target=sweep_for_ever, name="sweep", daemon=True).start()


def sweep_for_ever():
    judge_at = time.monotonic() + settings.JOB_LEASE_SECONDS / 2
    purge_at = 0
    while True:
        try:
            close_old_connections()
            # While the database was away nobody could renew a lease: first, let them.
            if time.monotonic() >= judge_at:
                judge_leases()
            if time.monotonic() >= purge_at:
                purge()
                purge_at = time.monotonic() + PURGE_EVERY
            send_due()
        except Error as error:
            logger.warning("the database does not answer the sweep: %s", error)
            judge_at = time.monotonic() + settings.JOB_LEASE_SECONDS / 2
        except Exception as error:  # each transport raises its own
            logger.warning("the broker does not answer the sweep: %r", error)
        show_life()
        time.sleep(settings.JOB_SWEEP_SECONDS)


def show_life(**kwargs):
    """Touch LIVENESS_FILE: who finds it old takes this process for dead."""
    if file := os.environ.get("LIVENESS_FILE"):
        Path(file).touch()


def judge_leases():
    """End or queue again the running jobs whose lease was not renewed."""
    lapsed = Job.objects.filter(state="running", wake_at__lt=Now())
    for job in lapsed.annotate(late=Q(deadline__lte=Now()))[:BATCH]:
        # Unless it was renewed or ended meanwhile.
        row = Job.objects.filter(pk=job.pk, run=job.run, wake_at__lt=Now())
        crashes = job.crashes + 1
        if job.late:
            row.finish("failed", error=OVER_TIME_LIMIT)
        elif crashes >= settings.JOB_MAX_CRASHES:
            row.finish("failed", error=f"Its worker died {crashes} times", crashes=crashes)
        else:
            delay = 5 * 2**job.crashes * random.uniform(0.8, 1.2)
            row.requeue(delay, crashes=crashes, message="Its worker died, so it starts again soon")
            logger.warning("job %s lost its worker: again in %.0f s", job.pk, delay)


def send_due():
    """Send the jobs that are due and of which the broker has no message."""
    queued = Job.objects.filter(state="queued")
    due = queued.filter(wake_at__lt=Now())
    # First come, first served: who cannot be sent, say because it is too large, is due anew, and so
    # behind all others; and the messages that are left in a queue are those of the latest jobs.
    queues = due.values_list("queue").annotate(first=Min("wake_at")).order_by("first")
    for queue, _ in list(queues):
        unsent = due.filter(queue=queue, sent=0).order_by("wake_at")[:BATCH]
        sent = queued.filter(queue=queue, sent__gt=0)
        if missing := sent.count():
            missing -= messages_in(queue)
        lost = sent.filter(wake_at__lt=Now()).order_by("wake_at")
        for job in [*unsent, *lost[: min(max(0, missing), BATCH)]]:
            wait = min(settings.JOB_RESEND_SECONDS * 2**job.sent, RESEND_AT_LEAST_EVERY)
            row = queued.filter(pk=job.pk, sent=job.sent)  # unless another sweep was quicker
            claimed = row.update(sent=job.sent + 1, wake_at=Now() + timedelta(seconds=wait))
            if claimed and not job.publish():
                return


def messages_in(queue):
    """Return how many messages wait in `queue`. Raises what the transport does if it is down."""
    arguments = current_app.amqp.queues[queue].queue_arguments
    with current_app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)
        # Not passive: where keys have a prefix, kombu finds no queue in that way.
        declare = connection.default_channel.queue_declare
        declared = declare(queue, durable=True, auto_delete=False, arguments=arguments)
        return declared.message_count


def purge():
    """Delete what has been final for JOB_RETENTION_DAYS, and with it the idempotency keys."""
    old = Job.objects.filter(finished_at__lt=Now() - timedelta(days=settings.JOB_RETENTION_DAYS))
    while batch := list(old.values_list("pk", flat=True)[:BATCH]):
        Job.objects.filter(pk__in=batch).delete()
