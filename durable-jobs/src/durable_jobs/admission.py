"""Admission: jobs wait until their limit admits them. Until then they are *blocked*.

A blocked job is queued, but it has no message, and `sweep_at` is empty, so that the sweeper does not see it.
`blocked_by` is the key of its limit, such as "tenant:7": see limits.py.

A job with a limit is blocked when it is stored. It occupies a *slot* of its key from the moment it is admitted
until its row says that it has ended, or is blocked again. So no counter can be wrong: the slots in use are the
rows with this key and a `sweep_at`.

- After a job was stored, cancelled or recovered, admit() admits the oldest blocked jobs, under a lock for the key.
- A run that ends hands its slot over to the next job, in the transaction that ends it: no lock, no new slot. If
  the limit has a rate, it calls admit() afterwards.
- A rate has a row for each key, with the time of the next start. A run that starts moves it forward.
- The sweeper admits due jobs: after countdowns, for rates, and for slots that nobody has handed over.

A job that is cancelled while its task function runs keeps its slot: `sweep_at` stays the end of its lease.

Nobody admits, sends or claims a paused job. If a worker has its message, put_back() takes it away.
"""

import hashlib
import logging
import time
from datetime import timedelta
from math import inf

from celery import current_app
from celery.utils.functional import chunks
from django.db import Error, connections, transaction
from django.db.models import Case, Count, F, When
from django.db.models.expressions import RawSQL
from django.db.models.functions import Greatest, Now

from durable_jobs import conf, transitions
from durable_jobs.database import Clock, timeouts
from durable_jobs.limits import limit_of
from durable_jobs.messages import MESSAGE_FIELDS
from durable_jobs.models import Job, Key, Pause
from durable_jobs.publish import publish
from durable_jobs.states import QUEUED, STILL_RUNNING
from durable_jobs.transitions import is_paused

logger = logging.getLogger(__name__)

AT_ONCE = 100  # jobs that admit() sends, because their arguments may be large
KEYS_AT_ONCE = 100  # in a transaction
MOST = 5000  # jobs of a key that the sweeper admits in a round, and keys that it looks at
MAX_SLOTS = 2**31  # if the number of free slots is known


def with_slot():
    """Return the jobs that occupy a slot."""
    return Job.objects.filter(limit_key__isnull=False, sweep_at__isnull=False)


# Pauses


def paused_names():
    return list(Pause.objects.values_list("name", flat=True))


def put_back(jobs):
    """Take the slots and the messages of those of these queued jobs that are paused. Returns how many there were.

    Those without a limit stay due, so the sweeper sends them when the pause has ended.
    """
    sweep_at = Case(When(limit_key=None, then=Greatest("due_at", "created_at")))
    changes = {"blocked_by": F("limit_key"), "sweep_at": sweep_at, "times_sent": 0}
    return jobs.filter(QUEUED, is_paused()).update(**changes)


# Admitting jobs

# When the sweeper sends them: in the order of `due_at`, and in which they were stored.
IN_ORDER = "CASE WHEN created_at > due_at THEN created_at ELSE due_at END"
# The oldest blocked jobs of a key, at most `number`, if fewer than `most` slots are in use. PostgreSQL chooses
# an array only once, and plans it faster than a WITH. With NOT EXISTS, it would expect to find no job, and
# read and sort all.
TAKE = """
UPDATE durable_jobs_job SET blocked_by = NULL, times_sent = %(times_sent)s, sweep_at = {sweep_at}
WHERE id {among}(
    SELECT id FROM durable_jobs_job WHERE blocked_by = %(key)s AND due_at <= {now}
    AND (SELECT COUNT(*) FROM durable_jobs_job WHERE limit_key = %(key)s AND sweep_at IS NOT NULL) < %(most)s
    AND queue NOT IN (SELECT name FROM durable_jobs_pause) AND task NOT IN (SELECT name FROM durable_jobs_pause)
    ORDER BY due_at, created_at LIMIT %(number)s {lock}
){end} RETURNING {fields}
"""
DIALECTS = {
    "postgresql": {
        "among": "= ANY(ARRAY",
        "end": ")",
        "now": "STATEMENT_TIMESTAMP()",
        "later": "STATEMENT_TIMESTAMP() + %(seconds)s * INTERVAL '1 second'",
        "lock": "FOR UPDATE SKIP LOCKED",  # a grant and a run that ends may look at the same job
    },
    "sqlite": {
        "among": "IN ",
        "end": "",
        "now": "STRFTIME('%%Y-%%m-%%d %%H:%%M:%%f000', 'NOW')",
        "later": "STRFTIME('%%Y-%%m-%%d %%H:%%M:%%f000', 'NOW', %(seconds)s || ' seconds')",
        "lock": "",
    },
}
# The oldest blocked job of each key after one. This reads one index entry of each key; DISTINCT would read all.
HEADS = """
WITH RECURSIVE keys(name) AS (
    SELECT MIN(blocked_by) FROM durable_jobs_job WHERE blocked_by > %s UNION ALL
    SELECT (SELECT MIN(blocked_by) FROM durable_jobs_job WHERE blocked_by > keys.name) FROM keys WHERE name IS NOT NULL
)
SELECT (SELECT id FROM durable_jobs_job WHERE blocked_by = keys.name ORDER BY due_at, created_at LIMIT 1)
FROM keys LIMIT %s
"""


