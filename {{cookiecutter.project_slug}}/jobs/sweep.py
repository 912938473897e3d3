"""The sweep: a thread of Beat's process that finds what was lost and lets it run (again)."""

import logging
import random
import threading
import time
from datetime import timedelta

from django.conf import settings
from django.db import Error, close_old_connections, transaction
from django.db.models.functions import Now

from .lease import TICK, judge
from .liveness import show_life
from .messages import messages_in, send
from .models import BATCH, QUEUED, Job, Sweep

logger = logging.getLogger(__name__)

IN_MEMORY = 100  # jobs at once, for arguments may be large
PURGED = 2000  # jobs a round: more than a million an hour
RESEND_AT_LEAST_EVERY = 3600  # seconds

refused = {}  # queue with jobs that the broker did not take: how many it gets at once now
extra_at = {}  # queue: when a job may be sent again of which no message seems to be missing


def start(**kwargs):
    threading.Thread(target=sweep_for_ever, name="sweep", daemon=True).start()


def sweep_for_ever():
    last_round = 0
    while True:
        busy = False
        # While the database was away, or the machine stood still, nobody could renew a lease.
        longest = settings.JOB_LEASE_SECONDS / 2 + 2 * settings.JOB_SWEEP_SECONDS
        if time.time() - last_round > longest:
            judge_at = time.monotonic() + settings.JOB_LEASE_SECONDS / 2
        last_round = time.time()
        try:
            close_old_connections()
            if time.monotonic() >= judge_at:
                judge_leases()
            busy = send_due()
            if not busy:
                purge()
            # Also if the broker took nothing: what is measured is whether somebody looks.
            if not Sweep.objects.filter(pk=1).update(ended_at=Now()):
                Sweep.objects.create(pk=1, ended_at=Now())
        except Error as error:
            logger.warning("the database does not answer the sweep: %s", error)
            judge_at = time.monotonic() + settings.JOB_LEASE_SECONDS / 2
        except Exception as error:  # whatever it is: without this thread nothing is found again
            logger.warning("the sweep goes on in its next round: %r", error)
        show_life()
        time.sleep(0 if busy else settings.JOB_SWEEP_SECONDS)


def judge_leases():
    """End or queue again the running jobs whose lease was not renewed."""
    lapsed = Job.objects.filter(state="running", wake_at__lt=Now())
    with transaction.atomic():  # a row that its own body locks is no suspect yet
        unlocked = lapsed.select_for_update(skip_locked=True)
        suspects = list(unlocked.values_list("pk", flat=True)[:BATCH])
    if suspects:
        time.sleep(2 * TICK)  # who was held up until now, by a lock say, renews at its next tick
        judge(lapsed.filter(pk__in=suspects))


def send_due():
    """Send the jobs that are due and of which the broker has no message, for as long as a round.

    Returns whether some are left. A queue that fails keeps no other one waiting.
    """
    until = time.monotonic() + settings.JOB_SWEEP_SECONDS
    due = Job.objects.filter(state="queued", wake_at__lt=Now())
    queues = list(due.values_list("queue", flat=True).distinct())
    random.shuffle(queues)  # however many there are, each gets its turn
    size = max(IN_MEMORY // max(len(queues), 1), 10)
    while queues and time.monotonic() < until:
        queue = queues.pop()
        try:
            if send_batch(queue, min(size, refused.get(queue, size))):
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
    # First come, first served: who cannot be sent, say because it is too large, is due later, and so
    # behind all others; and the messages that are left in a queue are those of the latest jobs.
    due = queued.filter(wake_at__lt=Now()).order_by("wake_at")
    ids = claim(due.filter(sent=0)[:size])
    # One now and then in any case, for not all messages in a queue are of jobs.
    extra = missing < 1 and time.monotonic() >= extra_at.get(queue, 0)
    again = claim(due.filter(sent__gt=0)[: min(max(0, missing, extra), size - len(ids))])
    if extra and again:
        extra_at[queue] = time.monotonic() + settings.JOB_RESEND_SECONDS
    ids += again
    jobs = Job.objects.filter(QUEUED).defer("attempts").in_bulk(ids)
    try:
        send([jobs[pk] for pk in ids if pk in jobs])
    except Exception:
        if size > 1:  # else it was one alone, which waits ever longer: see claim()
            refused[queue] = 1  # perhaps because of one of them: begin anew, one by one
            Job.objects.filter(QUEUED, pk__in=ids, sent__gt=0).requeue()
        raise
    if queue in refused:
        refused[queue] = 2 * size
    if len(ids) < size:
        refused.pop(queue, None)
    return len(ids) == size


def claim(due):
    """Mark these jobs as sent, unless another sweep is at it. Returns their ids."""
    with transaction.atomic():
        jobs = dict(due.select_for_update(skip_locked=True).values_list("pk", "sent"))
        for sent in set(jobs.values()):
            wait = min(settings.JOB_RESEND_SECONDS * 2 ** min(sent, 20), RESEND_AT_LEAST_EVERY)
            rows = Job.objects.filter(pk__in=[pk for pk in jobs if jobs[pk] == sent])
            rows.update(sent=sent + 1, wake_at=Now() + timedelta(seconds=wait))
    return list(jobs)


def purge():
    """Delete what has been final for JOB_RETENTION_DAYS, and with it the idempotency keys."""
    old = Job.objects.filter(finished_at__lt=Now() - timedelta(days=settings.JOB_RETENTION_DAYS))
    with transaction.atomic():
        unlocked = old.select_for_update(skip_locked=True).values_list("pk", flat=True)
        deleted, _ = Job.objects.filter(pk__in=list(unlocked[:PURGED])).delete()
    if deleted:
        logger.info("deleted %d jobs older than %g days", deleted, settings.JOB_RETENTION_DAYS)
