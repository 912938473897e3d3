"""A plugin of pytest: run_jobs() runs jobs in the test's own process.

    pytest_plugins = ["durable_jobs.testing"]

Put this line into the conftest.py of the folder in which you start pytest. A test marked `live` uses a
real broker and a real worker. Without pytest, call durable_jobs.eager.run_jobs().
"""

from functools import partial

import pytest
from celery import current_app
from celery.exceptions import OperationalError

from durable_jobs import batches, eager, messages, publish

__all__ = ["broker_down", "run_jobs"]


def pytest_configure(config):
    config.addinivalue_line("markers", "live: runs a real worker on a real broker")


@pytest.fixture(autouse=True)
def no_broker(request, monkeypatch):
    """Send no message of a job, and run plain tasks immediately."""
    is_live = request.node.get_closest_marker("live")
    current_app.conf.task_always_eager = not is_live
    current_app.conf.task_eager_propagates = True  # an error in a plain task fails its test
    monkeypatch.setattr(messages, "is_eager", lambda: False)  # jobs wait for run_jobs()
    if not is_live:
        monkeypatch.setattr(messages, "send_one", lambda *args, **options: None)
    monkeypatch.setattr(publish, "next_tries", {})


@pytest.fixture
def run_jobs(db):
    """run_jobs() runs all queued jobs and those that they enqueue. It waits for no countdown and no limit."""
    return partial(eager.run_jobs, before_each_round=batches.end_all)  # as the sweeper does


@pytest.fixture
def broker_down(monkeypatch):
    """Refuse the message of every job. The value is the list of the refused jobs' ids."""
    tried = []

    def refuse(job, producer, **options):
        tried.append(str(job.pk))
        raise OperationalError("connection refused")

    monkeypatch.setattr(messages, "send_one", refuse)
    return tried
