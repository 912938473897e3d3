"""The sweep: a thread of Beat's process that finds what was lost and lets it run (again)."""

import logging
import random
import threading
import time
from datetime import timedelta

from django.conf import settings
from django.db import Error, close_old_connections, transaction
from django.db.models.functions import Now

from .lease import TICK, recover
from .liveness import touch_liveness_file
from .messages import messages_in, send
from .models import BATCH, QUEUED, Job, Sweep

logger = logging.getLogger(__name__)

IN_MEMORY = 100  # jobs at once, because arguments may be large
PURGED = 2000  # jobs in a round: more than a million an hour
RESEND_AT_LEAST_EVERY = 3600  # seconds

# After an error a queue gets one job at a time, then 2, 4, … until a batch is not full.
batch_sizes = {}
extra_at = {}  # queue: when one job may be sent again although no message seems to be missing


def start():
    threading.Thread(target=sweep_for_ever, name="sweep", daemon=True).start()


def sweep_for_ever():
    last_round = 0
    while True:
        busy = False
        # After a pause (start, suspended machine, database outage) give live workers half a lease to
        # renew before anything is recovered.
        longest = settings.JOB_LEASE_SECONDS / 2 + 2 * settings.JOB_SWEEP_SECONDS
        if time.time() - last_round > longest:
            recover_at = time.monotonic() + settings.JOB_LEASE_SECONDS / 2
        last_round = time.time()
        try:
            close_old_connections()
            if time.monotonic() >= recover_at:
                recover_lapsed()
            busy = send_due()
            if not busy:
                purge()
            # Even if the broker took nothing: this says that the sweep looks, not what it did.
            if not Sweep.objects.filter(pk=1).update(ended_at=Now()):
                Sweep.objects.create(pk=1, ended_at=Now())
        except Error as error:
            logger.warning("the database does not answer the sweep: %s", error)
            recover_at = time.monotonic() + settings.JOB_LEASE_SECONDS / 2
        except Exception as error:  # without this thread nothing would be recovered
            logger.warning("the sweep continues in its next round: %r", error)
        touch_liveness_file()
        time.sleep(0 if busy else settings.JOB_SWEEP_SECONDS)


def recover_lapsed():
    """Recover the running jobs whose lease was not renewed."""
    lapsed = Job.objects.filter(state="running", wake_at__lt=Now())
    with transaction.atomic():  # skip a row that its own body has locked
        unlocked = lapsed.select_for_update(skip_locked=True)
        found = list(unlocked.values_list("pk", flat=True)[:BATCH])
    if found:
        time.sleep(2 * TICK)  # a worker that was held up, say by a lock, renews at its next tick
        recover(lapsed.filter(pk__in=found))


def send_due():
    """Send the due jobs of which the broker has no message, for at most the time of a round.

    Returns whether some are left. A queue that fails does not delay the others.
    """
    until = time.monotonic() + settings.JOB_SWEEP_SECONDS
    due = Job.objects.filter(state="queued", wake_at__lt=Now())
    queues = list(due.values_list("queue", flat=True).distinct())
    random.shuffle(queues)  # so that each one gets its turn, however many there are
    size = max(IN_MEMORY // max(len(queues), 1), 10)
    while queues and time.monotonic() < until:
        queue = queues.pop()
        try:
            if send_batch(queue, min(size, batch_sizes.get(queue, size))):
                queues.insert(0, queue)
        except Error:
            raise
        except Exception as error:  # each transport raises its own
            logger.warning("the broker takes no jobs for the queue %s: %r", queue, error)
    return bool(queues)


def send_batch(queue, size):
    """Send `size` jobs of a queue at most. Returns whether there may be more."""
    queued = Job.objects.filter(state="queued", queue=queue)
    missing = queued.filter(sent__gt=0).count() - messages_in(queue)
    # First come, first served. A job that the broker refused gets a later wake_at, behind all others.
    # Workers take the oldest messages first, so those that are missing are of the oldest jobs.
    due = queued.filter(wake_at__lt=Now()).order_by("wake_at")
    ids = mark_sent(due.filter(sent=0)[:size])
    # messages_in() counts messages of plain tasks too, so some may be missing even if it does not look
    # so: send one job again now and then.
    resend, is_extra = max(missing, 0), False
    if not resend and time.monotonic() >= extra_at.get(queue, 0):
        resend, is_extra = 1, True
    again = mark_sent(due.filter(sent__gt=0)[: min(resend, size - len(ids))])
    if is_extra and again:
        extra_at[queue] = time.monotonic() + settings.JOB_RESEND_SECONDS
    ids += again
    jobs = Job.objects.filter(QUEUED).in_bulk(ids)
    try:
        send([jobs[pk] for pk in ids if pk in jobs])
    except Exception:
        # Perhaps the broker refuses one of these jobs: queue them again, and send one by one. A job that
        # is refused alone stays marked as sent, so it waits longer each time: see mark_sent().
        if size > 1:
            batch_sizes[queue] = 1
            Job.objects.filter(QUEUED, pk__in=ids, sent__gt=0).requeue()
        raise
    if queue in batch_sizes:
        batch_sizes[queue] = 2 * size
    if len(ids) < size:
        batch_sizes.pop(queue, None)
    return len(ids) == size


def mark_sent(due):
    """Mark these jobs as sent, unless another sweep does. Returns their ids."""
    with transaction.atomic():
        jobs = dict(due.select_for_update(skip_locked=True).values_list("pk", "sent"))
        for sent in set(jobs.values()):
            wait = min(settings.JOB_RESEND_SECONDS * 2 ** min(sent, 20), RESEND_AT_LEAST_EVERY)
            rows = Job.objects.filter(pk__in=[pk for pk in jobs if jobs[pk] == sent])
            rows.update(sent=sent + 1, wake_at=Now() + timedelta(seconds=wait))
    return list(jobs)


def purge():
    """Delete jobs that ended JOB_RETENTION_DAYS ago, and so their idempotency keys."""
    old = Job.objects.filter(finished_at__lt=Now() - timedelta(days=settings.JOB_RETENTION_DAYS))
    with transaction.atomic():
        unlocked = old.select_for_update(skip_locked=True).values_list("pk", flat=True)
        _, deleted = Job.objects.filter(pk__in=list(unlocked[:PURGED])).delete()
    if deleted:
        count = deleted["jobs.Job"]
        logger.info("deleted %d jobs older than %g days", count, settings.JOB_RETENTION_DAYS)