def unblock(key, number, most=MAX_SLOTS, is_sent=True):
    """Unblock jobs of this key, if fewer than `most` slots are in use. Returns them, the oldest first.

    With `is_sent`, the caller sends their messages. Otherwise the sweeper does, and only their ids are loaded.
    """
    manager, columns = Job.objects, []
    dialect = DIALECTS[connections[manager.db].vendor]
    sweep_at = dialect["later"] if is_sent else IN_ORDER
    params = {"key": key, "number": number, "most": most, "times_sent": int(is_sent)}
    if is_sent:
        params["seconds"] = conf.RESEND_SECONDS
        columns = [manager.model._meta.get_field(name).column for name in MESSAGE_FIELDS]
    fields = ", ".join(["id", "due_at", "created_at", *columns])
    sql = TAKE.format(**dialect, sweep_at=sweep_at, fields=fields)
    jobs = manager.raw(sql, params)
    return sorted(jobs, key=lambda job: (job.due_at, job.created_at))


def admit(keys):
    """Admit blocked jobs of these keys, and send their messages. Raises no error: the sweeper tries again."""
    sent = set()
    try:
        for some in chunks(iter(sorted(keys)), KEYS_AT_ONCE):
            while jobs := [
                job for job in unblock_many(with_free_slots(some)) if job.pk not in sent
            ]:
                publish(jobs)
                sent |= {job.pk for job in jobs}
                # In eager mode, these jobs have ended now, so others may start.
                if not current_app.conf.task_always_eager:
                    break
            if len(sent) >= AT_ONCE:
                break
    except Error as error:
        logger.warning("the sweeper will admit jobs of %s: %r", ", ".join(keys)[:200], error)


def admit_after_commit(keys):
    if keys:
        transaction.on_commit(lambda: admit(keys), using=Job.objects.db, robust=True)


def with_free_slots(keys):
    """Return those of these keys that have free slots, without a lock.

    No job is overlooked: whoever frees a slot commits that before it looks for blocked jobs, and whoever stores
    a job commits that before it looks for a slot.
    """
    return [key for key, number in free_slots(keys).items() if number > 0]


def unblock_many(keys, is_sent=True, skip_locked=False):
    """Unblock as many jobs of these keys as may start now. Returns them, the oldest of each key first.

    `keys` is what with_free_slots() returns. With `is_sent`, at most AT_ONCE. With `skip_locked`, leave out the keys that another process has locked.
    """
    if not keys:
        return []
    settings, jobs = timeouts(), []
    with transaction.atomic(Job.objects.db):
        for key, number in free_slots(lock(keys, settings, skip_locked)).items():
            number = min(number, AT_ONCE - len(jobs)) if is_sent else number
            if number > 0:
                jobs += unblock(key, number, is_sent=is_sent)
    return jobs


def lock(keys, settings, skip_locked):
    """Lock these keys until the transaction ends. Returns those that are locked. `settings`: see timeouts()."""
    connection = connections[Job.objects.db]
    if connection.vendor != "postgresql":
        return keys  # SQLite has only one writer
    digests = {key: hashlib.sha256(key.encode()).digest()[:8] for key in keys}
    ids = {int.from_bytes(digest, signed=True): key for key, digest in digests.items()}
    function = "PG_TRY_ADVISORY_XACT_LOCK" if skip_locked else "PG_ADVISORY_XACT_LOCK"
    with connection.cursor() as cursor:
        # In order, so that two processes never wait for each other.
        columns = "".join(f"{each.template % each.extra}, " for each in settings)
        sql = f"SELECT id, {columns}{function}(id) FROM UNNEST(%s::bigint[]) id"  # noqa: S608
        cursor.execute(sql, [sorted(ids)])
        return [ids[id] for id, *_, is_locked in cursor.fetchall() if is_locked is not False]


def free_slots(keys):
    """Return {key: how many blocked jobs may start}. A number is negative if the limit was lowered."""
    limits, free = {key: limit_of(key) for key in keys}, {}
    # Before the times of rates: a job that starts meanwhile then counts twice, not never.
    used, unstarted = dict.fromkeys(limits, 0), dict.fromkeys(limits, 0)
    rows = with_slot().filter(limit_key__in=limits).order_by().values_list("limit_key")
    for key, count, queued in rows.annotate(count=Count("pk"), queued=Count("pk", filter=QUEUED)):
        used[key], unstarted[key] = count, queued
    waiting = waits(limits)
    for key, limit in limits.items():
        by_rate = 0 if key in waiting else limit.ahead - unstarted[key] if limit.rate else inf
        free[key] = min(MOST, limit.running - used[key], by_rate)
    return free


def waits(limits):
    """Return {key: the time until its rate lets a job start}, without those that do so now."""
    rated = [key for key, limit in limits.items() if limit.rate]
    rows = Key.objects.filter(pk__in=rated, next_at__gt=Now())
    return dict(rows.values_list("pk", F("next_at") - Now()))


