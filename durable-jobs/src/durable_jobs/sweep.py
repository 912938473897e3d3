"""The sweep: threads of Beat's process that recover jobs, send their messages, count and delete old jobs."""

import logging
import os
import random
import threading
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta

from celery import current_app
from celery.utils.functional import chunks
from django.db import close_old_connections, connection, transaction
from django.db.models import F, Min, Q, TextField
from django.db.models.functions import Cast, Length, Now

from . import batches, conf, heartbeat, tallies, tracing, turns, updates
from .database import may_succeed_later, try_in_halves
from .expressions import IN_CANCELLED_BODY, QUEUED
from .lease import POLL_SECONDS, recover
from .liveness import touch_liveness_file
from .messages import MESSAGE_FIELDS, messages_in, send
from .models import Batch, Job, Sweep
from .queryset import BATCH_SIZE
from .values import printable, size_error

logger = logging.getLogger(__name__)

JOBS_IN_MEMORY = 100  # jobs loaded at once, because arguments may be large
# If the arguments of a batch are larger, load one job at a time. As Python objects they need up to 20
# times as much memory.
BYTES_IN_MEMORY = 1_000_000
REFUSALS = 5  # a job fails when the broker has refused its message this many times
PURGE_BATCH = 2000  # jobs in a page that the purge deletes in one transaction
PURGE_SECONDS = 1  # in a round, every 5 s: millions an hour, in a sixth of the time
PURGE_RETRY_SECONDS = 3600  # until jobs that could not be deleted are tried again
MAX_RESEND_SECONDS = 3600  # between two messages of a job
MIN_PAUSE = 0.5  # seconds between two rounds, however many countdowns end
MIN_TURN = 0.1  # the same for rates: with a longer one, a rate such as 5/s would not be reached


@dataclass
class Queue:
    """What the sweep remembers about a queue."""

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
            return {}
        lost = Job.objects.filter(pk__in=self.probe_ids, times_sent__gt=1)
        lost = lost.exclude(state__in=["queued", "cancelled"])  # no message has started these
        count = 2 * len(self.probe_ids) if lost.exists() else 1
        marked = mark_sent(due[: min(count, size)])
        if marked:
            self.probe_at = time.monotonic() + conf.RESEND_SECONDS
            self.probe_ids = tuple(marked)
        return marked


queues = defaultdict(Queue)  # by name
refusals = Counter()  # by job id
refused = {}  # {queue with due jobs: why the broker took no message}


def start(tick_delay, error_count):
    """Start the threads.

    `tick_delay` returns how many seconds Beat's next tick is overdue, `error_count` how many errors
    Beat has logged.
    """
    args = [tick_delay, error_count]
    threading.Thread(target=sweep_or_exit, args=args, name="sweep", daemon=True).start()
    threading.Thread(target=clean_forever, name="clean", daemon=True).start()


def sweep_or_exit(tick_delay, error_count):
    try:
        sweep_forever(tick_delay, error_count)
    finally:  # without this thread nothing would be recovered: let a supervisor restart Beat
        os._exit(1)


def sweep_forever(tick_delay, error_count):
    last_round = stored_errors = recover_at = 0
    while True:
        pause = conf.SWEEP_SECONDS
        # After a gap (Beat has just started, or the machine or the database was down), first wait for half
        # the length of a lease. In this time live workers renew their leases, and claim again the jobs
        # whose claims the database has lost. Only then recover jobs, and send messages again.
        max_gap = conf.LEASE_SECONDS / 2 + 2 * conf.SWEEP_SECONDS
        if time.time() - last_round > max_gap:
            recover_at = time.monotonic() + conf.LEASE_SECONDS / 2
        last_round = time.time()
        try:
            may_recover = time.monotonic() >= recover_at
            try:
                if may_recover:
                    recover_lapsed()
                batches.end_all()
            finally:
                pause = send_due(resend=may_recover)
            errors = error_count()
            store_round(tick_delay(), errors - stored_errors)
            stored_errors = errors
        except Exception as error:
            logger.warning("the sweep failed, and continues in its next round: %r", error)
            if may_succeed_later(error):
                connection.close()
                recover_at = time.monotonic() + conf.LEASE_SECONDS / 2
        if tick_delay() < conf.LEASE_SECONDS:  # if Beat hangs, let the file become old
            touch_liveness_file()
        time.sleep(pause)


def store_round(tick_delay, new_errors):
    """Store that the sweep is running, even if the broker took no message."""
    fields = {"ended_at": Now(), "tick_due_at": Now() - timedelta(seconds=tick_delay)}
    fields["refused"] = refused or None
    errors = F("schedule_errors") + new_errors
    if not Sweep.objects.filter(pk=1).update(**fields, schedule_errors=errors):
        Sweep.objects.create(pk=1, **fields, schedule_errors=new_errors)


