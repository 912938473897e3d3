"""step(): what has run once for a job doesn't run again. integration/faults/test_workers.py kills workers."""

import uuid
from contextlib import suppress

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from django.db import OperationalError, connection, transaction
from helpers import act, deliver, requeue, run

from durable_jobs.models import Job, Pause

pytestmark = pytest.mark.django_db


def write(name, error=None):
    """Write a row, here a pause of a queue that doesn't exist."""
    Pause.objects.create(name=name)
    if error:
        raise error
    return name


def written():
    return [pause.name for pause in Pause.objects.order_by("name")]


def crash():
    """Let this run lose its job, as after a crash."""
    requeue(Job.objects.all(), crashes=1)


def test_a_later_run_gets_the_stored_results_and_calls_no_function_again():
    calls, seen = [], []

    def call(number, **kwargs):
        calls.append(number)
        return number, {1: kwargs}

    def function(task):
        seen.append([task.step("first", call, 1, name="x"), task.step("none", calls.append, 2)])
        if len(seen) == 1:
            crash()
        return task.step("last", call, 3)

    first = [1, {"1": {"name": "x"}}]  # as JSON, in the first run, too
    job = run(function)
    assert (job.state, job.steps) == ("queued", {"first": first, "none": None})
    job = deliver(job)
    assert job.result == [3, {"1": {}}]
    assert (calls, seen) == ([1, 2, 3], [[first, None]] * 2)


def test_a_stored_result_counts_whatever_the_code_is_now():
    def function(task):
        if task.request.retries:
            return task.step("charge", pytest.fail, "called with other arguments")
        task.step("removed later", write, "a")
        task.step("charge", write, "b")
        raise task.retry(countdown=0)

    assert run(function).result == "b"


def test_a_step_is_written_with_its_result_or_not_at_all():
    """A step that failed may be tried again in the same run."""

    def nested(task):
        task.step("inner", write, "inner")
        return write("outer", None if "again" in written() else ZeroDivisionError)

    def function(task):
        with suppress(ZeroDivisionError):
            task.step("outer", nested, task)
        before = [Job.objects.get().steps, written()]
        write("again")
        task.step("outer", nested, task)
        return before

    job = run(function)
    assert job.result == [{}, []]
    assert job.steps == {"inner": "inner", "outer": "outer"}
    assert written() == ["again", "inner", "outer"]


def test_a_step_in_a_transaction_that_rolls_back_is_not_stored():
    def function(task):
        with suppress(ZeroDivisionError), transaction.atomic():
            task.step("lost", write, "lost")
            task.step("lost, too", len, "")
            raise ZeroDivisionError
        task.step("kept", write, "kept")

    assert (run(function).steps, written()) == ({"kept": "kept"}, ["kept"])


def lose_job():
    Job.objects.update(run_token=uuid.uuid4())
    write("lost")


def test_a_step_of_a_run_that_has_lost_its_job_is_rolled_back():
    job = run(lambda task: task.step("lost", lose_job))
    assert (job.state, job.steps, written()) == ("running", {}, [])


def test_a_cancelled_job_starts_no_step():
    def function(task):
        task._current_run.lost = True  # as the thread of leases notices
        task.step("charge", write, "charged")

    assert (run(function).result, written()) == (None, [])


def write_and_return(result):
    write("written")
    return result


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (["large", write_and_return, "x" * 1_000_000], "ValueError: The results of its steps have"),
        (["object", write_and_return, {1}], "TypeError"),
        (["nan", write_and_return, float("nan")], "ValueError"),
        (["nul", write_and_return, "\0"], "ValueError"),
        (["name\0", pytest.fail], "ValueError"),
        ([7, pytest.fail], "TypeError: the name of a step must be a text"),
        (["used", pytest.fail], "ValueError: this run has already had a step 'used'"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_cannot_be_stored_fails_the_job_and_changes_nothing(step, error):
    def function(task):
        task.step("used", len, "")
        task.step(*step)

    job = run(function)
    assert job.state == "failed" and job.error.startswith(error)
    assert (job.steps, written()) == ({"used": 0}, [])


def test_a_task_that_is_called_directly_calls_its_steps():
    act.function = lambda task: [task.step("a", len, "x"), task.step("a", len, "xy")]
    assert act() == [1, 2]


@pytest.mark.django_db(transaction=True)  # it opens a new connection
@pytest.mark.parametrize(
    ("error", "state"), [(OperationalError, "succeeded"), (SoftTimeLimitExceeded, "failed")]
)
def test_the_result_of_a_step_without_queries_waits_for_an_unavailable_database(
    update_errors, error, state
):
    """What it did elsewhere would be repeated. But it waits no longer than the time limit."""
    if connection.vendor == "sqlite":
        pytest.skip("SQLite begins a transaction before the step: set DATABASE_URL=postgres://…")
    job = run(lambda task: task.step("call", update_errors.append, error))
    assert job.state == state
    assert job.steps == ({"call": None} if state == "succeeded" else {})
