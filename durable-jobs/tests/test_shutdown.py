"""A worker that shuts down starts no task function, ends those with a cursor, and exits in time."""

from contextlib import nullcontext, suppress
from functools import partial

import pytest
from django.db import transaction
from helpers import add, deliver, errors, run, seconds_until_due

from durable_jobs.enqueue import enqueue
from durable_jobs.worker import shutdown

pytestmark = pytest.mark.django_db


@pytest.fixture
def shut_down():
    """A function that begins the shutdown of this worker."""
    yield partial(setattr, shutdown.shutting_down, "value", True)
    shutdown.shutting_down.value = False


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("in_block", [False, True], ids=["autocommit", "atomic"])
def test_a_shutdown_ends_a_task_function_when_its_cursor_is_committed(shut_down, in_block):
    steps = []

    def function(task):
        shut_down()
        task.report(1, 3)  # without a cursor, its work would be repeated
        with transaction.atomic() if in_block else nullcontext():
            transaction.on_commit(lambda: steps.append("on_commit"))
            task.report(2, 3, cursor=7)
            steps.append("in the block")
        steps.append("after")

    job = run(function)
    assert steps == (["in the block", "on_commit"] if in_block else ["on_commit"])
    assert (job.state, job.cursor, job.retries, job.crashes) == ("queued", 7, 0, 0)
    assert not errors(job)


@pytest.mark.django_db(transaction=True)
def test_a_shutdown_forgets_no_function_of_on_commit(shut_down):
    """A task function that passes one after its report continues until its next report."""
    steps = []

    def function(task):
        shut_down()
        with transaction.atomic():
            task.report(1, 3, cursor=7)
            transaction.on_commit(lambda: steps.append("on_commit"))
        steps.append("continues")
        task.report(2, 3, cursor=8)
        steps.append("after")

    job = run(function)
    assert steps == ["on_commit", "continues"]
    assert (job.state, job.cursor) == ("queued", 8)


@pytest.mark.django_db(transaction=True)
def test_a_shutdown_repeats_nothing_of_a_transaction_that_rolls_back(shut_down):
    def function(task):
        shut_down()
        with suppress(ZeroDivisionError), transaction.atomic():
            task.report(1, 2, cursor=7)
            raise ZeroDivisionError
        return "continued"

    job = run(function)
    assert (job.state, job.result, job.cursor) == ("succeeded", "continued", None)


@pytest.mark.django_db(transaction=True)
def test_a_shutdown_ends_a_task_function_when_its_step_is_stored(shut_down):
    def function(task):
        task.step("first", shut_down)
        task.step("second", pytest.fail)

    job = run(function)
    assert (job.state, job.crashes, job.steps) == ("queued", 0, {"first": None})


def test_a_worker_that_shuts_down_starts_no_task_function(shut_down):
    shut_down()
    job = run(lambda task: pytest.fail("started"))
    assert (job.state, job.crashes, job.started_at) == ("queued", 0, None)
    assert seconds_until_due(job) == pytest.approx(5, abs=4)


def test_an_old_message_in_a_shutdown_does_not_shorten_a_pause(shut_down):
    shut_down()
    job = enqueue(add, [1, 2], countdown=3600)
    assert seconds_until_due(deliver(job)) > 3000
