"""Counts of jobs and batches that the API, the admin and the metrics show, read from their rows."""

from collections import Counter, defaultdict
from datetime import timedelta

from django.db.models import Count, F, Min, Q, Sum, Window
from django.db.models.functions import RowNumber

from durable_jobs.database import Now
from durable_jobs.messages import known_queues
from durable_jobs.models import Batch, Job, Worker
from durable_jobs.pauses import is_paused, paused_names
from durable_jobs.states import ADMITTED, LEASED, RUNNING, STALLED

RECENT = timedelta(minutes=5)
STALE_SECONDS = 30  # a worker without a heartbeat for this time counts as dead


def alive():
    """Return the workers that respond."""
    return Worker.objects.filter(seen_at__gt=Now() - timedelta(seconds=STALE_SECONDS))


def what_follows(pk):
    """Return the jobs that started after this job or batch, at most 100."""
    return Job.objects.filter(follows=pk).order_by("created_at")[:100]


def kind_of(pk):
    """Return what has this id: "batch" or "job"."""
    return "batch" if Batch.objects.filter(pk=pk).exists() else "job"


def by_queue():
    """Return a dictionary with the metrics of each queue that is known, has active jobs or workers.

    Its key "workers" is how many workers take from the queue.
    """
    paused = is_paused(paused_names())
    is_due, is_later = Q(due_at__lte=Now()), Q(due_at__gt=Now())
    # Each of these has an index of its own, which has all that it reads.
    queued, running, blocked = (
        Job.objects.filter(rows).values("queue")
        for rows in (ADMITTED, LEASED, Q(blocked_by__isnull=False))
    )
    queued = queued.annotate(
        durable_jobs_waiting=Count("queue", filter=is_due & ~paused),
        durable_jobs_blocked=Count("queue", filter=is_due & paused),
        durable_jobs_waiting_later=Count("queue", filter=is_later),
        durable_jobs_oldest_wait_seconds=Now() - Min("due_at", filter=is_due & ~paused),
    )
    running = running.annotate(
        durable_jobs_running=Count("queue", filter=RUNNING),
        durable_jobs_stalled=Count("queue", filter=STALLED),
    )
    blocked = blocked.annotate(
        durable_jobs_blocked=Count("queue", filter=is_due),
        durable_jobs_waiting_later=Count("queue", filter=is_later),
    )
    queues = defaultdict(Counter, {queue: Counter() for queue in known_queues()})
    for row in [*queued, *running, *blocked]:
        # `queued` first: an empty Counter copies its timedelta, a filled one would add it to 0.
        queues[row.pop("queue")].update(row)
    for worker in alive():
        slots = {"durable_jobs_slots": worker.slots, "durable_jobs_busy_slots": worker.busy}
        for queue in worker.queues:
            queues[queue].update(slots, workers=1)
    return [{"queue": queue, **row} for queue, row in queues.items()]


def recently_ended():
    """Return the jobs that ended in the last minutes. However old the table is, an index finds them."""
    return Job.objects.filter(finished_at__gt=Now() - RECENT)


def by_task():
    """Return dictionaries with the metrics of the recently ended jobs, for each task and state."""
    rows = recently_ended().values("task", "state").annotate(durable_jobs_ended=Count("pk"))
    return rows.annotate(durable_jobs_crashes=Sum("crashes"), durable_jobs_retries=Sum("retries"))


def p95(metric, label, duration):
    """Return dictionaries with the `duration` that 95 % of the recently ended jobs did not exceed.

    There is one for each value of the field `label`. Cancelled jobs don't count: some never ran.
    """
    jobs = recently_ended().exclude(state="cancelled").annotate(**{metric: duration})
    jobs = jobs.filter(**{f"{metric}__isnull": False})
    rank, total = Window(RowNumber(), F(label), F(metric).desc()), Window(Count("pk"), F(label))
    jobs = jobs.annotate(rank=rank, total=total).filter(rank=1 + F("total") / 20)
    return jobs.values(label, metric)


def count_jobs(batches):
    """Return {id: {state: how many jobs of the batch}}. One query counts those of all open batches."""
    counts = {batch.pk: {} if batch.ended_at is None else batch.counts for batch in batches}
    open_ids = [batch.pk for batch in batches if batch.ended_at is None]
    rows = Job.objects.filter(batch__in=open_ids).values_list("batch", "state")
    for pk, state, count in rows.annotate(count=Count("*")):
        counts[pk][state] = count
    return counts
