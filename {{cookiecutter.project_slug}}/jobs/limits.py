"""Limits: how many jobs with the same key run at once, and how many start in a period, over all workers.

    @shared_task(base=JobTask, limit="tenant:{tenant_id}")
    JOB_LIMITS = {"tenant": "2", "openai": "5, 60/min"}

A job with a limit is *held* when it is stored: `held_by` is its key, `sweep_at` is empty, and it has no message.
It occupies a *place* of its key from the moment at which it is let go until its row says that it has ended, or
is held again. So no counter can be wrong: the places in use are the rows with this key and a `sweep_at`.

- After a job was stored, cancelled or recovered, grant() lets the oldest held jobs go, under a lock for the key.
- A run that ends hands its place over to the next job, in the transaction that ends it: no lock, no new place.
- The sweep calls let_due_go(): for countdowns, rates, and for places that nobody has handed over.

A job that is cancelled while its body runs keeps its place, and `sweep_at` stays the end of its lease. A pause
holds jobs in the same way, see pauses.py: it is a key with no place while it lasts, and without a limit then.
"""

import hashlib
import inspect
import logging
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from math import inf
from string import Formatter

from celery import current_app
from celery.utils.functional import chunks
from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.db import Error, connections, transaction
from django.db.models import Count, F, Min
from django.db.models.expressions import RawSQL
from django.db.models.functions import Now
from django.utils import timezone

from . import conf, pauses, updates
from .database import in_transaction
from .expressions import IN_CANCELLED_BODY, QUEUED
from .messages import MESSAGE_FIELDS
from .pauses import PREFIX, job_manager
from .publish import publish
from .values import Results, to_json

logger = logging.getLogger(__name__)

AT_ONCE = 100  # jobs of a key whose messages grant() sends, because their arguments may be large; keys at once
MOST = 5000  # jobs of a key that the sweep lets go at once
SECONDS = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60}
SECONDS |= {"h": 3600, "hour": 3600, "d": 86400, "day": 86400}


# What the settings and tasks say


@dataclass(frozen=True)
class Limit:
    running: float = inf  # jobs at once
    starts: float = inf  # in `period`
    period: timedelta = timedelta()
    rate: str = ""  # for people, such as "60/min"


@cache
def parse(text):
    """Return the Limit of a text such as "5", "60/min" or "5, 60/min". Raises ValueError."""
    fields = {}
    for part in str(text).split(","):
        found = re.fullmatch(
            r"([1-9]\d*)(?:/([1-9]\d*)?([a-z]+?)s?)?", part.strip().replace(" ", "")
        )
        number, times, unit = found.groups() if found else (0, None, "")
        name = "starts" if unit else "running"
        if not number or name in fields or unit not in {None, *SECONDS}:
            raise ValueError(f'{text!r} is no limit: write "5", "60/min" or "5, 60/min"')
        fields[name] = int(number)
        if unit:
            period = timedelta(seconds=int(times or 1) * SECONDS[unit])
            fields |= {"period": period, "rate": part.strip()}
    return Limit(**fields)


def limit_of(key):
    """Return the Limit of a key. Of a name that is no longer in JOB_LIMITS, it has no bounds."""
    text = conf.JOB_LIMITS.get(key.partition(":")[0])
    return Limit() if text is None else parse(text)


def check_settings(tasks):
    """Raise ImproperlyConfigured if JOB_LIMITS is invalid, or lacks the limit of one of these tasks."""
    if not isinstance(conf.JOB_LIMITS, dict):
        raise ImproperlyConfigured(
            f'JOB_LIMITS is {conf.JOB_LIMITS}: write {{"name": "5, 60/min"}}.'
        )
    for name, text in conf.JOB_LIMITS.items():
        if not re.fullmatch(r"[\w.-]+", str(name)) or name + ":" == PREFIX:
            raise ImproperlyConfigured(f"JOB_LIMITS: {name!r} cannot be the name of a limit.")
        try:
            parse(text)
        except ValueError as error:
            raise ImproperlyConfigured(f"JOB_LIMITS[{name!r}]: {error}.") from None
    for task in tasks:
        check_name(task)


def check_name(task):
    if (
        name := (getattr(task, "limit", None) or "").partition(":")[0]
    ) and name not in conf.JOB_LIMITS:
        raise ImproperlyConfigured(
            f"{task.name} has the limit {name!r}, which is not in JOB_LIMITS."
        )


