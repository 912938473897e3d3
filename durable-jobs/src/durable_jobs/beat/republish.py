"""Sends the messages of due jobs, and those that are missing. This is a part of the sweeper."""

import logging
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import timedelta

from celery import current_app
from django.db import transaction
from django.db.models import Min, Q
from django.db.models.functions import Now

from durable_jobs import admission, conf, transitions
from durable_jobs.database import may_succeed_later
from durable_jobs.messages import MESSAGE_FIELDS, messages_in, send
from durable_jobs.models import Job
from durable_jobs.states import QUEUED
from durable_jobs.transitions import is_paused
from durable_jobs.validation import printable

logger = logging.getLogger(__name__)

JOBS_IN_MEMORY = (
    100  # jobs loaded together: up to 6 MB of arguments, which need more as Python objects
)
REFUSALS = 5  # a job fails when the broker has refused its message this many times
MAX_RESEND_SECONDS = 3600  # between two messages of a job
MIN_PAUSE = 0.5  # seconds between two rounds, however many countdowns end
MIN_TURN = 0.02  # the same for rates: with a longer one, a rate such as 5/s would not be reached


@dataclass
class Queue:
    """What the sender remembers about a queue."""

    most_messages: int = 0  # the highest number seen in it
    probe_at: float = 0  # when the next probe is due, as time.monotonic()
    probe_ids: tuple = ()  # the jobs of the last probe

    def probe(self, due, size):
        """Mark jobs to be sent again, at most `size`, although no message seems to be missing.

        messages_in() also counts messages of plain tasks, which may hide that messages of jobs are missing. So
        send one job again now and then. claim() sets `times_sent` to the number of the message that started
        the job: if this was not the first one, the first one was lost, and the next probe has twice as many.
        """
        if time.monotonic() < self.probe_at:
            return []
        lost = Job.objects.filter(pk__in=self.probe_ids, times_sent__gt=1)
        lost = lost.exclude(state__in=["queued", "cancelled"])  # no message has started these
        count = 2 * len(self.probe_ids) if lost.exists() else 1
        marked = mark_sent(due[: min(count, size)])
        if marked:
            self.probe_at = time.monotonic() + conf.RESEND_SECONDS
            self.probe_ids = marked
        return marked


