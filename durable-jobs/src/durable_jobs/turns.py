"""Turns: jobs that wait until a limit or a pause lets them go. They are *held*.

A held job is queued, but it has no message, and `sweep_at` is empty, so that the sweep does not see it.
`held_by` says for what it waits: the key of a limit such as "tenant:7", see limits.py, or a pause such as
"pause:io". A pause is like a limit that allows nothing while it lasts, and everything afterwards.

A job with a limit is held when it is stored. It occupies a *place* of its key from the moment at which it is
let go until its row says that it has ended, or is held again. So no counter can be wrong: the places in use
are the rows with this key and a `sweep_at`.

- After a job was stored, cancelled or recovered, grant() lets the oldest held jobs go, under a lock for the key.
- A run that ends hands its place over to the next job, in the transaction that ends it: no lock, no new place.
  If the limit has a rate, it calls grant() afterwards.
- The sweep calls let_due_go(): for countdowns, rates, and for places that nobody has handed over.

A job that is cancelled while its body runs keeps its place: `sweep_at` stays the end of its lease.

A paused job is held when a worker claims it, or when the sweep would send it.
"""

import hashlib
import logging
import time
from datetime import timedelta
from math import inf

from celery import current_app
from celery.utils.functional import chunks
from django.apps import apps
from django.db import Error, connections, transaction
from django.db.models import Count, F, Min, OuterRef, Q, Subquery, Value
from django.db.models.expressions import RawSQL
from django.db.models.functions import Coalesce, Concat, Now

from . import conf, updates
from .database import timeouts
from .expressions import IN_CANCELLED_BODY, QUEUED, is_paused
from .limits import PAUSE, limit_of, name_of
from .messages import MESSAGE_FIELDS
from .publish import publish

logger = logging.getLogger(__name__)

AT_ONCE = 100  # jobs that grant() sends, because their arguments may be large
KEYS_AT_ONCE = 100  # in a transaction
MOST = 5000  # jobs of a key that the sweep lets go in a round, and keys that it looks at
PAGE = 500  # jobs that are held in a transaction
PAGES = 10  # in a round of the sweep
STRAY_SECONDS = 600  # until jobs of an unknown limit go: other processes may have newer settings
UNKNOWN_SECONDS = 60  # until a job of a task that a worker does not know may have its turn again
MAX_PLACES = 2**31  # if the number of free places is known
last_key = ""  # the sweep continues after this key


# models.py imports this module.


def job_manager():
    return apps.get_model("durable_jobs.Job").objects


def pause_manager():
    return apps.get_model("durable_jobs.Pause").objects


def start_manager():
    return apps.get_model("durable_jobs.Start").objects.using(job_manager().db)


def with_place():
    """Return the jobs that occupy a place."""
    return job_manager().filter(limit_key__isnull=False, sweep_at__isnull=False)


# Pauses


def paused_names():
    return list(pause_manager().values_list("name", flat=True))


def hold(jobs):
    """Hold those of these queued jobs that are paused. Returns how many there were."""
    of_job = pause_manager().filter(Q(name=OuterRef("queue")) | Q(name=OuterRef("task")))
    held_by = Concat(Value(PAUSE), Subquery(of_job.values("name")[:1]))
    changes = {"held_by": held_by, "sweep_at": None, "times_sent": 0}
    due_at = Coalesce("due_at", Now())  # empty in rows of the first version
    return jobs.filter(QUEUED, is_paused()).update(**changes, due_at=due_at)


def put_off(jobs):
    """Take the places away from those of these jobs that have not started, for UNKNOWN_SECONDS."""
    due_at = Now() + timedelta(seconds=UNKNOWN_SECONDS)
    changes = {"held_by": F("limit_key"), "sweep_at": None, "times_sent": 0, "due_at": due_at}
    jobs.filter(QUEUED, held_by=None, limit_key__isnull=False).update(**changes)


def hold_pages(jobs):
    """Hold those of the first ones of these jobs that are paused. Returns whether more may be left."""
    for _ in range(PAGES):
        with transaction.atomic():
            page = updates.locking(jobs).values_list("pk", flat=True)[:PAGE]
            held = hold(job_manager().filter(pk__in=list(page)))
        if held < PAGE:
            return False
    return True