def check_template(task):
    """Raise TypeError if the `limit` of this task is no text, or names an argument that it does not have."""
    if task.limit is None:
        return
    if not isinstance(task.limit, str) or not task.limit:
        raise TypeError(
            f'{task.name}: limit={task.limit!r} must be a text, such as "tenant:{{tenant_id}}"'
        )
    if "{" in task.limit.partition(":")[0]:
        raise TypeError(f"{task.name}: limit={task.limit!r} must begin with a name of JOB_LIMITS")
    if unknown := arguments_in(task.limit) - set(parameters(task)):
        raise TypeError(
            f"{task.name}: limit={task.limit!r}, but it has no argument {min(unknown)!r}"
        )


def arguments_in(template):
    """Return the names of the arguments in a text such as "tenant:{tenant_id}" or "tenant:{row[tenant]}"."""
    fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    return {re.split(r"[.[]", name)[0] for name in fields}


def parameters(task):
    """Return {name: default} of the arguments of a task."""
    body = getattr(task, "__wrapped__", task.run)
    found = inspect.signature(inspect.unwrap(body)).parameters.items()
    return {name: each.default for name, each in found}


def key_of(task, args, kwargs):
    """Return the key of a job with these arguments, or None.

    Raises TypeError if it depends on a result that is not known yet, ValueError if it is too long.
    """
    key = getattr(task, "limit", None)
    if key is None:
        return None
    check_name(task)
    if "{" in key:
        given = inspect.signature(task.__header__).bind(*args, **kwargs).arguments
        values = parameters(task) | given
        if any(isinstance(values[name], Results) for name in arguments_in(key)):
            raise TypeError(
                f"the limit of {task.name} cannot depend on the result of the step before"
            )
        key = key.format_map(values)
    if len(key) > 255:
        raise ValueError(
            f"the key of a limit has at most 255 characters, not {len(key)}: {key:.50}…"
        )
    to_json(key)  # may raise ValueError
    return key


# Letting jobs go

# When the sweep sends them: in the order of `due_at`, and in which they were stored.
IN_ORDER = "CASE WHEN created_at > due_at THEN created_at ELSE due_at END"
# The oldest held jobs of a key, at most `number`, if fewer than `most` places are in use. The WITH makes
# PostgreSQL choose them only once. A job with a limit that a pause holds must wait for its limit next.
TAKE = """
WITH next AS MATERIALIZED (
    SELECT id FROM jobs_job WHERE held_by = %(key)s AND due_at <= {now}
    AND (SELECT COUNT(*) FROM jobs_job WHERE limit_key = %(key)s AND sweep_at IS NOT NULL) < %(most)s
    AND (limit_key IS NULL OR limit_key = held_by)
    AND NOT EXISTS (SELECT 1 FROM jobs_pause WHERE name IN (queue, task))
    ORDER BY due_at, created_at LIMIT %(number)s {lock}
)
UPDATE jobs_job SET held_by = NULL, times_sent = %(times_sent)s, sweep_at = {sweep_at}
WHERE id IN (SELECT id FROM next) RETURNING {fields}
"""
DIALECTS = {
    "postgresql": {
        "now": "STATEMENT_TIMESTAMP()",
        "later": "STATEMENT_TIMESTAMP() + %(seconds)s * INTERVAL '1 second'",
        "lock": "FOR UPDATE SKIP LOCKED",  # a grant and a run that ends may look at the same job
    },
    "sqlite": {
        "now": "STRFTIME('%%Y-%%m-%%d %%H:%%M:%%f000', 'NOW')",
        "later": "STRFTIME('%%Y-%%m-%%d %%H:%%M:%%f000', 'NOW', %(seconds)s || ' seconds')",
        "lock": "",
    },
}
# The oldest held job of each key. This reads one index entry of each key, DISTINCT would read all of them.
HEADS = """
WITH RECURSIVE keys(name) AS (
    SELECT MIN(held_by) FROM jobs_job WHERE held_by IS NOT NULL UNION ALL
    SELECT (SELECT MIN(held_by) FROM jobs_job WHERE held_by > keys.name) FROM keys WHERE name IS NOT NULL
)
SELECT (SELECT id FROM jobs_job WHERE held_by = keys.name ORDER BY due_at, created_at LIMIT 1) FROM keys
"""


def take(key, number, most=2**31, is_sent=True):
    """Let held jobs of this key go, if fewer than `most` places are in use. Returns them, the oldest first.

    With `is_sent`, the caller sends their messages. Otherwise the sweep does, and only their ids are loaded.
    """
    manager, columns = job_manager(), []
    dialect = DIALECTS[connections[manager.db].vendor]
    sweep_at = dialect["later"] if is_sent else IN_ORDER
    params = {"key": key, "number": number, "most": most, "times_sent": int(is_sent)}
    if is_sent:
        params |= {"seconds": conf.JOB_RESEND_SECONDS, "number": min(number, AT_ONCE)}
        columns = [manager.model._meta.get_field(name).column for name in MESSAGE_FIELDS]
    fields = ", ".join(["id", "due_at", "created_at", *columns])
    jobs = manager.raw(TAKE.format(**dialect, sweep_at=sweep_at, fields=fields), params)
    return sorted(jobs, key=lambda job: (job.due_at, job.created_at))


