"""Jobs with a limit: how fast they run, when the next one starts, and what the sweep costs."""

from datetime import timedelta
from statistics import median

from ledger import copies, job_for_later, sql
from sending import empty, seconds_of

from durable_jobs import pauses
from durable_jobs.beat.republish import Sender
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue_many
from durable_jobs.models import Job, Key, Pause

KEY = "'five:' || n % {}"  # of the row with the number n, in SQL


def store(at_once, keys, count, path):
    """Store `count` jobs in so many keys. Returns the seconds.

    Of each key, `at_once` may run; None means no limit.
    """
    import work_tasks

    empty("job")
    task = {1: work_tasks.one, 5: work_tasks.five, None: work_tasks.keyed}[at_once]
    return seconds_of(enqueue_many, [task.s(path, str(n % keys)) for n in range(count)])


def gaps():
    """Return the ms between the end of each job of one key and the start of the next one."""
    times = Job.objects.order_by("started_at").values_list("started_at", "finished_at")
    starts, ends = zip(*times, strict=True)
    pairs = zip(starts[1:], ends, strict=False)
    return [(start - end).total_seconds() * 1000 for start, end in pairs]


def blocked(count, keys):
    """Return the ms in which the sweeper finds that none of `count` blocked jobs may start.

    They are blocked by so many keys whose slots are all taken; 0: by a pause; -1: by a rate that is used up.
    """
    empty("job")
    job = job_for_later("celery")
    row = {"send_at": "NULL", "due_at": "now() - n * interval '1 ms'"}
    if keys == -1:
        copies(job, count, **row, limit_key="'rated:1'", blocked_by="'rated:1'")
        Key.objects.update_or_create(
            key="rated:1", defaults={"next_at": Now() + timedelta(hours=1)}
        )
    elif keys:
        copies(job, count, **row, limit_key=KEY.format(keys), blocked_by=KEY.format(keys))
        running = {"state": "'running'", "run_token": "gen_random_uuid()"}
        running |= {"send_at": "NULL", "lease_ends_at": "now() + interval '1 hour'"}
        copies(job, 5 * keys, **running, limit_key=KEY.format(keys))
    else:
        pauses.pause("celery")
        copies(job, count, due_at=row["due_at"], send_at=row["due_at"], times_sent="0")
    job.delete()
    sql("VACUUM ANALYZE durable_jobs_job")
    taken = [seconds_of(look) for _ in range(12)]
    Pause.objects.all().delete()
    return 1000 * median(taken[2:])  # the first ones compile and connect


def look():
    """Do what the sweeper does for blocked and paused jobs in each round."""
    Sender().send_due()
