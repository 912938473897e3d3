"""Retries: how long a job waits, when it fails, and what is kept of each failed run."""

from datetime import timedelta

import pytest
from celery import shared_task
from django.utils import timezone
from helpers import add, claim, deliver, errors, run

from durable_jobs import transitions
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from durable_jobs.tasks import JobTask
from durable_jobs.validation import MAX_COUNTDOWN

pytestmark = pytest.mark.django_db


@shared_task(
    base=JobTask,
    bind=True,
    autoretry_for=(OSError,),
    retry_backoff=10,
    retry_jitter=False,
    max_retries=2,
)
def flaky(self, failures):
    if self.request.retries < failures:
        raise OSError("away")


def test_each_retry_waits_longer_than_the_one_before(monkeypatch):
    retry, delays = transitions.retry, []

    def spy(jobs, failure, delay, **changes):
        delays.append(delay)
        return retry(jobs, failure, delay, **changes)

    monkeypatch.setattr(transitions, "retry", spy)
    job = deliver(enqueue(flaky, [2]))
    assert (job.state, job.retries, job.crashes) == ("succeeded", 2, 0)
    assert delays == [10, 20]


def test_a_retry_waits_at_most_ten_years():
    job = run(lambda task: task.request.retries or task.retry(countdown=1e12))
    wait = (job.due_at - timezone.now()).total_seconds()
    assert wait == pytest.approx(MAX_COUNTDOWN, abs=60)


def test_a_wrong_clock_of_a_worker_shifts_no_retry(monkeypatch):
    later = timezone.now() + timedelta(hours=1)
    monkeypatch.setattr(timezone, "now", lambda: later)
    job = run(lambda task: task.request.retries or task.retry(eta=later))
    assert abs(job.due_at - later) < timedelta(milliseconds=1)


def test_a_job_fails_after_its_last_retry():
    job = deliver(enqueue(flaky, [9]))
    assert (job.state, job.retries, job.error) == ("failed", 2, "OSError: away")


@pytest.mark.parametrize(
    "options", [{"args": [object()]}, {"kwargs": {"x": {1}}}, {"args": ["x" * 60_000]}], ids=len
)
def test_a_retry_that_cannot_be_stored_fails_the_job(options):
    job = run(lambda task: task.retry(**options))
    assert (job.state, job.crashes) == ("failed", 0)
    assert job.error.startswith("Its retry can't be stored: ")


def test_a_retry_with_an_option_that_a_job_cannot_have_fails_the_job():
    job = run(lambda task: task.retry(expires=60))
    assert (job.state, job.retries) == ("failed", 0)
    assert "TypeError: a job does not take expires" in job.error


# What is kept


def test_each_failed_run_is_kept_with_its_traceback():
    job = deliver(enqueue(flaky, [2]))
    assert job.state == "succeeded"
    assert errors(job) == ["OSError: away"] * 2
    job = deliver(enqueue(flaky, [9]))
    assert errors(job) == ["OSError: away"] * 3
    failures = list(job.failures.all())
    assert all('raise OSError("away")' in failure.traceback for failure in failures)
    assert {failure.exception for failure in failures} == {"builtins.OSError"}
    assert {failure.worker for failure in failures} == {job.worker} != {""}
    times = [time for failure in failures for time in (failure.started_at, failure.ended_at)]
    assert times == sorted(times)
    assert times[-2] == job.started_at and times[-1] - job.finished_at < timedelta(seconds=1)


def divide(task, **options):
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        raise task.retry(**options) from None


def divide_and_continue(task):
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        task.retry(throw=False)


@pytest.mark.parametrize(
    ("function", "error", "raised"),
    [
        (divide, "ZeroDivisionError: division by zero", "1 / 0"),
        (lambda task: divide(task, exc=ValueError("no")), "ValueError: no", "1 / 0"),
        (divide_and_continue, "ZeroDivisionError: division by zero", "1 / 0"),
        (lambda task: task.retry(exc=ValueError("no")), "ValueError: no", "ValueError: no"),
        (lambda task: task.retry(exc=OSError("no"), throw=False), "OSError: no", "OSError: no"),
        (lambda task: task.retry(), "The task called retry()", ""),
    ],
)
def test_a_failure_has_the_error_that_led_to_the_retry(function, error, raised):
    def retry(task):
        if not task.request.retries:
            function(task)

    job = run(retry)
    assert (job.retries, errors(job)) == (1, [error])
    assert raised in job.failures.get().traceback


def test_only_the_latest_twenty_failures_are_kept():
    job = enqueue(add, [1, 2])
    for number in range(23):
        claim(job.pk, retries=job.retries)
        assert transitions.retry(Job.objects.all(), {"error": str(number)}, 0) == 1
    assert errors(job) == [str(number) for number in range(3, 23)]
