"""report(): progress and cursor are stored while a task function runs, and the next run continues there."""

from contextlib import suppress
from math import nan

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from django.db import OperationalError, transaction
from helpers import (
    add,
    claim,
    claim_and_lapse,
    deliver,
    finish,
    requeue,
    run,
    run_of,
    seconds_until_due,
)

from durable_jobs.actions import run_again
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from durable_jobs.worker import lease

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize("done, total, percent", [(1, 3, 33), (4, 3, 100), (-1, 3, 0), (0, 0, 100)])
def test_a_report_is_stored_while_the_task_function_runs(done, total, percent):
    def function(task):
        task.report(done, total, "x" * 300)
        lease.write_and_renew([task._current_run])  # as the thread of leases does, twice a second
        job = Job.objects.get()
        return [job.state, job.progress, len(job.message)]

    assert run(function).result == ["running", percent, 255]


def test_a_report_without_a_text_shows_none():
    def function(task):
        task.report(1, 2, None)
        lease.write_and_renew([task._current_run])

    assert run(function).message == ""


def test_a_renewal_keeps_the_progress_of_a_resumed_job():
    """A renewal has no progress to write until the function reports some."""
    job = enqueue(add, [1, 2])
    Job.objects.update(cursor=7, progress=50)
    resumed = run_of(job)
    claim(job.pk, resumed.token)
    Job.objects.update(message="Half of it", lease_ends_at=Now())
    lease.write_and_renew([resumed])
    job.refresh_from_db()
    assert (job.progress, job.message) == (50, "Half of it")
    assert seconds_until_due(job) == pytest.approx(30, abs=5)


def test_a_new_run_resets_the_progress():
    job = enqueue(add, [1, 2])
    Job.objects.update(progress=50, message="half done")
    claim_and_lapse(job)
    job.refresh_from_db()
    assert (job.progress, job.message) == (0, "")


# The cursor


def test_a_run_continues_at_the_cursor_of_the_last_run():
    seen = []

    def function(task):
        seen.append((task.cursor, Job.objects.get().progress))
        task.report(1, 2, "half done", cursor={"page": 5})
        task.report(1, 1)  # without a cursor, so it is not in the database yet
        job = Job.objects.get()
        seen.append((task.cursor, job.cursor, job.progress, job.message))
        requeue(Job.objects.all(), crashes=job.crashes + 1)  # as after a crash

    job = run(function)
    stopped = ({"page": 5}, {"page": 5}, 50, "half done")
    assert seen == [(None, 0), stopped]
    assert deliver(job).state == "queued"
    assert seen[2:] == [({"page": 5}, 50), stopped]


@pytest.mark.parametrize("cursor", [nan, "\0", {"key": "\ud800"}], ids=ascii)
def test_a_cursor_that_cannot_be_stored_fails_the_job(cursor):
    job = run(lambda task: task.report(1, 2, cursor=cursor))
    assert (job.state, job.error[:10], job.cursor) == ("failed", "ValueError", None)


@pytest.mark.parametrize(
    ("state", "cursor"), [("failed", 7), ("cancelled", 7), ("succeeded", None)]
)
def test_run_again_keeps_the_cursor_unless_the_job_succeeded(published, state, cursor):
    job = enqueue(add, [1, 2])
    finish(Job.objects.all(), state, cursor=7, progress=70)
    job.refresh_from_db()
    again = run_again(job)
    again.refresh_from_db()
    assert (again.cursor, again.progress) == (cursor, 70 if cursor else 0)


@pytest.mark.django_db(transaction=True)
def test_a_cursor_is_written_once():
    """But twice inside a transaction, because that may be rolled back."""

    def function(task):
        task.report(1, 3, cursor=1)
        first = task._current_run.needs_write()
        with transaction.atomic():
            task.report(2, 3, cursor=2)
        return [first, task._current_run.needs_write()]

    assert run(function).result == [False, True]


@pytest.mark.django_db(transaction=True)  # it opens a new connection
@pytest.mark.parametrize(
    ("error", "state"), [(OperationalError, "succeeded"), (SoftTimeLimitExceeded, "failed")]
)
def test_a_cursor_waits_for_an_unavailable_database(update_errors, error, state):
    """But not longer than the time limit of the function."""

    def function(task):
        update_errors.append(error)
        task.report(1, 2, cursor=7)

    job = run(function)
    assert (job.state, job.cursor) == (state, 7 if state == "succeeded" else None)


@pytest.mark.django_db(transaction=True)
def test_a_cursor_is_stored_in_the_transaction_of_the_task_function(update_errors):
    def function(task):
        for error in ZeroDivisionError, OperationalError:
            with suppress(error), transaction.atomic():
                Job.objects.create(task="effect", queue="", send_at=Now())
                update_errors.append(error)
                task.report(1, 2, cursor=7)
        with suppress(ZeroDivisionError), transaction.atomic():
            task.report(1, 2, cursor=8)
            raise ZeroDivisionError
        return task.cursor

    assert run(function).state == "succeeded"
    [job] = Job.objects.all()
    assert (job.result, job.cursor) == (None, None)
