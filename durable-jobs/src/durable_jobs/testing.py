"""A plugin of pytest: jobs run in the test's own process, as soon as they are published.

    pytest_plugins = ["durable_jobs.testing"]

Put this line into the conftest.py of the folder in which you start pytest. A test marked `live` uses a
real broker and a real worker.
"""

import pytest
from celery import current_app
from celery.exceptions import OperationalError

from durable_jobs import eager as eager_mode
from durable_jobs import messages
from durable_jobs.publish import publisher
from durable_jobs.worker.runs import process

__all__ = ["broker_down", "commit", "run_jobs"]


def pytest_configure(config):
    config.addinivalue_line("markers", "live: runs a real worker on a real broker")


@pytest.fixture(autouse=True)
def eager(request, monkeypatch):
    """Run a job when it is published, without a broker."""
    current_app.conf.task_always_eager = not request.node.get_closest_marker("live")
    current_app.conf.task_eager_propagates = True  # an error in a plain task fails its test
    # Start no thread that renews leases: it could not see the rows of a test's transaction.
    monkeypatch.setattr(process, "renews_leases", True)
    monkeypatch.setattr(publisher, "again_at", {})


@pytest.fixture
def commit(db, django_capture_on_commit_callbacks):
    """At the end of `with commit():` the enqueued jobs are published, as after a commit: they run.

    The transaction of a test never commits: without this, jobs stay queued until run_jobs().
    """
    return lambda: django_capture_on_commit_callbacks(execute=True)


@pytest.fixture
def run_jobs(db):
    """run_jobs() runs all queued jobs and the jobs that they enqueue, and waits for no countdown."""
    return eager_mode.run_jobs


@pytest.fixture
def broker_down(monkeypatch):
    """Refuse the message of every job. The value is the list of the refused jobs' ids."""
    tried = []

    def refuse(job, producer, **options):
        tried.append(str(job.pk))
        raise OperationalError("connection refused")

    monkeypatch.setattr(messages, "send_one", refuse)
    return tried
