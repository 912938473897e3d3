"""Admission: jobs wait until their limit admits them. Until then they are *blocked*.

A blocked job is queued, but it has no message, and `send_at` is empty, so that the sweeper does not send one.
`blocked_by` is the key of its limit, such as "tenant:7": see limits.py.

A job with a limit is blocked when it is stored. It occupies a *slot* of its key from the moment it is admitted
until its row says that it has ended, or is blocked again. So no counter can be wrong: the slots in use are the
rows with this key that are admitted or have a lease.

- After a job was stored, cancelled or recovered, admit() admits the oldest blocked jobs, under a lock for the key.
- A run that ends hands its slot over to the next job, in the transaction that ends it: no lock, no new slot. If
  the limit has a rate, it calls admit() afterwards.
- Each key has a row, which admit() locks. If the limit has a rate, its `next_at` is when the next job may start:
  each run that starts moves it forward.
- The sweeper admits due jobs: after countdowns, for rates, and for slots that nobody has handed over.

A job that is cancelled while its task function runs keeps its slot: its lease stays.

Nobody admits, sends or claims a paused job. If a worker has its message, put_back() takes the job back:
it counts as not sent, and is blocked if it has a limit.
"""

import logging
import random
import time
from datetime import timedelta

from celery.utils.functional import chunks
from django.db import Error, connection, transaction
from django.db.models import Count, F, IntegerField, Subquery
from django.db.models.expressions import RawSQL
from django.db.models.functions import Coalesce, Greatest

from durable_jobs import conf, transitions
from durable_jobs.compiler import prepared
from durable_jobs.database import Clock, Now, skip_locked, timeouts
from durable_jobs.limits import limit_of
from durable_jobs.messages import MESSAGE_FIELDS
from durable_jobs.models import Job, Key
from durable_jobs.pauses import is_paused
from durable_jobs.publish import publish
from durable_jobs.states import HAS_SLOT, QUEUED

logger = logging.getLogger(__name__)

BATCH_SIZE = 100  # jobs in memory: up to 6 MB of arguments, which need more as Python objects
KEY_BATCH_SIZE = 500  # in a transaction
NO_LIMIT = 2**31 - 1
FIELDS = ["id", "created_at", *MESSAGE_FIELDS]
# {key: (created_at of the job that hand_over() gave a slot to, until when it looks from there)}
handed_over = {}
MAX_PER_ROUND = 200  # jobs that the sweeper admits in a round, which takes half a second
# DISTINCT would read all blocked jobs. This finds each key in the index.
KEYS = """
WITH RECURSIVE keys(key) AS (
  SELECT MIN(blocked_by) FROM durable_jobs_job WHERE blocked_by IS NOT NULL
  UNION ALL
  SELECT (SELECT MIN(blocked_by) FROM durable_jobs_job WHERE blocked_by > key)
  FROM keys WHERE key IS NOT NULL
)
"""


# Admitting jobs


def admit(keys, most=BATCH_SIZE, skip_locked=False):
    """Admit about `most` blocked jobs of these keys, BATCH_SIZE at a time, and send their messages.

    Returns how many.

    Raises no error: the sweeper tries again. With `skip_locked`, leave out the keys that another process has locked.
    """
    count = 0
    try:
        for some in chunks(iter(keys), KEY_BATCH_SIZE):
            while count < most and (jobs := unblock_many(some, skip_locked)):
                publish(jobs)
                count += len(jobs)
                if len(jobs) < BATCH_SIZE:
                    break
    except Error as error:
        logger.warning("could not admit jobs of %s yet: %r", ", ".join(keys)[:200], error)
    return count


def admit_after_commit(keys):
    if keys:
        transaction.on_commit(lambda: admit(keys), robust=True)