def grant(keys):
    """Let held jobs of these keys go, and send their messages. Raises no error: the sweep tries again."""
    try:
        for some in chunks(iter(sorted(keys)), AT_ONCE):
            while jobs := let_go(some):
                publish(jobs)
                if not current_app.conf.task_always_eager:
                    break
    except Error as error:
        logger.warning("the sweep will let jobs of %s go: %r", ", ".join(keys)[:200], error)


def grant_after_commit(keys, using="default"):
    if keys:
        transaction.on_commit(lambda: grant(keys), using=using, robust=True)


def let_go(keys, is_sent=True, skip_locked=False):
    """Let as many held jobs of these keys go as may start now. Returns them, the oldest of each key first.

    With `skip_locked`, leave out the keys that another process has locked.
    """
    # First look without the lock. No job is overlooked: whoever frees a place commits that before it looks
    # for held jobs, and whoever stores a job commits that before it looks for a place.
    free, _ = free_places(keys)
    keys = [key for key, number in free.items() if number > 0]
    if not keys:
        return []
    settings = "" if in_transaction() else OWN_TRANSACTION
    with transaction.atomic(job_manager().db):
        keys = lock(keys, settings, skip_locked)
        free, _ = free_places(keys)
        jobs = []
        for key in keys:
            jobs += take(key, max(free[key], 0), is_sent=is_sent)
    return jobs


# The settings of expressions.LOCK_TIMEOUT and IDLE_TIMEOUT
OWN_TRANSACTION = (
    "SET_CONFIG('lock_timeout', '1s', TRUE), "
    "SET_CONFIG('idle_in_transaction_session_timeout', '10s', TRUE), "
)


def lock(keys, settings, skip_locked):
    """Let nobody else call take() for these keys until the transaction ends. Returns those that are locked."""
    connection = connections[job_manager().db]
    if connection.vendor != "postgresql":
        return keys  # SQLite has only one writer
    digests = {key: hashlib.sha256(key.encode()).digest()[:8] for key in keys}
    ids = {int.from_bytes(digest, signed=True): key for key, digest in digests.items()}
    function = "PG_TRY_ADVISORY_XACT_LOCK" if skip_locked else "PG_ADVISORY_XACT_LOCK"
    with connection.cursor() as cursor:
        # In order, so that two processes never wait for each other.
        sql = f"SELECT id, {settings}{function}(id) FROM UNNEST(%s::bigint[]) id"  # noqa: S608
        cursor.execute(sql, [sorted(ids)])
        return [ids[id] for id, *_, is_locked in cursor.fetchall() if is_locked is not False]


def free_places(keys):
    """Return {key: how many held jobs may go}, and the seconds until a rate lets the next one go.

    A number is negative if the limit was lowered.
    """
    free, seconds = dict.fromkeys(keys, MOST), inf
    if any(key.startswith(PREFIX) for key in keys):
        names = pauses.names()
        free |= {key: 0 for key in free.keys() & {PREFIX + name for name in names}}
    limits = {key: limit_of(key) for key in keys if not key.startswith(PREFIX)}
    # Count what has not started before the starts: a job that starts meanwhile is counted twice, not never.
    places = {key: (0, 0) for key in limits}
    used = with_place().filter(limit_key__in=limits).order_by().values_list("limit_key")
    used = used.annotate(count=Count("pk"), unstarted=Count("pk", filter=QUEUED))
    for key, count, unstarted in used:
        places[key] = count, unstarted
    for key, (count, _) in places.items():
        free[key] = min(free[key], limits[key].running - count)
    for period in {limit.period for limit in limits.values() if limit.rate}:
        starts = {key: (0, None) for key in limits if limits[key].period == period}
        rows = start_manager().filter(key__in=starts, started_at__gt=Now() - period).order_by()
        rows = rows.values_list("key").annotate(count=Count("pk"), age=Now() - Min("started_at"))
        starts |= {key: (count, age) for key, count, age in rows}
        for key, (count, age) in starts.items():
            free[key] = min(free[key], limits[key].starts - count - places[key][1])
            if count >= limits[key].starts:
                seconds = min(seconds, (period - age).total_seconds())
    return free, seconds


