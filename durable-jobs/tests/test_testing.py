"""durable_jobs.testing: jobs run in the test's own process."""

import time

import pytest
from celery import current_app, shared_task, signals
from celery.contrib.testing.worker import start_worker
from helpers import add, free, retry_once

from durable_jobs import pauses, publish
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def worker(no_broker):
    """None: the worker of other tests would run the jobs."""


def states():
    return list(Job.objects.order_by("created_at").values_list("state", flat=True))


@shared_task(base=JobTask)
def enqueue_another():
    enqueue(add, [1, 2])


@shared_task
def fail():
    1 / 0  # noqa: B018


def test_a_job_runs_in_run_jobs_and_not_before(run_jobs):
    publish.publish([enqueue(free, [3])])
    assert states() == ["queued"]
    run_jobs()
    job = Job.objects.get()
    assert (job.state, job.result) == ("succeeded", 3)


def test_run_jobs_also_runs_jobs_that_a_task_function_enqueues(run_jobs):
    enqueue(enqueue_another)
    run_jobs()
    assert states() == ["succeeded"] * 2


def test_run_jobs_waits_for_no_countdown_and_no_retry(run_jobs):
    enqueue(retry_once, countdown=60)
    run_jobs()
    assert states() == ["succeeded"]


def test_run_jobs_returns_although_a_job_is_paused(run_jobs):
    pauses.pause("celery")
    enqueue(add, [1, 2])
    run_jobs()
    assert states() == ["queued"]


@pytest.fixture
def unchanged_logging():
    """A worker would set the level of all loggers, unless this signal has a receiver."""

    def receiver(**kwargs):
        pass

    signals.setup_logging.connect(receiver)
    yield
    signals.setup_logging.disconnect(receiver)


@pytest.mark.live
def test_a_live_test_may_start_a_worker_as_celery_documents_it(transactional_db, unchanged_logging):
    with start_worker(current_app, perform_ping_check=False) as worker:
        enqueue(add, [1, 2])
        deadline = time.monotonic() + 60
        while states() != ["succeeded"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        current_app.control.shutdown([worker.hostname])  # otherwise, it notices later


def test_an_error_of_a_plain_task_is_raised():
    with pytest.raises(ZeroDivisionError):
        fail.delay()
