"""Reasons: what a job waits for or why it does not move, and what is wrong with the whole system.

Nothing is stored: whoever reads a job asks here, so the reason is known even if no worker and no Beat runs.
A fact is read when the first job needs it. Jobs that run, have ended, or have just become due need few.
"""

from contextlib import contextmanager
from datetime import timedelta

from django.db import OperationalError, connection, transaction
from django.db.models import Count, F, OuterRef, Subquery
from django.template.defaultfilters import pluralize
from django.utils import timezone
from django.utils.functional import cached_property

from durable_jobs import conf
from durable_jobs.batches import newest_active
from durable_jobs.database import Now
from durable_jobs.enqueue import database_time
from durable_jobs.exceptions import OVER_TIME_LIMIT
from durable_jobs.limits import limit_of
from durable_jobs.messages import find_task
from durable_jobs.models import Batch, Failure, Job, Pause, Sweep
from durable_jobs.states import HAS_SLOT, STALLED
from durable_jobs.statistics import alive, by_queue

PATIENCE = timedelta(seconds=10)  # for which a due job may wait before a cause is looked for
TIMEOUTS = (
    "SELECT set_config('lock_timeout', '2s', true), set_config('statement_timeout', '15s', true)"
)
# Who has locked a table of jobs as a whole, as migrations do
BLOCKERS = """
SELECT l.relation::regclass::text, l.pid, now() - a.xact_start, left(a.query, 100)
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.granted AND l.mode = 'AccessExclusiveLock' AND l.pid != pg_backend_pid()
AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
AND l.relation::regclass::text LIKE '%durable_jobs_%' AND a.xact_start IS NOT NULL
"""
NO_HEARTBEAT = "No heartbeat from Beat or any worker: they are down or can't reach the database"


def reasons(jobs, for_staff=False):
    """Return {id: a text} for those of these jobs of which there is something to say.

    With `for_staff`, it may quote exceptions. It has no time of day, because the reader's time zone is unknown.
    """
    facts, texts_by_id = Facts(jobs, for_staff), {}
    for job in jobs:
        if texts := list(filter(None, texts_of(job, facts))):
            texts_by_id[job.pk] = ". ".join(text.rstrip(".") for text in texts)
    return texts_by_id


def reasons_of_batches(rows, for_staff=False):
    """Return {id: the reason of its newest active job, which starts last}, for those of these batches that have one."""
    still_open = Batch.objects.filter(pk__in=[batch.pk for batch in rows if batch.ended_at is None])
    newest = dict(still_open.values_list("pk", Subquery(newest_active(OuterRef("pk")))))
    jobs = Job.objects.filter(pk__in=filter(None, newest.values()))
    jobs = jobs.defer("args", "kwargs", "cursor", "steps", "result")
    texts = reasons(jobs, for_staff) if newest else {}
    return {pk: texts[job] for pk, job in newest.items() if job in texts}


@contextmanager
def in_time():
    """Give up when a table stays locked, with an OperationalError that says by whom."""
    try:
        with transaction.atomic():
            if connection.vendor == "postgresql" and conf.SET_CONFIG:
                with connection.cursor() as cursor:
                    cursor.execute(TIMEOUTS)
            yield
    except OperationalError as error:
        if not (found := blockers()):
            raise
        raise OperationalError(". ".join(found)) from error


def blockers():
    """Return a sentence about each process that has locked a table of jobs."""
    if connection.vendor != "postgresql":
        return []
    with connection.cursor() as cursor:
        cursor.execute(BLOCKERS)
        return [
            f"The process {pid} of PostgreSQL has locked {table} for {span(age)}: {query}"
            for table, pid, age, query in cursor.fetchall()
        ]


def overview():
    """Return what by_queue() does, and sentences about what is wrong with the whole system, for staff."""
    try:
        with in_time():
            rows = by_queue()
            return rows, problems(rows)
    except OperationalError as error:
        return [], [str(error)]


def problems(rows):
    facts = Facts(for_staff=True)
    texts = [facts.standstill or facts.beat]
    for row in rows:
        count = row.get("durable_jobs_waiting")
        if count and (text := facts.no_worker(row["queue"])):
            texts.append(f"{text}: {numbered(count, 'job')} waiting")
    texts += [facts.refusal(queue) for queue in facts.refused]
    if stalled := Job.objects.filter(STALLED, is_late=False).count():
        texts.append(f"The workers of {numbered(stalled, 'job')} aren't responding")
    texts += [f"{name}: {text}" for name, text in facts.pauses.items()]
    return [text for text in texts if text]


