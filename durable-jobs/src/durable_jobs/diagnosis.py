"""Reasons: what a job waits for or why it does not move, and what is wrong with the whole system.

Nothing is stored: whoever reads a job asks here, so the reason is known even if no worker and no Beat runs.
A fact is read when the first job needs it. Jobs that run, have ended, or have just become due need few.
"""

import logging
from contextlib import nullcontext
from datetime import timedelta
from functools import wraps

from celery import current_app
from django.db import Error, connections, transaction
from django.db.models import Count, F
from django.db.models.functions import Now
from django.template.defaultfilters import pluralize
from django.utils import timezone
from django.utils.functional import cached_property

from durable_jobs import conf
from durable_jobs.admission import with_slot
from durable_jobs.enqueue import database_time
from durable_jobs.limits import limit_of
from durable_jobs.models import Failure, Job, Pause, Sweep, Worker
from durable_jobs.worker.heartbeat import STALE_SECONDS

logger = logging.getLogger(__name__)

PATIENCE = timedelta(seconds=10)  # for which a due job may wait before a cause is looked for
NO_HEARTBEAT = "No heartbeat from Beat or any worker: they are down or can't reach the database"
# Who holds a lock on the whole table with which no other process can write to a row.
TABLE_LOCK = """
SELECT pid, NOW() - xact_start FROM pg_locks LEFT JOIN pg_stat_activity USING (pid)
WHERE granted AND relation = TO_REGCLASS(%s)
AND database = (SELECT oid FROM pg_database WHERE datname = CURRENT_DATABASE())
AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
LIMIT 1
"""


def reasons(jobs, for_staff=False):
    """Return {id: a text} for those of these jobs of which there is something to say.

    With `for_staff`, it may quote exceptions. It has no time of day, because the reader's time zone is unknown.
    """
    facts, found = Facts(jobs, for_staff), {}
    for job in jobs:
        if texts := list(filter(None, texts_of(job, facts))):
            found[job.pk] = ". ".join(text.rstrip(".") for text in texts)
    return found


def problems(rows):
    """Return sentences about what is wrong with the whole system, for staff. by_queue() returned the rows."""
    facts = Facts(for_staff=True)
    found = [facts.standstill or facts.beat]
    for row in rows:
        count = row.get("durable_jobs_waiting")
        if count and (text := facts.no_worker(row["queue"])):
            found.append(f"{text}: {numbered(count, 'job')} there")
    found += [facts.refusal(queue) for queue in facts.refused]
    if facts.stalled_jobs:
        found.append(f"The workers of {numbered(facts.stalled_jobs, 'job')} do not respond")
    found += [f"{name}: {text}" for name, text in facts.pauses.items()]
    return [text for text in found if text]


def texts_of(job, facts):
    if job.state == "queued":
        yield from waits_for(job, facts)
        yield tries(job, facts)
    elif job.state == "running":
        yield from stall(job, facts)


def waits_for(job, facts):
    """Yield what a queued job waits for, if it is due."""
    if job.due_at is None or job.due_at > timezone.now():
        return
    is_late = facts.has_passed(job.due_at + PATIENCE)
    if pauses := [facts.pauses[name] for name in (job.queue, job.task) if name in facts.pauses]:
        yield from pauses
    elif job.blocked_by:
        yield facts.turn(job.blocked_by)
        if is_late and facts.needs_sweep(job.blocked_by):
            yield facts.standstill or facts.beat
    elif is_late:
        yield facts.standstill
        if not facts.standstill:
            is_unsent = not job.times_sent
            text = facts.no_worker(job.queue) or (is_unsent and facts.refusal(job.queue))
            yield text or facts.no_slot(job.queue)
            yield facts.beat