# The sweeper


class DueJobs:
    """The sweeper's part: it admits blocked jobs that are due, MOST keys in a round."""

    def __init__(self):
        self.last_key = ""  # the next round continues after this key

    def admit(self, paused=()):
        """Do one round, for SWEEP_SECONDS at most. `paused` is what paused_names() returns.

        Returns in how many seconds the next blocked job is due, and in how many a rate may admit one.
        """
        until, seconds, due = time.monotonic() + conf.SWEEP_SECONDS, inf, set()
        if paused:  # free the slots of those jobs whose messages are missing
            late = with_slot().filter(QUEUED, is_paused(paused), sweep_at__lt=Now())
            with transaction.atomic():
                put_back(transitions.skip_locked(late))
        for key, wait in self.oldest_of_keys():
            if wait > timedelta():
                seconds = min(seconds, wait.total_seconds())
            else:
                due.add(key)
        for some in chunks(iter(with_free_slots(due)), KEYS_AT_ONCE):
            if admit_for_sweeper(some) >= MOST or time.monotonic() > until:
                seconds = 0  # there may be more
                break
        return seconds, seconds_until_rate(due)

    def oldest_of_keys(self):
        """Return the wait of the oldest blocked job of each key."""
        rows = Job.objects.filter(pk__in=RawSQL(HEADS, [self.last_key, MOST]))  # noqa: S611
        rows = list(rows.order_by("blocked_by").values_list("blocked_by", F("due_at") - Now()))
        self.last_key = rows[-1][0] if len(rows) >= MOST else ""
        return rows


def seconds_until_rate(keys):
    """Return in how many seconds the rate of one of these keys may admit a job."""
    limits = {key: limit for key in keys if (limit := limit_of(key)).rate}
    waiting = waits(limits)
    # Also if it may start one now: the job that was just admitted does, and then nobody else looks again.
    times = [waiting.get(key, limit.interval).total_seconds() for key, limit in limits.items()]
    return min(times, default=inf)


def admit_for_sweeper(keys):
    """Call unblock_many() for these keys. If it fails, call it for each of them: one key must not stop the others."""
    try:
        return len(unblock_many(keys, is_sent=False, skip_locked=True))
    except Error as error:
        if len(keys) > 1:
            return sum(admit_for_sweeper([key]) for key in keys)
        logger.warning("jobs of %s stay blocked until the next round: %r", keys[0], error)
        return 0


# A run


def claim(limit_key, **fields):
    """Call transitions.claim(). If the limit has a rate, move the time of its next start."""
    if limit_key is None or not (limit := limit_of(limit_key)).rate:
        return transitions.claim(**fields)
    with transaction.atomic():
        if claimed := transitions.claim(**fields):
            row, next_at = Key.objects.filter(pk=limit_key), Greatest("next_at", Clock())
            if not row.update(next_at=next_at + limit.interval):
                Key.objects.bulk_create([Key(key=limit_key)], ignore_conflicts=True)
                row.update(next_at=next_at + limit.interval)
    return claimed


def hand_over(key):
    """In the transaction that ends a run, let the next job of its key have its slot. Returns [job] or [].

    This needs no lock, because it changes no number: until the commit, others count the old job.
    """
    limit = limit_of(key)
    return [] if limit.rate else unblock(key, 1, limit.running)


def after_run(run):
    """Free the slot of a run that has handed it to no other job, and admit the next one."""
    try:
        if not run.has_written:
            free_cancelled(run.job_id, run.claim_fields["crashes"])
        if a_blocked(blocked_by=run.limit_key):
            admit([run.limit_key])
    except Error as error:
        logger.warning("the sweeper frees a slot of %s: %r", run.limit_key, error)


@transitions.prepared()
def a_blocked(blocked_by):
    """Return the id of a job that this key blocks, in a list."""
    return Job.objects.filter(blocked_by=blocked_by).values_list("pk")[:1], None


def free_cancelled(pk, crashes):
    """Free the slot of a job that is cancelled, if the run that has ended is its last one.

    `crashes` says which run it was: a newer one has counted its crash, unless the job was run again.
    """
    job = Job.objects.filter(STILL_RUNNING, pk=pk, crashes=crashes)
    keys = list(job.values_list("limit_key", flat=True))
    if job.update(sweep_at=None):
        admit(keys)


def keys_of_queued(jobs):
    """Return the keys of those of these jobs that have not started: some may have a slot, or get one now."""
    if not conf.LIMITS:  # spare the query
        return set()
    rows = jobs.filter(QUEUED, limit_key__isnull=False).order_by()
    return set(rows.values_list("limit_key", flat=True).distinct())


def delete_old_keys():
    Key.objects.filter(next_at__lt=Now() - timedelta(hours=1)).delete()


def ignore_limits(jobs):
    """Unblock these jobs. Eager mode runs one job at a time, and never waits."""
    jobs.filter(blocked_by__isnull=False).update(blocked_by=None, sweep_at=Now())