class Sender:
    """Sends messages, and remembers what the broker has refused."""

    def __init__(self):
        self.queues = defaultdict(Queue)  # by name
        self.refusals = Counter()  # by job id
        self.refused = {}  # {queue with due jobs: why the broker took no message}

    def send_due(self, resend=True):
        """Send the messages of due jobs, for at most DURABLE_JOBS['SWEEP_SECONDS'].

        With resend=False, send only jobs that have had no message since they were queued. A queue that
        fails does not delay the others. Returns the seconds until the next round: 0 if jobs are left, and
        less than DURABLE_JOBS['SWEEP_SECONDS'] if a countdown ends sooner.
        """
        pause = conf.SWEEP_SECONDS
        paused = admission.paused_names()
        turn, next_start = admission.admit_due(paused)
        queued = Job.objects.filter(state="queued").exclude(is_paused(paused))
        until = time.monotonic() + pause
        soon = queued.filter(sweep_at__lt=Now() + timedelta(seconds=pause))
        new = Q(times_sent=0, sweep_at__gte=Now())
        first, countdown = Min("sweep_at") - Now(), Min("sweep_at", filter=new) - Now()
        rows = list(soon.values("queue").annotate(first=first, countdown=countdown))
        names = [row["queue"] for row in rows if row["first"] < timedelta()]
        countdowns = [
            row["countdown"].total_seconds() for row in rows if row["countdown"] is not None
        ]
        for name in self.refused.keys() - {*names}:
            del self.refused[name]
        random.shuffle(names)  # so that each queue gets its turn, however many there are
        size = max(JOBS_IN_MEMORY // max(len(names), 1), 10)
        with current_app.connection_for_write() as broker:
            while names and time.monotonic() < until:
                name = names.pop()
                try:
                    waiting = messages_in(name, broker)
                    if self.send_batch(queued, name, size, resend, waiting):
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
        return min(pause, max(MIN_PAUSE, min([turn, *countdowns])), max(MIN_TURN, next_start))

    def send_batch(self, queued, name, size, resend, waiting):
        """Send at most `size` of these queued jobs, of a queue that has `waiting` messages.

        Returns whether more jobs may be due.
        """
        # Blocked jobs have no sweep_at. The index job_active leaves them out.
        queue = self.queues[name]
        queued = queued.filter(queue=name, sweep_at__isnull=False)
        queue.most_messages = max(queue.most_messages, waiting)
        missing = (
            queued.filter(times_sent__gt=0).count() - waiting
        )  # negative if plain tasks wait too
        # The oldest jobs first. These are also the ones to send again: workers take the oldest messages first,
        # so the messages that are left belong to the newest jobs, and the missing ones to the oldest.
        due = queued.filter(sweep_at__lt=Now()).order_by("sweep_at")
        ids = mark_sent(due.filter(times_sent=0)[:size])
        sent, room = due.filter(times_sent__gt=0), size - len(ids)
        if resend and missing > 0:
            ids += mark_sent(sent[: min(missing, room)])
        elif resend:
            ids += queue.probe(sent, room)
        try:
            try:
                self.load_and_send(ids)
            except Exception as error:
                logger.warning("%d jobs are sent again, one by one: %r", len(ids), error)
                # If the queue has at least half as many messages as were ever seen in it, it may have
                # reached its length limit (x-max-length). Then the refusal does not count.
                may_be_full = 2 * waiting >= max(queue.most_messages, 1)
                self.send_one_by_one(name, ids, may_be_full)
        except Exception:
            transitions.requeue(Job.objects.filter(QUEUED, pk__in=ids, times_sent__gt=0))
            raise
        return len(ids) == size

    def load_and_send(self, ids):
        jobs = Job.objects.filter(QUEUED).only(*MESSAGE_FIELDS).in_bulk(ids)
        if jobs:
            send([jobs[pk] for pk in ids if pk in jobs])
        for pk in ids:
            self.refusals.pop(pk, None)

    def send_one_by_one(self, name, ids, may_be_full):
        """Send these jobs one by one, because the broker did not take all of them.

        If the broker refuses a job that is sent alone, the job is sent again later, and fails after REFUSALS
        refusals. If the queue `may_be_full`, a refusal does not count. If the queue takes no other message
        either, this raises the transport's exception.
        """
        for pk in ids:
            try:
                self.load_and_send([pk])
            except Exception as error:
                row = Job.objects.filter(QUEUED, pk=pk)
                if task := row.values_list("task", flat=True).first():
                    send([Job(task=task, queue=name)])  # a trial: workers ignore it
                transitions.requeue(row, conf.RESEND_SECONDS)
                if not may_be_full:
                    self.refusals[pk] += 1
                if self.refusals[pk] >= REFUSALS:
                    text = (
                        f"The broker refused it {REFUSALS} times: {error.__cause__ or error!r:.500}"
                    )
                    fail(pk, error=text)
                    del self.refusals[pk]


def fail(pk, **texts):
    """Write that a job that cannot be sent has failed, unless a worker had its message after all."""
    if transitions.finish(Job.objects.filter(QUEUED, pk=pk), "failed", **texts):
        logger.error("job %s failed: %s", pk, texts["error"])


def mark_sent(due):
    """Count one more message for these jobs, and set when the next one is due. Skip locked rows.

    Returns their ids.
    """
    with transaction.atomic():
        jobs = list(due.select_for_update(skip_locked=True).values_list("pk", "times_sent"))
        for before in {times_sent for _, times_sent in jobs}:
            wait = min(conf.RESEND_SECONDS * 2 ** min(before, 20), MAX_RESEND_SECONDS)
            pks = [pk for pk, times_sent in jobs if times_sent == before]
            rows = Job.objects.filter(pk__in=pks)
            rows.update(times_sent=before + 1, sweep_at=Now() + timedelta(seconds=wait))
    return [pk for pk, _ in jobs]
