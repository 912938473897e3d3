"""GET /metrics: what the jobs' rows say of queues, tasks and the sweep, for Prometheus."""

import math
from datetime import timedelta

from django.conf import settings
from django.db.models import Count, F, Min, Q, Sum
from django.db.models.functions import Now
from django.http import HttpResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import GaugeMetricFamily
from rest_framework.permissions import IsAdminUser
from rest_framework.views import APIView

from .models import ACTIVE, Job, Sweep

QUEUE = {
    "jobs_waiting": "Jobs that are due and that no worker has taken",
    "jobs_waiting_later": "Jobs that wait for their countdown or their next try",
    "jobs_running": "Jobs that a worker has taken",
    "jobs_oldest_wait_seconds": "Seconds that the oldest due job has waited for a worker",
}
TASK = {  # over one minute only: rows are purged, and counting all of them takes long
    "jobs_ended_last_minute": "Jobs that ended within the last minute",
    "jobs_ended_last_minute_run_seconds": "Seconds that their last runs took, cancelled ones left out",
    "jobs_ended_last_minute_crashes": "Times a worker died while running them",
    "jobs_ended_last_minute_retries": "Tries before the last one",
}
BEAT = {
    "jobs_sweep_age_seconds": "Seconds since Beat last looked at the jobs",
    "jobs_beat_late_seconds": "Seconds since Beat should have looked at its schedule",
}


class Collector:
    """What prometheus_client collects from: three queries, however many jobs there are."""

    def collect(self):
        queued = Q(state="queued")
        due = queued & Q(due_at__lte=Now())
        rows = Job.objects.filter(state__in=ACTIVE).values("queue")
        rows = rows.annotate(
            jobs_waiting=Count("queue", filter=due),
            jobs_waiting_later=Count("queue", filter=queued & Q(due_at__gt=Now())),
            jobs_running=Count("queue", filter=Q(state="running")),
            jobs_oldest_wait_seconds=Now() - Min("due_at", filter=due),
        )
        empty = [{"queue": queue} for queue in settings.WORKER_QUEUES]
        yield from gauges(QUEUE, ["queue"], [*empty, *rows])

        ended = Job.objects.filter(finished_at__gt=Now() - timedelta(minutes=1))
        seconds = Sum(F("finished_at") - F("started_at"), filter=~Q(state="cancelled"))
        rows = ended.values("task", "state").annotate(
            jobs_ended_last_minute=Count("*"),
            jobs_ended_last_minute_run_seconds=seconds,
            jobs_ended_last_minute_crashes=Sum("crashes"),
            jobs_ended_last_minute_retries=Sum("retries"),
        )
        yield from gauges(TASK, ["task", "state"], rows)

        ages = {"jobs_sweep_age_seconds": "ended_at", "jobs_beat_late_seconds": "tick_due_at"}
        rows = Sweep.objects.values(**{name: Now() - F(time) for name, time in ages.items()})
        yield from gauges(BEAT, [], rows or [dict.fromkeys(BEAT, math.inf)])


def gauges(texts, labels, rows):
    """Yield a metric family for each of `texts`, with the values of the column with the same name."""
    for name, text in texts.items():
        family = GaugeMetricFamily(name, text, labels=labels)
        values = {tuple(row[label] for label in labels): row.get(name) or 0 for row in rows}
        for key, value in values.items():
            is_time = isinstance(value, timedelta)
            family.add_metric(key, max(value.total_seconds(), 0) if is_time else value)
        yield family


class Metrics(APIView):
    """For staff. Give Prometheus a staff user without permissions."""

    permission_classes = [IsAdminUser]
    throttle_classes = []
    schema = None  # no part of the API

    def perform_content_negotiation(self, request, force=False):
        return super().perform_content_negotiation(request, force=True)  # there is one format

    def get(self, request):
        return HttpResponse(generate_latest(Collector()), content_type=CONTENT_TYPE_LATEST)