def unblock_many(keys, skip_locked):
    """Unblock as many jobs of these keys as may start now, at most BATCH_SIZE. Returns them.

    First look without the locks: mostly no slot is free. No job is overlooked: whoever frees a slot commits that
    before it looks for blocked jobs, and whoever stores a job commits that before it looks for a slot.
    """
    keys = [key for key, number in free_slots(keys).items() if number > 0]
    if not keys:
        return []
    lock_timeouts, jobs = timeouts(), []  # before atomic(), in which there would be none
    Key.objects.bulk_create([Key(key=key) for key in sorted(keys)], ignore_conflicts=True)
    with transaction.atomic():
        # In order, so that two processes never wait for each other.
        locked = Key.objects.filter(*lock_timeouts, pk__in=keys).order_by("pk")
        locked = locked.select_for_update(skip_locked=skip_locked).values_list("pk", flat=True)
        for key, number in free_slots(list(locked)).items():
            while number > 0 and len(jobs) < BATCH_SIZE and (unblocked := unblock(key)):
                jobs += unblocked
                number -= 1
    return jobs


def unblock(key):
    """In a transaction, unblock the oldest due job of this key. Returns [job], whose message the caller sends, or []."""
    return with_slot(oldest(blocked_by=key, slots=NO_LIMIT))


def with_slot(rows):
    """Give a slot to each job of these rows. Returns the jobs."""
    jobs = [Job(**dict(zip(FIELDS, row, strict=True))) for row in rows]
    for job in jobs:
        transitions.admit(id=job.pk, seconds=timedelta(seconds=conf.RESEND_SECONDS))
    return jobs


@prepared(slots=IntegerField())
def oldest(blocked_by, slots):
    """Return the oldest due job of this key, if fewer than this many `slots` are in use."""
    rows = Job.objects.filter(HAS_SLOT, limit_key=blocked_by).values("limit_key")
    used = Coalesce(Subquery(rows.values(used=Count("pk"))), 0)
    return oldest_due(Job.objects.alias(used=used).filter(blocked_by=blocked_by, used__lt=slots))


@prepared()
def oldest_since(blocked_by, created_at):
    """Return the oldest due job of this key that was stored at this time or later."""
    return oldest_due(Job.objects.filter(blocked_by=blocked_by, created_at__gte=created_at))


def oldest_due(jobs):
    jobs = jobs.filter(~is_paused(), due_at__lte=Now()).order_by("created_at")
    # skip_locked: a run that ends and admit() may look at the same job.
    return jobs.select_for_update(skip_locked=True).values_list(*FIELDS)[:1], None


def free_slots(keys):
    """Return {key: how many blocked jobs may start}. A number is negative if the limit was lowered."""
    limits, free = {key: limit_of(key) for key in keys}, {}
    # Count before reading the times of rates: a job that starts in between then counts as unstarted and as started.
    used, unstarted = dict.fromkeys(limits, 0), dict.fromkeys(limits, 0)
    rows = Job.objects.filter(HAS_SLOT, limit_key__in=limits).values_list("limit_key")
    for key, count, queued in rows.annotate(count=Count("pk"), queued=Count("pk", filter=QUEUED)):
        used[key], unstarted[key] = count, queued
    waiting = waits_for_rates(limits)
    for key, limit in limits.items():
        free[key] = limit.running - used[key]
        if limit.rate:
            free[key] = min(free[key], 0 if key in waiting else limit.ahead - unstarted[key])
    return free


def waits_for_rates(limits):
    """Return {key: the time until its rate lets a job start}, without those that do so now."""
    rated = [key for key, limit in limits.items() if limit.rate]
    rows = Key.objects.filter(pk__in=rated, next_at__gt=Now())
    return dict(rows.values_list("pk", F("next_at") - Now()))


# The sweeper


def admit_due(paused=()):
    """Admit blocked jobs that are due. `paused` is what paused_names() returns.

    Returns in how many seconds the next one is due, and in how many a rate may admit one.
    """
    if paused:  # free the slots of those jobs whose messages are missing
        late = Job.objects.filter(HAS_SLOT, QUEUED, is_paused(paused), send_at__lte=Now())
        with transaction.atomic():
            transitions.put_back(skip_locked(late))
    blocked = Job.objects.exclude(is_paused(paused))
    keys = look_at_keys(blocked)
    due = [key for key, is_due in keys if is_due]
    random.shuffle(due)  # so that each key gets its turn, however many there are
    if admit(due, MAX_PER_ROUND, skip_locked=True) >= MAX_PER_ROUND:
        return 0, 0
    later = blocked.filter(blocked_by__in=[key for key, is_due in keys if not is_due])
    wait = later.order_by("due_at").values_list(F("due_at") - Now(), flat=True).first()
    return (wait or timedelta.max).total_seconds(), seconds_until_rate(due)