def tries(job, facts):
    """Say which try comes next, and why the last one has ended."""
    texts = []
    if job.retries:
        most = getattr(current_app.tasks.get(job.task), "max_retries", None)
        # A task function may allow more with retry(max_retries=...).
        of = f" of {most + 1}" if most and most >= job.retries else ""
        texts.append(f"try {job.retries + 1}{of}")
    if job.crashes:
        texts.append(f"crash {job.crashes} of {conf.MAX_CRASHES}")
    if not texts:
        return ""
    error = facts.errors.get(job.pk, "") if facts.for_staff else job.public_error
    text = ", ".join(texts)
    return text[0].upper() + text[1:] + (f": {error}" if error else "")


def stall(job, facts):
    """Yield why the lease of a running job has lapsed, if it has."""
    if not facts.has_passed(job.sweep_at):
        return
    age = facts.now - job.sweep_at + timedelta(seconds=conf.LEASE_SECONDS)
    text = f"Its worker has not responded for {span(age)}"
    end = "fail" if job.crashes + 1 >= conf.MAX_CRASHES else "restart"
    if job.deadline and facts.has_passed(job.deadline):
        text, end = "It is over its time limit", "fail"
    elif facts.standstill:
        yield text
        yield facts.standstill
        return
    elif facts.is_alive(job.worker, job.started_at):
        yield facts.lock or f"{text}, but it runs: another process has probably locked the job"
        return
    yield f"{text}; Beat will {end} it" + (" once it runs" if facts.beat else "")
    yield facts.beat


