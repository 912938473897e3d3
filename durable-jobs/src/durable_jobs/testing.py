"""A plugin of pytest: run_jobs() runs jobs in the test's own process.

    pytest_plugins = ["durable_jobs.testing"]

Put this line into the conftest.py of the folder in which you start pytest. A test marked `live` uses a
real broker and a real worker.
"""

import pytest
from celery import current_app
from celery.app.trace import build_tracer
from celery.exceptions import OperationalError
from django.db import connection
from kombu.utils.json import dumps, loads

from durable_jobs import batches, messages, publish
from durable_jobs.database import Now
from durable_jobs.models import Job
from durable_jobs.worker.runs import process

__all__ = ["broker_down", "run_jobs"]


def pytest_configure(config):
    config.addinivalue_line("markers", "live: runs a real worker on a real broker")


@pytest.fixture(autouse=True)
def no_broker(request, monkeypatch):
    """Send no message of a job, and run plain tasks immediately."""
    is_live = request.node.get_closest_marker("live")
    current_app.conf.task_always_eager = not is_live
    current_app.conf.task_eager_propagates = True  # an error in a plain task fails its test
    if not is_live:
        monkeypatch.setattr(messages, "send_one", lambda *args, **options: None)
    # Start no thread that renews leases: it could not see the rows of a test's transaction.
    monkeypatch.setattr(process, "renews_leases", True)
    monkeypatch.setattr(publish, "next_tries", {})


@pytest.fixture
def run_jobs(db):
    """run_jobs() runs all queued jobs and those that they enqueue. It waits for no countdown and no limit."""
    return run_queued


@pytest.fixture
def broker_down(monkeypatch):
    """Refuse the message of every job. The value is the list of the refused jobs' ids."""
    tried = []

    def refuse(job, producer, **options):
        tried.append(str(job.pk))
        raise OperationalError("connection refused")

    monkeypatch.setattr(messages, "send_one", refuse)
    return tried


def run_queued():
    tried = set()  # a job may stay queued, for example because it is paused
    while True:
        batches.end_all()  # as the sweeper does
        queued = Job.objects.filter(state="queued")
        queued.filter(blocked_by__isnull=False).update(blocked_by=None, sweep_at=Now())
        jobs = [job for job in queued.order_by("created_at") if (job.pk, job.retries) not in tried]
        if not jobs:
            break
        for job in jobs:
            tried.add((job.pk, job.retries))
            run(job)
    if connection.vendor == "postgresql":
        # IDLE_TIMEOUT is not for the test's own transaction, which a debugger may stop.
        connection.cursor().execute("SET LOCAL idle_in_transaction_session_timeout TO DEFAULT")


def run(job):
    """Run a job as a worker does that gets its message."""
    task = current_app.tasks[job.task]
    args, kwargs = loads(dumps([job.args, job.kwargs]))
    request = {"id": str(job.pk), "retries": job.retries, "hostname": "test"}
    request["headers"] = messages.message_of(job).headers
    # Celery's task.apply() would not call apply_async() for a retry.
    trace = build_tracer(task.name, task, app=current_app, eager=True)
    return trace(request["id"], args, kwargs, request)