def look_at_keys(blocked):
    """Return (key that blocks jobs, whether one of these `blocked` jobs is due) for each key. Reads one job of each."""
    key = RawSQL("keys.key", ())
    # PostgreSQL would find them by their created_at if it did not sort them by their key, too.
    jobs = blocked.filter(blocked_by__gte=key, blocked_by__lte=key, due_at__lte=Now())
    jobs = jobs.order_by("blocked_by", "created_at").values("pk")[:1]
    sql, params = jobs.query.sql_with_params()
    sql = f"{KEYS} SELECT key, ({sql}) IS NOT NULL FROM keys WHERE key IS NOT NULL"  # noqa: S608
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall()


def seconds_until_rate(keys):
    """Return in how many seconds the rate of one of these keys may admit a job."""
    limits = {key: limit for key in keys if (limit := limit_of(key)).rate}
    rows = Job.objects.filter(HAS_SLOT, QUEUED, limit_key__in=limits).values_list("limit_key")
    # If a rate lets a job start now, its admitted jobs have not started: look again after one interval for each. If
    # there are none, its slots are full, and each run that ends admits a job: wait as if each job ahead were admitted.
    to_start = {key: min(limit.ahead, limit.running) for key, limit in limits.items()}
    to_start |= rows.annotate(Count("pk"))
    waits = {key: limits[key].interval * count for key, count in to_start.items()}
    return min((waits | waits_for_rates(limits)).values(), default=timedelta.max).total_seconds()


# A run


def claim(limit_key, **fields):
    """Call transitions.claim(). If the limit has a rate, move the time of its next start."""
    if limit_key is None or not (limit := limit_of(limit_key)).rate:
        return transitions.claim(**fields)
    with transaction.atomic():
        if claimed := transitions.claim(**fields):
            row, next_at = Key.objects.filter(pk=limit_key), Greatest("next_at", Clock())
            if not row.update(next_at=next_at + limit.interval):  # delete_old_keys() has deleted it
                Key.objects.bulk_create([Key(key=limit_key)], ignore_conflicts=True)
                row.update(next_at=next_at + limit.interval)
    return claimed


def hand_over(key):
    """In the transaction that ends a run, let the next job of its key have its slot. Returns [job] or [].

    This needs no lock, because it changes no number: until the commit, others count the old job.

    It counts the slots, in case the limit was lowered, and looks for the oldest job, once in a second. In between, it
    looks from the job that it found last. While a long transaction, such as that of pg_dump, keeps PostgreSQL from
    removing old row versions, it would read those of each job before it.
    """
    limit = limit_of(key)
    if limit.rate:
        return []
    since, until = handed_over.get(key, (None, 0))
    if time.monotonic() < until:
        jobs = with_slot(oldest_since(blocked_by=key, created_at=since))
    else:
        jobs = with_slot(oldest(blocked_by=key, slots=limit.running))
        until = time.monotonic() + 1
        if len(handed_over) >= 1000:
            handed_over.clear()
    for job in jobs:
        handed_over[key] = job.created_at, until
    return jobs


def after_run(run):
    """Free the slot of a run that has handed it to no other job, and admit the next one."""
    try:
        if not run.has_written:
            transitions.release_slots(Job.objects.filter(pk=run.job_id, run_token=run.token))
        if any_blocked(blocked_by=run.limit_key):
            admit([run.limit_key])
    except Error as error:
        logger.warning("could not free a slot of %s, so the sweeper will: %r", run.limit_key, error)


@prepared()
def any_blocked(blocked_by):
    """Return whether this key blocks a job: a list with the id of one, or an empty list."""
    return Job.objects.filter(blocked_by=blocked_by).values_list("pk")[:1], None


@transaction.atomic
def delete_old_keys():
    skip_locked(Key.objects.filter(next_at__lt=Now() - timedelta(hours=1))).delete()
