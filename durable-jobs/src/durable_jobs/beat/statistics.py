"""Counts the jobs that have ended, for the counters and histograms of GET /metrics.

To count all rows at each scrape would be slow, and the purge deletes them. So Beat counts each end once, LAG
later, and adds the numbers to the rows of Tally: one for each task, and one for each queue. A job pays
nothing for this.
"""

import time
from collections import Counter, defaultdict
from datetime import timedelta

from django.db import transaction
from django.db.models import Case, Count, F, Subquery, Sum, Value, When
from django.db.models.functions import Coalesce, Now

from durable_jobs import conf
from durable_jobs.models import Job, Sweep, Tally
from durable_jobs.transitions import retention_end

LAG = timedelta(seconds=10)  # a transaction that ends a job must commit in this time
PIECE = timedelta(minutes=1)  # of ends, counted together: Beat may have been stopped for a day
BUCKETS = [0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600]  # seconds
LABELS = [*map(str, map(float, BUCKETS)), "+Inf"]  # of these, as Prometheus writes them


def count_ended():
    """Count the jobs that have ended since the last call, for at most DURABLE_JOBS['SWEEP_SECONDS']."""
    until = time.monotonic() + conf.SWEEP_SECONDS
    while count_piece() and time.monotonic() < until:
        pass
    # A task or queue whose jobs all ended long ago. If there are new ones, it starts at 0 again.
    Tally.objects.filter(updated_at__lt=retention_end()).delete()


def count_piece():
    """Count the jobs that ended in the next PIECE of time. Returns whether more are left.

    `counted_until` moves in the transaction that adds the numbers. So each end is counted once, also with
    two Beats and after a crash.
    """
    row = Sweep.objects.filter(pk=1).values_list(Now(), "counted_until").first()
    if not row:
        return False
    now, counted_until = row
    last = now - LAG
    # The first time, count no old jobs. If the clock was set back by more than LAG, continue from there.
    is_valid = counted_until and counted_until <= now
    start = counted_until if is_valid else last
    end = min(start + PIECE, last)
    if is_valid and end <= start:
        return False
    new = numbers(start, end)
    with transaction.atomic():
        sweep = Sweep.objects.filter(pk=1, counted_until=counted_until)
        if sweep.update(counted_until=end):  # else another Beat has counted them
            add(new)
    return end < last


def numbers(start, end):
    """Return the numbers of the jobs with start <= finished_at < end, as {(label, name): Counter}."""
    ended = Job.objects.filter(finished_at__gte=start, finished_at__lt=end)
    run, wait = F("finished_at") - F("started_at"), F("started_at") - F("due_at")
    groups = ended.alias(run=run, wait=wait).values("task", "queue", "state")
    groups = groups.annotate(run_bucket=bucket("run"), wait_bucket=bucket("wait"))
    sums = {"crashes": Sum("crashes"), "retries": Sum("retries")}
    new = defaultdict(Counter)
    for row in groups.annotate(jobs=Count("pk"), ran=Sum("run"), waited=Sum("wait"), **sums):
        of_task, of_queue = new["task", row["task"]], new["queue", row["queue"]]
        of_task.update({row["state"]: row["jobs"], **{name: row[name] for name in sums}})
        if row["state"] != "cancelled":  # some of these never ran
            observe(of_task, row["run_bucket"], row["jobs"], row["ran"])
            observe(of_queue, row["wait_bucket"], row["jobs"], row["waited"])
    return new


def bucket(duration):
    """Return the label of the first bucket that has room for this duration."""
    small = [
        When(**{f"{duration}__lte": timedelta(seconds=seconds)}, then=Value(label))
        for seconds, label in zip(BUCKETS, LABELS, strict=False)
    ]
    return Case(*small, When(**{f"{duration}__isnull": False}, then=Value("+Inf")))


def observe(counts, label, jobs, duration):
    if label:  # else they have not run, or have no due_at, as rows of the first version
        counts.update({label: jobs, "seconds": max(duration.total_seconds(), 0)})


def add(new):
    """Add these numbers to the rows of Tally."""
    names = {name for _, name in new}
    stored = {(row.label, row.name): row.counts for row in Tally.objects.filter(name__in=names)}
    rows = [
        Tally(label=key[0], name=key[1], counts=Counter(stored.get(key)) + counts)
        for key, counts in new.items()
    ]
    fields = {"unique_fields": ["label", "name"], "update_fields": ["counts", "updated_at"]}
    Tally.objects.bulk_create(rows, update_conflicts=True, **fields)


def counted_until():
    """Return the time before which each end has been counted. The purge must not delete later ones."""
    return Coalesce(Subquery(Sweep.objects.filter(pk=1).values("counted_until")), Now())