def hold_due(paused):
    """Hold the jobs that the sweep would send although they are paused. Returns whether more may be left."""
    due = job_manager().filter(is_paused(paused), state="queued", sweep_at__lt=Now())
    return bool(paused) and hold_pages(due)


def resume(key):
    """After a pause, let its jobs go."""
    try:
        grant([key, *give_back(key)])
    except Error as error:
        logger.warning("the sweep will let jobs of %s go: %r", key, error)


def give_back(key):
    """After a pause, let other pauses or their limits hold its jobs. Returns the keys of these limits."""
    jobs, keys = job_manager().filter(held_by=key), set()
    for _ in range(PAGES):
        with transaction.atomic():
            others = updates.locking(jobs.filter(Q(limit_key__isnull=False) | is_paused()))
            page = dict(
                others.order_by("due_at", "created_at").values_list("pk", "limit_key")[:PAGE]
            )
            if not page:
                break
            hold(jobs.filter(pk__in=page))
            rows = jobs.filter(pk__in=page, limit_key__isnull=False)
            rows.update(held_by=F("limit_key"))
            keys |= set(page.values()) - {None}
    return keys


# Letting jobs go

# When the sweep sends them: in the order of `due_at`, and in which they were stored.
IN_ORDER = "CASE WHEN created_at > due_at THEN created_at ELSE due_at END"
# The oldest held jobs of a key, at most `number`, if fewer than `most` places are in use. PostgreSQL chooses
# an array only once, and plans it faster than a WITH. With NOT EXISTS, it would expect to find no job, and
# read and sort all.
TAKE = """
UPDATE durable_jobs_job SET held_by = NULL, times_sent = %(times_sent)s, sweep_at = {sweep_at}
WHERE id {among}(
    SELECT id FROM durable_jobs_job WHERE held_by = %(key)s AND due_at <= {due}
    AND (SELECT COUNT(*) FROM durable_jobs_job WHERE limit_key = %(key)s AND sweep_at IS NOT NULL) < %(most)s
    AND queue NOT IN (SELECT name FROM durable_jobs_pause) AND task NOT IN (SELECT name FROM durable_jobs_pause) {also}
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
# The oldest held job of each key after one. This reads one index entry of each key; DISTINCT would read all.
HEADS = """
WITH RECURSIVE keys(name) AS (
    SELECT MIN(held_by) FROM durable_jobs_job WHERE held_by > %s UNION ALL
    SELECT (SELECT MIN(held_by) FROM durable_jobs_job WHERE held_by > keys.name) FROM keys WHERE name IS NOT NULL
)
SELECT (SELECT id FROM durable_jobs_job WHERE held_by = keys.name ORDER BY due_at, created_at LIMIT 1)
FROM keys LIMIT %s
"""


def take(key, number, most=MAX_PLACES, is_sent=True, late=0):
    """Let held jobs of this key go, if fewer than `most` places are in use. Returns them, the oldest first.

    With `is_sent`, the caller sends their messages. Otherwise the sweep does, and only their ids are loaded.
    `late` is for how many seconds they must have been due.
    """
    manager, columns = job_manager(), []
    dialect = DIALECTS[connections[manager.db].vendor]
    sweep_at = dialect["later"] if is_sent else IN_ORDER
    due = dialect["later"] if late else dialect["now"]
    params = {"key": key, "number": number, "most": most, "times_sent": int(is_sent)}
    params["seconds"] = conf.RESEND_SECONDS if is_sent else -late
    if is_sent:
        columns = [manager.model._meta.get_field(name).column for name in MESSAGE_FIELDS]
    fields = ", ".join(["id", "due_at", "created_at", *columns])
    # After a pause, a job with a limit waits for that: see give_back().
    also = "AND limit_key IS NULL" if key.startswith(PAUSE) else ""
    sql = TAKE.format(**dialect, due=due, sweep_at=sweep_at, fields=fields, also=also)
    jobs = manager.raw(sql, params)
    return sorted(jobs, key=lambda job: (job.due_at, job.created_at))


def grant(keys):
    """Let held jobs of these keys go, and send their messages. Raises no error: the sweep tries again."""
    sent = set()
    try:
        for some in chunks(iter(sorted(keys)), KEYS_AT_ONCE):
            while jobs := [job for job in let_go(with_room(some)) if job.pk not in sent]:
                publish(jobs)
                sent |= {job.pk for job in jobs}
                # In eager mode, these jobs have ended now, so others may go.
                if not current_app.conf.task_always_eager:
                    break
            if len(sent) >= AT_ONCE:
                break
    except Error as error:
        logger.warning("the sweep will let jobs of %s go: %r", ", ".join(keys)[:200], error)


def grant_after_commit(keys, using="default"):
    if keys:
        transaction.on_commit(lambda: grant(keys), using=using, robust=True)


def with_room(keys):
    """Return those of these keys that have free places, without a lock.

    No job is overlooked: whoever frees a place commits that before it looks for held jobs, and whoever stores
    a job commits that before it looks for a place.
    """
    return [key for key, number in free_places(keys).items() if number > 0]


def let_go(keys, is_sent=True, skip_locked=False):
    """Let as many held jobs of these keys go as may start now. Returns them, the oldest of each key first.

    `keys` is what with_room() returns. With `is_sent`, at most AT_ONCE. With `skip_locked`, leave out the keys that another process has locked.
    """
    if not keys:
        return []
    settings, jobs = timeouts(), []
    with transaction.atomic(job_manager().db):
        for key, number in free_places(lock(keys, settings, skip_locked)).items():
            number = min(number, AT_ONCE - len(jobs)) if is_sent else number
            if number > 0:
                jobs += take(key, number, is_sent=is_sent)
    return jobs


def lock(keys, settings, skip_locked):
    """Lock these keys until the transaction ends. Returns those that are locked. `settings`: see timeouts()."""
    connection = connections[job_manager().db]
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


def limits_of(keys):
    """Return {key: its Limit}, without pauses."""
    return {key: limit_of(key) for key in keys if not key.startswith(PAUSE)}


def free_places(keys):
    """Return {key: how many held jobs may go}. A number is negative if the limit was lowered."""
    limits = limits_of(keys)
    free = dict.fromkeys(keys, MOST)
    if len(limits) < len(free):
        free |= dict.fromkeys(free.keys() & {PAUSE + name for name in paused_names()}, 0)
    # Count what has not started before the starts: a job that starts meanwhile is counted twice, not never.
    used, unstarted = dict.fromkeys(limits, 0), dict.fromkeys(limits, 0)
    rows = with_place().filter(limit_key__in=limits).order_by().values_list("limit_key")
    for key, count, queued in rows.annotate(count=Count("pk"), queued=Count("pk", filter=QUEUED)):
        used[key], unstarted[key] = count, queued
    starts = {key: count for key, (count, _) in starts_in_period(limits).items()}
    for key, limit in limits.items():
        by_rate = limit.starts - unstarted[key] - starts.get(key, 0)
        free[key] = min(free[key], limit.running - used[key], by_rate)
    return free


def starts_in_period(limits):
    """Return {key: (how many of its jobs have started in the period, the first of them before how long)}."""
    found = {}
    for period in {limit.period for limit in limits.values() if limit.rate}:
        keys = [key for key, limit in limits.items() if limit.period == period]
        rows = start_manager().filter(key__in=keys, started_at__gt=Now() - period).order_by()
        rows = rows.values_list("key").annotate(count=Count("pk"), age=Now() - Min("started_at"))
        found |= {key: (count, age) for key, count, age in rows}
    return found


# The sweep


def let_due_go():
    """Hold what is paused, and let held jobs go, for the sweep to send. It takes DURABLE_JOBS['SWEEP_SECONDS'] at most.

    Returns in how many seconds the next held job is due, and in how many a rate may let one go.
    """
    until, paused = time.monotonic() + conf.SWEEP_SECONDS, paused_names()
    seconds, due, blocked = 0 if hold_due(paused) else inf, set(), []
    for key, queue, task, wait in heads():
        if wait > timedelta():
            seconds = min(seconds, wait.total_seconds())
            continue
        due.add(key)
        if key.startswith(PAUSE):
            due |= set() if key.removeprefix(PAUSE) in paused else give_back(key)
        elif queue in paused or task in paused:
            blocked.append(key)
        elif name_of(key) not in conf.LIMITS and wait.total_seconds() < -STRAY_SECONDS:
            logger.warning("jobs of %s go: there is no such limit in DURABLE_JOBS['LIMITS']", key)
            take(key, MOST, is_sent=False, late=STRAY_SECONDS)
    # Paused jobs must not be in the way of others with the same limit.
    if blocked and hold_pages(job_manager().filter(is_paused(), held_by__in=blocked)):
        seconds = 0
    for some in chunks(iter(with_room(due)), KEYS_AT_ONCE):
        if let_go_for_sweep(some) >= MOST or time.monotonic() > until:
            seconds = 0  # there may be more
            break
    limits = limits_of(due)
    rated, starts = {key for key in limits if limits[key].rate}, starts_in_period(limits)
    # Also if the rate has starts left: the next runs may use them up, and then nobody else looks again.
    ages = {key: starts[key][1] if key in starts else timedelta() for key in rated}
    waits = [(limits[key].period - age).total_seconds() for key, age in ages.items()]
    return seconds, min(waits, default=inf)


def let_go_for_sweep(keys):
    """Call let_go() for these keys. If it fails, call it for each of them: one key must not stop the others."""
    try:
        return len(let_go(keys, is_sent=False, skip_locked=True))
    except Error as error:
        if len(keys) > 1:
            return sum(let_go_for_sweep([key]) for key in keys)
        logger.warning("jobs of %s are held until the next round: %r", keys[0], error)
        return 0


def heads():
    """Return key, queue, task and the wait of the oldest held job of each key: of MOST keys in a round."""
    global last_key
    rows = job_manager().filter(pk__in=RawSQL(HEADS, [last_key, MOST]))  # noqa: S611
    fields = "held_by", "queue", "task", F("due_at") - Now()
    rows = list(rows.order_by("held_by").values_list(*fields))
    last_key = rows[-1][0] if len(rows) >= MOST else ""
    return rows


# A run


def claim(manager, limit_key, **fields):
    """Call updates.claim(). If the limit has a rate, store the start, too."""
    if limit_key is None or not limit_of(limit_key).rate:
        return updates.claim(manager, **fields)
    with transaction.atomic(manager.db):
        claimed = updates.claim(manager, **fields)
        if claimed:
            start_manager().create(key=limit_key)
    return claimed


def hand_over(key):
    """In the transaction that ends a run, let the next job of its key have its place. Returns [job] or [].

    This needs no lock, because it changes no number: until the commit, others count the old job.
    """
    limit = limit_of(key)
    return [] if limit.rate else take(key, 1, limit.running)


def after_run(run):
    """Free the place of a run that has handed it to no other job, and let the next one go."""
    try:
        if not run.has_written:
            free_cancelled(run.job_id, run.claim_fields["crashes"])
        if a_held(job_manager(), held_by=run.limit_key):
            grant([run.limit_key])
    except Error as error:
        logger.warning("the sweep frees a place of %s: %r", run.limit_key, error)


@updates.prepared()
def a_held(manager, held_by):
    """Return the id of a job that this key holds, in a list."""
    return manager.filter(held_by=held_by).values_list("pk")[:1], None


def free_cancelled(pk, crashes):
    """Free the place of a job that is cancelled, if the body that has ended is that of its last run.

    `crashes` says which run it was: a newer one has counted its crash, unless the job was run again.
    """
    job = job_manager().filter(IN_CANCELLED_BODY, pk=pk, crashes=crashes)
    keys = list(job.values_list("limit_key", flat=True))
    if job.update(sweep_at=None):
        grant(keys)


def keys_of_queued(jobs):
    """Return the keys of those of these jobs that have not started: some may have a place, or get one now."""
    if not conf.LIMITS:  # spare the query
        return set()
    rows = jobs.filter(QUEUED, limit_key__isnull=False).order_by()
    return set(rows.values_list("limit_key", flat=True).distinct())


def delete_old_starts():
    # A day: another process may have newer settings.
    periods = [limit_of(name).period for name in conf.LIMITS]
    longest = max([timedelta(days=1), *periods])
    start_manager().filter(started_at__lt=Now() - longest).delete()


def ignore_limits(jobs):
    """Let these held jobs go, except paused ones. Eager mode runs one job at a time, and never waits."""
    held = jobs.filter(held_by__isnull=False).exclude(held_by__startswith=PAUSE)
    held.update(held_by=None, sweep_at=Now())
