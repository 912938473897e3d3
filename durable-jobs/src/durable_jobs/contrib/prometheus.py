"""GET /metrics for Prometheus: metrics of queues, tasks, Beat and its sweep, read from the database."""

import math
from datetime import timedelta
from itertools import accumulate

from django.db.models import Count, F, Min
from django.db.models.functions import Now
from django.http import HttpResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from rest_framework.permissions import IsAdminUser
from rest_framework.views import APIView

from durable_jobs.beat.statistics import LABELS
from durable_jobs.counts import by_queue
from durable_jobs.messages import known_names
from durable_jobs.models import Batch, Pause, Sweep, Tally
from durable_jobs.states import FINAL
from durable_jobs.worker.heartbeat import alive

__all__ = ["Metrics"]

QUEUE_METRICS = {
    "durable_jobs_waiting": "Jobs that are due and wait for a worker",
    "durable_jobs_blocked": "Jobs that are due, but blocked by a limit or a pause",
    "durable_jobs_waiting_later": "Jobs that wait for their countdown or for a retry",
    "durable_jobs_running": "Jobs that a worker runs",
    "durable_jobs_stalled": "Jobs whose worker does not respond",
    "durable_jobs_oldest_wait_seconds": "Seconds for which the oldest due job has waited for a worker",
    "durable_jobs_slots": "How many jobs the workers of this queue can run concurrently",
    "durable_jobs_busy_slots": "How many of these slots are taken, also by jobs of other queues",
}
WORKER_METRICS = {
    "durable_jobs_workers": "Workers that run",
}
PAUSE_METRICS = {
    "durable_jobs_pause_seconds": "Seconds for which a queue or a task has been paused",
}
STATE_COUNTERS = {
    "durable_jobs_ended_total": "Jobs that have ended",
}
TASK_COUNTERS = {
    "durable_jobs_crashes_total": "Times a worker died while running a job that has ended",
    "durable_jobs_retries_total": "Retries of jobs that have ended",
}
HISTOGRAMS = {
    "durable_jobs_run_seconds": "Seconds of the last runs of jobs that have ended, except cancelled jobs",
    "durable_jobs_wait_seconds": "Seconds for which these runs were due before they started",
}
BATCH_METRICS = {
    "durable_jobs_batches": "Batches that have not ended",
    "durable_jobs_oldest_batch_seconds": "Seconds since the oldest of these batches was created",
}
BEAT_METRICS = {
    "durable_jobs_sweep_age_seconds": "Seconds since Beat's sweeper last completed a round",
    "durable_jobs_beat_late_seconds": "Seconds by which Beat is late to check its schedule",
}
BEAT_COUNTERS = {
    "durable_jobs_schedule_errors_total": "Times Beat could not start a task or read an entry of its schedule",
}


class Collector:
    """The collector for prometheus_client. It makes nine queries, however many jobs there are."""

    def collect(self):
        yield from families(QUEUE_METRICS, ["queue"], by_queue())
        yield from families(WORKER_METRICS, [], [{"durable_jobs_workers": alive().count()}])

        rows = Pause.objects.values("name", durable_jobs_pause_seconds=Now() - F("since"))
        yield from families(PAUSE_METRICS, ["name"], rows)

        by_label = tallies()
        tasks = by_label["task"]
        rows = [
            {"task": name, "state": state, "durable_jobs_ended_total": counts.get(state)}
            for name, counts in tasks.items()
            for state in FINAL
        ]
        yield from families(STATE_COUNTERS, ["task", "state"], rows, CounterMetricFamily)
        rows = [
            {
                "task": name,
                "durable_jobs_crashes_total": counts.get("crashes"),
                "durable_jobs_retries_total": counts.get("retries"),
            }
            for name, counts in tasks.items()
        ]
        yield from families(TASK_COUNTERS, ["task"], rows, CounterMetricFamily)
        for (name, text), label in zip(HISTOGRAMS.items(), ["task", "queue"], strict=True):
            yield histogram(name, text, label, by_label[label])

        rows = Batch.objects.filter(ended_at=None).aggregate(
            durable_jobs_batches=Count("*"),
            durable_jobs_oldest_batch_seconds=Now() - Min("created_at"),
        )
        yield from families(BATCH_METRICS, [], [rows])

        ages = {
            "durable_jobs_sweep_age_seconds": "ended_at",
            "durable_jobs_beat_late_seconds": "tick_due_at",
        }
        ages = {name: Now() - F(time) for name, time in ages.items()}
        rows = Sweep.objects.values(**ages, durable_jobs_schedule_errors_total=F("schedule_errors"))
        rows = rows or [dict.fromkeys(ages, math.inf)]
        yield from families(BEAT_METRICS, [], rows)
        yield from families(BEAT_COUNTERS, [], rows, CounterMetricFamily)


def tallies():
    """Return the counts of each task and each queue, as {label: {name: counts}}.

    Those that are known are listed with 0 before their first job has ended: Prometheus does not see the first
    increase of a counter that was missing before.
    """
    queues, tasks = known_names()
    by_label = {"queue": dict.fromkeys(queues, {}), "task": dict.fromkeys(tasks, {})}
    for label, name, counts in Tally.objects.values_list("label", "name", "counts"):
        by_label[label][name] = counts
    return by_label


def histogram(name, text, label, counts_by_name):
    family = HistogramMetricFamily(name, text, labels=[label])
    for key, counts in counts_by_name.items():
        up_to = accumulate(counts.get(le, 0) for le in LABELS)
        buckets = list(zip(LABELS, up_to, strict=True))
        family.add_metric([key], buckets, counts.get("seconds", 0))
    return family


def families(help_texts, labels, rows, family_class=GaugeMetricFamily):
    """Yield a metric for each name in `help_texts`, with the values of that key in the `rows`."""
    for name, text in help_texts.items():
        family = family_class(name, text, labels=labels)
        values = {tuple(row[label] for label in labels): row.get(name) or 0 for row in rows}
        for key, value in values.items():
            is_time = isinstance(value, timedelta)
            family.add_metric(key, max(value.total_seconds(), 0) if is_time else value)
        yield family


class Metrics(APIView):
    """The metrics, for staff. Let Prometheus log in as a staff user without permissions."""

    permission_classes = [IsAdminUser]
    throttle_classes = []
    schema = None  # not part of the API

    def perform_content_negotiation(self, request, force=False):
        return super().perform_content_negotiation(request, force=True)  # there is only one format

    def get(self, request):
        return HttpResponse(generate_latest(Collector()), content_type=CONTENT_TYPE_LATEST)