def texts_of(job, facts):
    """Yield what is to be said of a job. Some of the texts are empty."""
    if job.state == "queued":
        if job.due_at and job.due_at <= timezone.now():
            yield from waits_for(job, facts)
        yield tries(job, facts)
    elif job.state == "running" and facts.has_passed(job.lease_ends_at):
        age = facts.now - job.lease_ends_at + timedelta(seconds=conf.LEASE_SECONDS)
        yield OVER_TIME_LIMIT if job.is_late else f"Its worker hasn't responded for {span(age)}"
        end = "fail" if job.is_late else "restart"
        yield facts.standstill or facts.beat or f"It will {end} automatically"


def waits_for(job, facts):
    """Return what a queued job that is due waits for: texts, of which some are empty."""
    if pauses := [facts.pauses[name] for name in (job.queue, job.task) if name in facts.pauses]:
        return pauses
    is_late = facts.has_passed(job.due_at + PATIENCE)
    if is_late and facts.standstill:
        return [facts.standstill]
    if job.blocked_by:
        return [facts.limit(job.blocked_by), is_late and facts.beat]
    if not is_late:
        return []
    refusal = not job.times_sent and facts.refusal(job.queue)
    return [refusal or facts.no_worker(job.queue) or facts.no_slot(job.queue), facts.beat]


def tries(job, facts):
    """Say which try comes next, and why the last one has ended."""
    texts = []
    if job.retries:
        most = getattr(find_task(job.task), "max_retries", None)
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


class Facts:
    """What the reasons are based on, each read when it is needed. A sentence is empty if it is not true."""

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
        """{key: how many of its slots are used}, for the keys that these jobs wait for."""
        keys = {job.blocked_by for job in self.jobs if job.blocked_by and job.state == "queued"}
        rows = Job.objects.filter(HAS_SLOT, limit_key__in=keys).values_list("limit_key")
        return dict(rows.annotate(Count("pk")))

    def limit(self, key):
        """Say why a job waits that this limit blocks."""
        limit, used = limit_of(key), self.used.get(key, 0)
        if 0 < limit.running <= used:
            return f"Waiting: limit {key} is full ({used} of {limit.running} slots taken)"
        if limit.rate:
            return f"Waiting: limit {key} allows at most {limit.rate}"
        # It is Limit(running=0) if the limit is gone.
        return f"Waiting: limit {key}" + ("" if limit.running else " no longer exists")

    # Beat

    @cached_property
    def sweep(self):
        """The row of the sweeper, or None if Beat has never run."""
        return Sweep.objects.annotate(age=Now() - F("ended_at")).first()

    @cached_property
    def beat(self):
        """The sentence that Beat does not respond."""
        if not self.sweep:
            return "Beat has never run"
        most = timedelta(seconds=conf.LEASE_SECONDS + 2 * conf.SWEEP_SECONDS)
        age = self.sweep.age
        return f"Beat is down: last seen {span(age)} ago" if age > most else ""

    @cached_property
    def standstill(self):
        """The sentence that nothing can move."""
        return NO_HEARTBEAT if self.beat and not self.workers else ""

    # Workers

    @cached_property
    def workers(self):
        return list(alive())

    def takers(self, queue):
        return [worker for worker in self.workers if queue in worker.queues]

    def no_worker(self, queue):
        return "" if self.takers(queue) else f"No worker consumes the queue {queue}"

    def no_slot(self, queue):
        """The sentence that all slots of this queue are busy."""
        takers = self.takers(queue)
        slots, busy = (sum(getattr(w, name) for w in takers) for name in ("slots", "busy"))
        text = f"Waiting for a free slot: {busy} of {slots} slots of the queue {queue} are taken"
        return text if busy >= slots else ""

    # Messages

    @cached_property
    def refused(self):
        """{queue: error} of the sweeper's last round, for queues for which the broker has taken no message.

        Without Beat, nobody knows: the broker may run again.
        """
        return {} if self.beat else self.sweep.refused

    def refusal(self, queue):
        if queue not in self.refused:
            return ""
        text = f"The broker refuses messages for the queue {queue}"
        return f"{text}: {self.refused[queue]}" if self.for_staff else text

    @cached_property
    def errors(self):
        """{id: error} of the last failed run, for jobs that have one."""
        failed = [job.pk for job in self.jobs if job.retries or job.crashes]
        rows = Failure.objects.filter(job__in=failed).order_by("pk").values_list("job", "error")
        return {pk: error.strip().partition("\n")[0][:300] for pk, error in rows}