def recover_lapsed():
    """Recover the running jobs whose lease was not renewed, and free the places of cancelled ones."""
    running = Job.objects.filter(state="running", sweep_at__lt=Now())
    cancelled = turns.with_place().filter(IN_CANCELLED_BODY, sweep_at__lt=Now())
    lapsed = []
    for jobs in running, cancelled:
        with transaction.atomic():  # skip a row that the job's own body has locked
            rows = jobs.select_for_update(skip_locked=True)
            if ids := list(rows.values_list("pk", flat=True)[:BATCH_SIZE]):
                lapsed.append((jobs, ids))
    if lapsed:
        wait_for_table_lock()
        # A worker that was delayed, for example by a lock, renews its leases in this time.
        time.sleep(2 * POLL_SECONDS)
    for jobs, ids in lapsed:
        try_in_halves(recover, jobs, ids)


def wait_for_table_lock():
    """Wait while another transaction locks the whole table, as CREATE INDEX does.

    Until then, rows can be read, but no lease can be renewed.
    """
    Job.objects.filter(pk=uuid.uuid4()).update(crashes=0)  # an UPDATE of no row


def send_due(resend=True):
    """Send the messages of due jobs, for at most DURABLE_JOBS['SWEEP_SECONDS'].

    With resend=False, send only jobs that have had no message since they were queued. A queue that
    fails does not delay the others. Returns the seconds until the next round: 0 if jobs are left, and
    less than DURABLE_JOBS['SWEEP_SECONDS'] if a countdown ends sooner.
    """
    pause = conf.SWEEP_SECONDS
    turn, next_start = turns.let_due_go()
    until = time.monotonic() + pause
    soon = Job.objects.filter(state="queued", sweep_at__lt=Now() + timedelta(seconds=pause))
    new = Q(times_sent=0, sweep_at__gte=Now())
    first, countdown = Min("sweep_at") - Now(), Min("sweep_at", filter=new) - Now()
    rows = list(soon.values("queue").annotate(first=first, countdown=countdown))
    names = [row["queue"] for row in rows if row["first"] < timedelta()]
    countdowns = [row["countdown"].total_seconds() for row in rows if row["countdown"] is not None]
    for name in refused.keys() - {*names}:
        del refused[name]
    random.shuffle(names)  # so that each queue gets its turn, however many there are
    size = max(JOBS_IN_MEMORY // max(len(names), 1), 10)
    with current_app.connection_for_write() as broker:
        while names and time.monotonic() < until:
            name = names.pop()
            try:
                if send_batch(name, size, resend, messages_in(name, broker)):
                    names.insert(0, name)
                refused.pop(name, None)
            except Exception as error:  # each transport has its own exceptions
                if may_succeed_later(error):
                    raise
                refused[name] = printable(f"{error!r:.300}")
                logger.warning("the jobs of the queue %s are not sent: %r", name, error)
                broker.close()  # it may be broken; the next queue opens it again
    if names:
        return 0
    return min(pause, max(MIN_PAUSE, min([turn, *countdowns])), max(MIN_TURN, next_start))


def send_batch(name, size, resend, waiting):
    """Send at most `size` jobs of a queue that has `waiting` messages.

    Returns whether more jobs may be due.
    """
    # Held jobs have no sweep_at. The index job_active leaves them out.
    queue = queues[name]
    queued = Job.objects.filter(state="queued", queue=name, sweep_at__isnull=False)
    queue.most_messages = max(queue.most_messages, waiting)
    missing = queued.filter(times_sent__gt=0).count() - waiting  # negative if plain tasks wait too
    # The oldest jobs first. These are also the ones to send again: workers take the oldest messages first,
    # so the messages that are left belong to the newest jobs, and the missing ones to the oldest.
    due = queued.filter(sweep_at__lt=Now()).order_by("sweep_at")
    sizes = mark_sent(due.filter(times_sent=0)[:size])
    sent, room = due.filter(times_sent__gt=0), size - len(sizes)
    if resend and missing > 0:
        sizes |= mark_sent(sent[: min(missing, room)])
    elif resend:
        sizes |= queue.probe(sent, room)
    for pk, length in sizes.items():
        if error := size_error(length):  # do not load it: Beat could run out of memory
            fail(pk, error=error, public_error=error)
    at_once = size if sum(sizes.values()) < BYTES_IN_MEMORY else 1
    try:
        for ids in chunks(iter(sizes), at_once):
            try:
                load_and_send(ids)
            except Exception as error:
                logger.warning("%d jobs are sent again, one by one: %r", len(ids), error)
                # If the queue has at least half as many messages as were ever seen in it, it may have
                # reached its length limit (x-max-length). Then the refusal does not count.
                may_be_full = 2 * waiting >= max(queue.most_messages, 1)
                send_one_by_one(name, ids, may_be_full)
    except Exception:
        updates.requeue(Job.objects.filter(QUEUED, pk__in=list(sizes), times_sent__gt=0))
        raise
    return len(sizes) == size


def load_and_send(ids):
    jobs = Job.objects.filter(QUEUED).only(*MESSAGE_FIELDS).in_bulk(ids)
    send([jobs[pk] for pk in ids if pk in jobs])
    for pk in ids:
        refusals.pop(pk, None)


def send_one_by_one(name, ids, may_be_full):
    """Send these jobs one by one, because the broker did not take all of them.

    If the broker refuses a job that is sent alone, the job is sent again later, and fails after REFUSALS
    refusals. If the queue `may_be_full`, a refusal does not count. If the queue takes no other message
    either, this raises the transport's exception.
    """
    for pk in ids:
        try:
            load_and_send([pk])
        except Exception as error:
            row = Job.objects.filter(QUEUED, pk=pk)
            if task := row.values_list("task", flat=True).first():
                send([Job(task=task, queue=name)])  # a trial: workers ignore it
            updates.requeue(row, conf.RESEND_SECONDS)
            if not may_be_full:
                refusals[pk] += 1
            if refusals[pk] >= REFUSALS:
                text = f"The broker refused it {REFUSALS} times: {error.__cause__ or error!r:.500}"
                fail(pk, error=text)
                del refusals[pk]


def fail(pk, **texts):
    """Write that a job that cannot be sent has failed, unless a worker had its message after all."""
    row = Job.objects.filter(QUEUED, pk=pk)
    job = row.only(*tracing.FIELDS).first()
    if job and updates.finish(row, "failed", **texts):
        tracing.run_as(job, logger.error, "job %s failed: %s", pk, texts["error"])


def mark_sent(due):
    """Count one more message for these jobs, and set when the next one is due. Skip locked rows.

    Returns {id: length of the arguments}.
    """
    length = Length(Cast("args", TextField())) + Length(Cast("kwargs", TextField()))
    with transaction.atomic():
        jobs = list(due.select_for_update(skip_locked=True).values_list("pk", "times_sent", length))
        for before in {times_sent for _, times_sent, _ in jobs}:
            wait = min(conf.RESEND_SECONDS * 2 ** min(before, 20), MAX_RESEND_SECONDS)
            pks = [pk for pk, times_sent, _ in jobs if times_sent == before]
            rows = Job.objects.filter(pk__in=pks)
            rows.update(times_sent=before + 1, sweep_at=Now() + timedelta(seconds=wait))
    return {pk: size for pk, _, size in jobs}


@dataclass
class Purge:
    """Deletes the rows of a table that ended more than DURABLE_JOBS['RETENTION_DAYS'] ago, a page at a time.

    A page costs the same however many rows must be kept: it starts where the last one ended.
    """

    model: type
    field: str  # when a row has ended
    time: datetime | None = None  # the last row of the last page ended at this time
    kept: int = 0  # rows that ended at the same time, and were not deleted
    start_over_at: float = 0  # as time.monotonic()

    def delete_pages(self):
        until = time.monotonic() + PURGE_SECONDS
        while self.delete_page() and time.monotonic() < until:
            pass

    def delete_page(self):
        """Delete the next rows, except those that are still needed or cannot be deleted.

        Returns whether there are more.
        """
        old = self.model.objects.filter(**{f"{self.field}__lt": updates.retention_end()})
        if self.model is Job:
            old = old.filter(finished_at__lt=tallies.counted_until())
        rest = old.filter(**{f"{self.field}__gte": self.time}) if self.time else old
        rest = rest.order_by(self.field).values_list("pk", self.field)
        page = list(rest[self.kept : self.kept + PURGE_BATCH])
        if page:
            try_in_halves(delete, old, [pk for pk, _ in page])
            _, last = page[-1]
            kept = self.model.objects.filter(pk__in=[pk for pk, time in page if time == last])
            self.kept = kept.count() + (self.kept if last == self.time else 0)
            self.time = last
        if len(page) < PURGE_BATCH and time.monotonic() > self.start_over_at:
            self.time, self.kept = None, 0
            self.start_over_at = time.monotonic() + PURGE_RETRY_SECONDS
        return len(page) == PURGE_BATCH


def clean_forever():
    """Count the jobs that have ended, and delete old rows."""
    purges = Purge(Job, "finished_at").delete_pages, Purge(Batch, "ended_at").delete_pages
    steps = tallies.count_ended, *purges, turns.delete_old_starts, heartbeat.delete_old
    while True:
        time.sleep(conf.SWEEP_SECONDS)
        for step in steps:
            try:
                close_old_connections()
                step()
            except Exception as error:
                logger.warning("%s failed, and is tried again: %r", step.__qualname__, error)


@transaction.atomic
def delete(rows):
    """Delete these rows, except those that are locked or needed. They stay old until this has ended."""
    field = "batch" if rows.model is Job else "pk"
    of_batches = rows.filter(**{f"{field}__isnull": False}).values_list(field, flat=True).distinct()
    locked = updates.lock_batches(Batch.objects, of_batches)
    unneeded = batches.unneeded(rows.model, [pk for pk, is_old in locked.items() if is_old])
    # Django loads what it deletes. Load only the keys, because results may be large.
    _, deleted = updates.skip_locked(rows.filter(unneeded)).only("pk").delete()
    if count := deleted.get("durable_jobs.Job"):
        logger.info("deleted %d jobs older than %g days", count, conf.RETENTION_DAYS)
