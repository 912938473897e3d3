"""/metrics: what staff reads there, and that a scrape costs the same however many jobs wait."""

import re
from datetime import timedelta
from math import inf

import pytest
from celery import current_app as app
from django.db import connection
from django.test.utils import CaptureQueriesContext
from helpers import ago, greet, requeue, runs_on, scrape
from rest_framework.authtoken.models import Token
from rest_framework.test import APIClient
from rest_framework.throttling import UserRateThrottle

from durable_jobs import batches, pauses
from durable_jobs.actions import cancel
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Batch, Job, Pause

pytestmark = pytest.mark.django_db


def test_the_metrics_count_waiting_jobs_and_the_longest_wait(staff_api):
    enqueue(greet, queue="slow")
    resent = enqueue(greet, queue="slow")
    Job.objects.filter(pk=resent.pk).update(due_at=ago(100), times_sent=3)
    enqueue(greet, queue="slow", countdown=60)
    retried, running = (enqueue(greet) for _ in range(2))
    for job in retried, running:
        Job.objects.filter(pk=job.pk).update(due_at=ago(100), **runs_on())
    requeue(Job.objects.filter(pk=retried.pk), 30, retries=1)
    found = scrape(staff_api)
    assert 100 <= found.pop("durable_jobs_oldest_wait_seconds slow") < 160
    assert found == {
        "durable_jobs_waiting slow": 2,
        "durable_jobs_waiting_later slow": 1,
        "durable_jobs_waiting_later celery": 1,
        "durable_jobs_running celery": 1,
        "durable_jobs_sweep_age_seconds": inf,
        "durable_jobs_beat_late_seconds": inf,
    }


def test_jobs_that_are_blocked_or_paused_are_not_counted_as_waiting(staff_api):
    """More workers would not help them: they raise no alert and start no worker."""
    blocked = {"blocked_by": "tenant:7", "send_at": None, "due_at": ago(100)}
    paused = {"due_at": ago(100)}
    for queue, changes in ("celery", blocked), ("celery", blocked), ("io", paused), ("io", paused):
        job = enqueue(greet, queue=queue)
        Job.objects.filter(pk=job.pk).update(**changes)
    for changes in {"queue": "celery", "blocked_by": "tenant:7", "send_at": None}, {"queue": "io"}:
        job = enqueue(greet, countdown=60)
        Job.objects.filter(pk=job.pk).update(**changes)
    assert scrape(staff_api)["durable_jobs_oldest_wait_seconds io"] >= 100
    pauses.pause("io", "SMTP is down")
    Pause.objects.update(since=ago(60))
    found = scrape(staff_api)
    assert 60 <= found.pop("durable_jobs_pause_seconds io") < 120
    assert found == {
        "durable_jobs_blocked celery": 2,
        "durable_jobs_blocked io": 2,
        "durable_jobs_waiting_later celery": 1,
        "durable_jobs_waiting_later io": 1,
        "durable_jobs_sweep_age_seconds": inf,
        "durable_jobs_beat_late_seconds": inf,
    }


def test_the_metrics_name_each_queue_even_if_it_is_empty(staff_api):
    shown = staff_api.get("/metrics").content.decode()
    for queue in app.conf.task_queues:
        assert re.search(f'durable_jobs_waiting.queue="{queue}". 0.0', shown)


def test_the_metrics_are_for_staff_and_not_throttled(api, staff_api, admin_user, monkeypatch):
    monkeypatch.setitem(UserRateThrottle.THROTTLE_RATES, "user", "1/min")
    assert APIClient().get("/metrics").status_code == 401
    assert api.get("/metrics").status_code == 403
    token = Token.objects.create(user=admin_user)
    by_token = APIClient(HTTP_AUTHORIZATION=f"Token {token}", HTTP_ACCEPT="text/plain")
    for client in staff_api, by_token, by_token:  # more often than the throttle allows
        assert client.get("/metrics")["Content-Type"].startswith("text/plain")


def test_a_scrape_needs_twelve_queries_however_many_jobs_there_are(staff_api):
    for number in range(20):
        enqueue(greet, queue=f"queue{number % 7}")
    cancel(Job.objects.filter(queue="queue1"))
    with CaptureQueriesContext(connection) as captured:
        scrape(staff_api)
    assert len([query for query in captured if "jobs_" in query["sql"]]) == 12


def test_the_metrics_count_open_batches_and_the_age_of_the_oldest(staff_api, batch):
    old, ended = (batches.enqueue([greet.s()]) for _ in range(2))
    Batch.objects.filter(pk=old.pk).update(created_at=Now() - timedelta(seconds=100))
    Batch.objects.filter(pk=ended.pk).update(created_at=Now() - timedelta(seconds=999))
    batches.cancel(ended)
    found = scrape(staff_api)
    assert found["durable_jobs_batches"] == 2
    assert 100 <= found["durable_jobs_oldest_batch_seconds"] < 160