def span(time):
    """Return a timedelta as text, such as "45 s". The jobs page writes it in the same way."""
    seconds = max(int(time.total_seconds()), 0)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h" if seconds < 2 * 86400 else f"{seconds // 86400} days"


def numbered(count, noun):
    return f"{count:,} {noun}{pluralize(count)}"


def fact(default):
    """Decorate a method that reads a fact, at most once. If it cannot be read, it is `default`.

    A page must not fail because nobody can say why a job waits.
    """

    def decorate(method):
        @wraps(method)
        def read(self):
            try:
                # An error must not end a caller's transaction. Open none here: on SQLite it may lock.
                in_block = connections[Job.objects.db].in_atomic_block
                with transaction.atomic(Job.objects.db) if in_block else nullcontext():
                    return method(self)
            except Error as error:
                logger.warning("%s cannot be read: %r", method.__name__, error)
                return default

        return cached_property(read)

    return decorate


class Facts:
    """What the sentences need to know, and parts of them. A sentence is empty if it is not true."""

    def __init__(self, jobs=(), for_staff=False):
        self.jobs, self.for_staff = jobs, for_staff

    def has_passed(self, time):
        """Return whether it is later than this time. The database is only asked if this machine says so."""
        return bool(time) and time < timezone.now() and time < self.now

    @cached_property
    def now(self):
        return database_time()

    # Pauses and limits

    @cached_property
    def pauses(self):
        return {pause.name: self.paused(pause) for pause in Pause.objects.all()}

    def paused(self, pause):
        text = f"Paused for {span(timezone.now() - pause.since)}"
        return f"{text}: {pause.reason}" if pause.reason else text

    @cached_property
    def used(self):
        """How many slots of each key are used, for which one of the jobs waits."""
        keys = {job.blocked_by for job in self.jobs if job.blocked_by and job.state == "queued"}
        rows = with_slot().filter(limit_key__in=keys).order_by().values_list("limit_key")
        return dict(rows.annotate(Count("pk")))

    def turn(self, key):
        """Say why a job waits that this limit blocks."""
        limit, used = limit_of(key), self.used.get(key, 0)
        if used >= limit.running > 0:
            return f"Waiting: limit {key} is full ({used} of {limit.running} running)"
        if limit.rate:
            return f"Waiting: limit {key} starts at most {limit.rate}"
        return f"Waiting: limit {key}"

    def needs_sweep(self, key):
        """Return whether only Beat admits a job of this key: no run that ends has a slot for it."""
        return self.used.get(key, 0) < limit_of(key).running

    # Beat

    @fact(None)
    def sweep(self):
        """The row of the sweeper, in a list. Empty if Beat has never run, None if that is unknown."""
        return list(Sweep.objects.annotate(age=Now() - F("ended_at"))[:1])

    @cached_property
    def beat(self):
        """The sentence that Beat does not respond."""
        if self.sweep is None:
            return ""
        if not self.sweep:
            return "Beat does not run, and never did"
        [row] = self.sweep
        most = timedelta(seconds=conf.LEASE_SECONDS + 2 * conf.SWEEP_SECONDS)
        return f"Beat does not run: its last sweep ended {span(row.age)} ago" * (row.age > most)

    @cached_property
    def standstill(self):
        """The sentence that nothing can move. If the database is locked, the sweeper waits, too."""
        if not self.beat:
            return ""
        is_known = self.workers is not None
        return self.lock or (NO_HEARTBEAT if is_known and not self.alive else "")

    @fact("")
    def lock(self):
        """The sentence that another process has locked the table of jobs."""
        connection = connections[Job.objects.db]
        if connection.vendor != "postgresql":
            return ""
        with connection.cursor() as cursor:
            cursor.execute(TABLE_LOCK, [Job._meta.db_table])
            found = cursor.fetchone()
        if not found:
            return ""
        pid, age = found
        by = f", by process {pid} for {span(age)}" if self.for_staff and age else ""
        return f"The database is locked{by}: no job can start or end"

    # Workers

    @fact(None)
    def workers(self):
        """All rows of workers, also of those that do not respond. None if they cannot be read."""
        return list(Worker.objects.annotate(age=Now() - F("seen_at")))

    @cached_property
    def alive(self):
        most = timedelta(seconds=STALE_SECONDS)
        return {worker.name: worker for worker in self.workers or () if worker.age < most}

    def is_alive(self, name, since):
        """Return whether the worker with this name is alive, and is the one that ran then."""
        return name in self.alive and self.alive[name].started_at < since

    def takers(self, queue):
        return [worker for worker in self.alive.values() if queue in worker.queues]

    def no_worker(self, queue):
        if self.workers is None or self.takers(queue):
            return ""
        text = f"No worker takes jobs from the queue {queue}"
        if lost := [worker for worker in self.alive.values() if not worker.queues]:
            are = pluralize(len(lost), "is,are")
            return (
                f"{text}: {len(lost)} of {len(self.alive)} {are} ending or cannot reach the broker"
            )
        ages = [worker.age for worker in self.workers if queue in worker.queues]
        return f"{text}: the last one stopped responding {span(min(ages))} ago" if ages else text

    def no_slot(self, queue):
        """The sentence that all slots of this queue are busy."""
        takers = self.takers(queue)
        slots, busy = (sum(getattr(w, name) for w in takers) for name in ("slots", "busy"))
        text = f"Waits for a free slot: {busy} of {slots} of the queue {queue} are busy"
        return text if takers and busy >= slots else ""

    # Messages

    @cached_property
    def refused(self):
        """{queue: error} of the last sweep, for queues for which the broker has taken no message.

        Without Beat, nobody knows: the broker may run again.
        """
        return (self.sweep and not self.beat and self.sweep[0].refused) or {}

    def refusal(self, queue):
        if queue not in self.refused:
            return ""
        text = f"The broker takes no message for the queue {queue}"
        return f"{text}: {self.refused[queue]}" if self.for_staff else text

    # What else has happened

    @fact({})
    def errors(self):
        """{id: error} of the last failed run, for queued jobs that have one."""
        failed = [
            job.pk for job in self.jobs if job.state == "queued" and (job.retries or job.crashes)
        ]
        rows = Failure.objects.filter(job__in=failed).order_by("pk")
        errors = rows.values_list("job", "error")
        return {pk: error.strip().partition("\n")[0][:300] for pk, error in errors}

    @fact(0)
    def stalled_jobs(self):
        return Job.objects.filter(state="running", sweep_at__lt=Now()).count()
