"""GET /metrics for Prometheus: metrics of queues, tasks, Beat and its sweeper, read from the database."""

import math
from datetime import timedelta

from django.db import OperationalError
from django.db.models import Count, F, Min
from django.http import HttpResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import GaugeMetricFamily
from rest_framework.permissions import IsAdminUser
from rest_framework.views import APIView

from durable_jobs.database import Now
from durable_jobs.diagnosis import in_time
from durable_jobs.models import Batch, Pause, Sweep
from durable_jobs.statistics import alive, by_queue, by_task, p95

__all__ = ["Metrics"]

QUEUE_METRICS = {
    "durable_jobs_waiting": "Due jobs that are waiting for a worker",
    "durable_jobs_blocked": "Jobs that are due, but blocked by a limit or a pause",
    "durable_jobs_waiting_later": "Jobs that wait for their countdown or for a retry",
    "durable_jobs_running": "Jobs that are running",
    "durable_jobs_stalled": "Jobs whose worker does not respond",
    "durable_jobs_oldest_wait_seconds": "Seconds for which the oldest due job has waited for a worker",
    "durable_jobs_slots": "How many jobs the workers of this queue can run concurrently",
    "durable_jobs_busy_slots": "How many of these slots are taken, also by jobs of other queues",
}
METRICS = QUEUE_METRICS | {
    "durable_jobs_workers": "Workers that run",
    "durable_jobs_pause_seconds": "Seconds for which a queue or a task has been paused",
    # Of jobs that ended in the last five minutes:
    "durable_jobs_ended": "Jobs that ended recently",
    "durable_jobs_crashes": "Times a worker died while running these jobs",
    "durable_jobs_retries": "Retries of these jobs",
    "durable_jobs_run_p95_seconds": "95th-percentile run time of these jobs, excluding cancelled ones",
    "durable_jobs_wait_p95_seconds": "95th-percentile time from when these jobs were due to their start",
    "durable_jobs_batches": "Batches that have not ended",
    "durable_jobs_oldest_batch_seconds": "Seconds since the oldest of these batches was created",
    "durable_jobs_sweep_age_seconds": "Seconds since Beat's sweeper last completed a round",
    "durable_jobs_beat_late_seconds": "Seconds by which Beat is late to check its schedule",
}


class Collector:
    """The collector for prometheus_client. It makes twelve queries, however many jobs there are."""

    def collect(self):
        rows = [dict.fromkeys(QUEUE_METRICS, 0) | row for row in by_queue()]
        yield from families(["queue"], rows)

        rows = Pause.objects.values("name", durable_jobs_pause_seconds=Now() - F("since"))
        yield from families(["name"], rows)

        yield from families(["task", "state"], by_task())
        ran, waited = F("finished_at") - F("started_at"), F("started_at") - F("due_at")
        yield from families(["task"], p95("durable_jobs_run_p95_seconds", "task", ran))
        yield from families(["queue"], p95("durable_jobs_wait_p95_seconds", "queue", waited))

        row = Batch.objects.filter(ended_at=None).aggregate(
            durable_jobs_batches=Count("*"),
            durable_jobs_oldest_batch_seconds=Now() - Min("created_at"),
        )
        yield from families([], [{**row, "durable_jobs_workers": alive().count()}])

        ages = {"sweep_age": "ended_at", "beat_late": "tick_due_at"}
        ages = {f"durable_jobs_{name}_seconds": Now() - F(time) for name, time in ages.items()}
        yield from families([], Sweep.objects.values(**ages) or [dict.fromkeys(ages, math.inf)])


def families(labels, rows):
    """Yield each metric that these rows have. They also have the values of its labels."""
    rows = list(rows)
    for name in [name for name in METRICS if any(name in row for row in rows)]:
        family = GaugeMetricFamily(name, METRICS[name], labels=labels)
        for row in rows:
            value = row.get(name) or 0
            is_time = isinstance(value, timedelta)
            value = max(value.total_seconds(), 0) if is_time else value
            family.add_metric([row[label] for label in labels], value)
        yield family


class Metrics(APIView):
    """The metrics, for staff. Let Prometheus log in as a staff user without permissions."""

    permission_classes = [IsAdminUser]
    throttle_classes = []
    schema = None  # not part of the API

    def perform_content_negotiation(self, request, force=False):
        return super().perform_content_negotiation(request, force=True)  # there is only one format

    def get(self, request):
        try:
            with in_time():
                return HttpResponse(generate_latest(Collector()), content_type=CONTENT_TYPE_LATEST)
        except OperationalError as error:
            return HttpResponse(str(error), status=503, content_type="text/plain")
