"""Sends the messages of due jobs, and those that are missing. This is a part of the sweeper."""

import logging
import random
import time
from collections import Counter
from datetime import timedelta

from celery import current_app
from django.db.models import Min, Q

from durable_jobs import admission, conf, hooks, transitions
from durable_jobs.database import IDLE_TIMEOUT, Now, may_succeed_later
from durable_jobs.messages import MESSAGE_FIELDS, messages_in, send
from durable_jobs.models import Job
from durable_jobs.pauses import is_paused, paused_names
from durable_jobs.states import ADMITTED, QUEUED, RUNNING, SENT
from durable_jobs.validation import printable

logger = logging.getLogger(__name__)

REFUSALS = 5  # a job fails when the broker has refused its message this many times, and took others
MIN_PAUSE = 0.5  # seconds between two rounds, however many countdowns end
MIN_RATE_PAUSE = 0.02  # the same for rates: with a longer one, a rate such as 5/s would fall short


class Sender:
    """Sends messages, and remembers what the broker has refused."""

    def __init__(self):
        self.refusals = Counter()  # by job id
        self.refused = {}  # {queue with due jobs: why the broker took no message}

    def send_due(self, resend=True):
        """Send the messages of due jobs, for at most DURABLE_JOBS['SWEEP_SECONDS'].

        With resend=False, send only jobs that have had no message since they were queued. A queue that
        fails does not delay the others. Returns the seconds until the next round: 0 if jobs are left, and
        less than DURABLE_JOBS['SWEEP_SECONDS'] if a countdown ends sooner.
        """
        pause = conf.SWEEP_SECONDS
        paused = paused_names()
        until_due, until_rate = admission.admit_due(paused)
        queued = Job.objects.filter(ADMITTED).exclude(is_paused(paused))
        until = time.monotonic() + pause
        soon = queued.filter(send_at__lt=Now() + timedelta(seconds=pause))
        is_countdown = Q(times_sent=0, send_at__gt=Now())
        first, countdown = Min("send_at"), Min("send_at", filter=is_countdown)
        rows = soon.values_list("queue").annotate(first=first - Now(), next=countdown - Now())
        names = [name for name, first, _ in rows if first < timedelta()]
        countdowns = [wait.total_seconds() for *_, wait in rows if wait is not None]
        self.refused = {name: why for name, why in self.refused.items() if name in names}
        random.shuffle(names)  # so that each queue gets its turn, however many there are
        with current_app.connection_for_write() as broker:
            while names and time.monotonic() < until:
                name = names.pop()
                try:
                    if self.send_some(queued, name, resend, broker):
                        names.insert(0, name)
                    self.refused.pop(name, None)
                except Exception as error:  # each transport has its own exceptions
                    if may_succeed_later(error):
                        raise
                    self.refused[name] = printable(f"{error!r:.300}")
                    logger.warning("the jobs of the queue %s are not sent: %r", name, error)
                    broker.close()  # it may be broken; the next queue opens it again
        if names:
            return 0
        until_countdown = max(MIN_PAUSE, min([until_due, *countdowns]))
        return min(pause, until_countdown, max(MIN_RATE_PAUSE, until_rate))

    def send_some(self, queued, name, resend, broker):
        """Send at most BATCH_SIZE of these queued jobs, of this queue. Returns whether more may be due."""
        waiting = messages_in(name, broker)
        queued = queued.filter(queue=name)
        # How many should have a message, less those that are there. What workers have prefetched counts as missing, too: a
        # second message does no harm.
        missing = queued.filter(times_sent__gt=0).count() - waiting
        # The oldest jobs first. These are also the ones to send again: workers take the oldest messages first,
        # so the messages that are left belong to the newest jobs, and the missing ones to the oldest.
        due = queued.filter(IDLE_TIMEOUT, send_at__lte=Now()).order_by("send_at")
        ids = transitions.count_message(due.filter(times_sent=0)[: admission.BATCH_SIZE])
        if resend and missing > 0:
            most = min(missing, admission.BATCH_SIZE - len(ids))
            ids += transitions.count_message(due.filter(times_sent__gt=0)[:most])
        try:
            try:
                self.load_and_send(ids)
            except Exception as error:
                logger.warning("%d jobs are sent again, one by one: %r", len(ids), error)
                self.send_one_by_one(name, ids, broker)
        except Exception:
            transitions.take_back(ids)
            raise
        return len(ids) == admission.BATCH_SIZE

    def load_and_send(self, ids):
        jobs = Job.objects.filter(SENT).only(*MESSAGE_FIELDS).in_bulk(ids)
        if jobs:
            send([jobs[pk] for pk in ids if pk in jobs])
        for pk in ids:
            self.refusals.pop(pk, None)

    def send_one_by_one(self, name, ids, broker):
        """Send these jobs one by one, because the broker did not take all of them.

        A job that it refuses is sent again later, and fails after REFUSALS refusals. A refusal counts only if the
        queue is empty, because it may be full, and if others of its jobs have just started: the broker may take no
        message at all. If it took none of these, this raises its last exception.
        """
        recent, not_taken = Now() - timedelta(seconds=conf.RESEND_SECONDS), 0
        started = Job.objects.filter(RUNNING | Q(finished_at__gt=recent), started_at__gt=recent)
        takes_others = started.filter(queue=name).exists()
        for pk in ids:
            try:
                self.load_and_send([pk])
            except Exception as error:
                is_empty = not messages_in(name, broker)  # raises if the broker is unavailable
                transitions.send_again(Job.objects.filter(pk=pk), conf.RESEND_SECONDS)
                not_taken += 1
                self.refusals[pk] += takes_others and is_empty
                if self.refusals[pk] >= REFUSALS:
                    fail(pk, error.__cause__ or error)
                    del self.refusals[pk]
                if not_taken == len(ids):
                    raise


def fail(pk, error):
    """Write that a job that cannot be sent has failed, unless a worker had its message after all."""
    text = f"The broker refused it {REFUSALS} times: {error!r:.500}"
    if transitions.fail(Job.objects.filter(QUEUED, pk=pk), error=text):
        logger.error("job %s failed: %s", pk, text)
        hooks.failed(Job.objects.get(pk=pk), error)