def let_due_go(paused):
    """Let held jobs of all keys go, for the sweep to send. Returns the seconds until more may go.

    `paused` is what pauses.names() returns.
    """
    free_cancelled(with_place().filter(sweep_at__lt=Now()))
    seconds, due = inf, set()
    heads = job_manager().filter(pk__in=RawSQL(HEADS, []))  # noqa: S611  it has no parameter
    for key, queue, task, wait in heads.values_list(
        "held_by", "queue", "task", F("due_at") - Now()
    ):
        if wait > timedelta():
            seconds = min(seconds, wait.total_seconds())
            continue
        due.add(key)
        if not key.startswith(PREFIX):
            if queue in paused or task in paused:
                pauses.hold_all(key)
        elif key.removeprefix(PREFIX) not in paused:
            due |= pauses.hold_by_others(key)
    free, next_start = free_places(due)
    for some in chunks(iter([key for key in due if free[key] > 0]), AT_ONCE):
        if len(let_go(some, is_sent=False, skip_locked=True)) >= MOST:
            seconds = 0  # there may be more
    return min(seconds, next_start)


# When a run ends


def hand_over(key):
    """In the transaction that ends a run, let the next job of its key have its place. Returns [job] or [].

    This needs no lock, because it changes no number: until the commit, others count the old job.
    """
    limit = limit_of(key)
    return take(key, 1, limit.running) if limit.starts == inf > limit.running else []


def after_run(run):
    """Free the place of a run that has handed it to no other job, and let the next one go."""
    try:
        if not run.has_written:
            free_cancelled(job_manager().filter(pk=run.job_id))
        if job_manager().filter(held_by=run.limit_key).exists():
            grant([run.limit_key])
    except Error as error:
        logger.warning("the sweep frees a place of %s: %r", run.limit_key, error)


def free_cancelled(jobs):
    """Free the places of those of these jobs that are cancelled: their bodies have ended. Grant the places."""
    cancelled = jobs.filter(IN_CANCELLED_BODY)
    if keys := set(cancelled.values_list("limit_key", flat=True)):
        cancelled.update(sweep_at=None)
        grant(keys)


def with_place():
    """Return the jobs that occupy a place."""
    return job_manager().filter(limit_key__isnull=False, sweep_at__isnull=False)


def keys_of_unstarted(jobs):
    """Return the keys of those of these jobs that occupy a place, but have not started."""
    if not conf.JOB_LIMITS:  # spare the query
        return set()
    rows = jobs.filter(QUEUED, limit_key__isnull=False, sweep_at__isnull=False)
    return set(rows.order_by().values_list("limit_key", flat=True))


# Rates


def claim(manager, limit_key, **fields):
    """Call updates.claim(). If the limit has a rate, store the start, too."""
    if limit_key is None or not limit_of(limit_key).rate:
        return updates.claim(manager, **fields)
    with transaction.atomic(manager.db):
        claimed = updates.claim(manager, **fields)
        if claimed:
            start_manager().create(key=limit_key)
    return claimed


def start_manager():
    return apps.get_model("jobs.Start").objects.using(job_manager().db)


def delete_old_starts():
    longest = max((limit_of(name).period for name in conf.JOB_LIMITS), default=timedelta())
    start_manager().filter(started_at__lt=Now() - longest).delete()


def ignore(jobs):
    """Let these held jobs go, whatever their limits say. Eager mode runs one job at a time, and waits never."""
    held = jobs.filter(held_by__isnull=False).exclude(held_by__startswith=PREFIX)
    held.update(held_by=None, sweep_at=Now())


# For people


def reasons(jobs):
    """Return {id: a sentence} for those of these jobs that are due, but held. Not for one just enqueued."""
    held = [job for job in jobs if job.held_by and isinstance(job.due_at, datetime)]
    held = [job for job in held if job.due_at <= timezone.now()]
    keys = {job.held_by for job in held}
    texts = {}
    if names := [key.removeprefix(PREFIX) for key in keys if key.startswith(PREFIX)]:
        texts = {
            PREFIX + pause.name: str(pause)
            for pause in pauses.pause_manager().filter(name__in=names)
        }
    if limited := [key for key in keys if not key.startswith(PREFIX)]:
        rows = with_place().filter(limit_key__in=limited).order_by().values_list("limit_key")
        used = dict(rows.annotate(Count("pk")))
        for key in limited:
            limit, name = limit_of(key), key.replace(":", " ", 1)
            if used.get(key, 0) >= limit.running:
                texts[key] = (
                    f"Waits for its turn: {used[key]} of {limit.running} of {name} are running"
                )
            elif limit.rate:
                texts[key] = f"Waits for its turn: {name} may start {limit.rate}"
    return {job.pk: texts.get(job.held_by, "Waits for its turn") for job in held}
