"""durable_jobs.testing: jobs run in the test's own process."""

import pytest
from celery import shared_task
from helpers import add

from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask)
def enqueue_another():
    enqueue(add, [1, 2])


@shared_task
def fail():
    1 / 0  # noqa: B018


def test_run_jobs_also_runs_jobs_that_a_body_enqueues(run_jobs):
    enqueue(enqueue_another)
    run_jobs()
    assert list(Job.objects.values_list("state", flat=True)) == ["succeeded"] * 2


def test_run_jobs_returns_although_the_broker_is_down(run_jobs, broker_down):
    enqueue(add, [1, 2])
    run_jobs()
    assert Job.objects.get().state == "queued"


def test_an_error_of_a_plain_task_is_raised_in_eager_mode():
    with pytest.raises(ZeroDivisionError):
        fail.delay()
