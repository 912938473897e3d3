"""self.then(): the next step that a body names is stored with its success, once."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from unittest.mock import Mock

import pytest
from celery import shared_task
from celery.exceptions import Ignore
from django.db import DatabaseError, OperationalError, transaction
from django.db.models.functions import Now
from django.utils import timezone
from helpers import act, add, double, echo, plain

from durable_jobs import batches, database
from durable_jobs.actions import cancel
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from durable_jobs.publish import publish
from durable_jobs.tasks import JobTask
from durable_jobs.worker.lease import recover

try:
    from django.tasks import task
except ImportError:  # Django 5.2
    from django_tasks import task

pytestmark = pytest.mark.django_db


@task(takes_context=True)
def double_later(context, x):
    context.enqueue_next(double, [x], label="later")
    return str(context.batch.pk)


def run(body, published=True, **options):
    """Run a job with this body. Returns the job as it is afterwards."""
    act.body = body
    job = enqueue(act, **options)
    publish([job])
    job.refresh_from_db()
    return job


def next_jobs():
    return list(Job.objects.filter(task=add.name).order_by("created_at"))


def test_a_next_step_is_enqueued_with_its_options(user):
    def body(self):
        eta = timezone.now() + timedelta(hours=1)
        self.enqueue_next(add, [1], {"y": 2}, label="Next", queue="io", countdown=60)
        self.enqueue_next(add, [3, 4], eta=eta)
        self.enqueue_next(echo)

    job = run(body, owner=user)
    first, second = next_jobs()
    assert (first.args, first.kwargs, first.label, first.queue) == ([1], {"y": 2}, "Next", "io")
    assert timedelta(seconds=50) < first.due_at - timezone.now() <= timedelta(seconds=60)
    assert second.due_at > first.due_at + timedelta(minutes=50)
    assert {each.times_sent for each in (first, second)} == {0}
    rows = Job.objects.filter(follows=job.pk).values_list("owner", "batch")
    assert list(rows) == [(user.pk, None)] * 3
    assert Job.objects.get(task=echo.name).times_sent == 1


def test_a_next_step_belongs_to_the_batch(run_jobs):
    act.body = lambda self: self.enqueue_next(add, [1, 2])
    batch = batches.enqueue(act, [[]], on_success=echo.s())
    run_jobs()
    batch.refresh_from_db()
    assert batch.counts == {"succeeded": 2}
    assert Job.objects.get(follows=batch.pk).result == [[None, 3]]


def twice(end):
    """A body whose first run ends otherwise than with success, after it has named a next step."""
    runs = []

    def body(self):
        runs.append(self)
        self.enqueue_next(add, [1, len(runs)])
        if len(runs) == 1:
            end(self)

    return body


def lose(self):
    """Recover the running job, as the sweep does after a crash."""
    Job.objects.filter(pk=self.request.id).update(sweep_at=Now())
    recover(Job.objects.filter(pk=self.request.id))


def lose_and_report(self):
    lose(self)
    self.report(1)


def test_members_that_a_body_has_added_stay_when_it_runs_again(run_jobs):
    """Its first run adds one and is lost, the second one adds another."""
    seen = []

    def body(self):
        seen.append(batches.add(self.batch, add, [1, len(seen)]))
        if len(seen) == 1:
            lose(self)

    act.body = body
    batch = batches.enqueue(act, [[]])
    run_jobs()
    run_jobs()  # after a crash
    assert [job.result for job in batch.jobs.filter(task=add.name).order_by("created_at")] == [1, 2]
    batch.refresh_from_db()
    assert (batch.state, len(seen)) == ("succeeded", 2)


@pytest.mark.parametrize(
    "end",
    [
        lambda self: self.retry(countdown=0),
        lambda self: self.retry(countdown=0, throw=False),
        lambda self: self.retry(countdown=0, exc=ValueError("x")),
        lose,
        lose_and_report,
    ],
)
def test_a_next_step_is_stored_once_however_often_the_body_runs(run_jobs, end):
    body, seen = twice(end), []
    act.body = lambda self: (seen.append(len(next_jobs())), body(self))[0]
    job = enqueue(act)
    run_jobs()
    run_jobs()  # after a crash
    job.refresh_from_db()
    assert (job.state, seen) == ("succeeded", [0, 0])
    assert [each.args for each in next_jobs()] == [[1, 2]]


def cancel_itself(self):
    cancel(Job.objects.filter(pk=self.request.id))


def cancel_and_report(self):
    cancel_itself(self)
    self.report(1)


def fail_in_transaction(self):
    with transaction.atomic():
        self.enqueue_next(add, [1, 2])
        raise DatabaseError("rolled back")


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (lambda self: 1 / 0, "failed"),
        (lambda self: self.retry(max_retries=0), "failed"),
        (cancel_itself, "cancelled"),
        (cancel_and_report, "cancelled"),
        (fail_in_transaction, "failed"),
        (lambda self: {object()}, "failed"),
        (lambda self: float("nan"), "failed"),
        (lambda self: self.enqueue_next(add, [1]), "failed"),
        (lambda self: self.enqueue_next(add, [1, object()]), "failed"),
        (lambda self: self.enqueue_next(plain), "failed"),
        (lambda self: self.enqueue_next(add, 5), "failed"),
        (lambda self: self.enqueue_next(add, [1, 2], countdown=1e10), "failed"),
        (lambda self: ThreadPoolExecutor().submit(self.then, add, [1, 2]).result(), "failed"),
    ],
)
def test_without_success_no_next_step_is_stored(end, state):
    def body(self):
        self.enqueue_next(add, [1, 2])
        return end(self)

    assert run(body).state == state
    assert not next_jobs()


def test_wrong_arguments_of_a_next_step_are_an_error_of_the_body():
    for args, error in ([1], "TypeError"), ("ab", "TypeError"), ([{1}, object()], "TypeError"):
        assert run(lambda self, args=args: self.enqueue_next(add, args)).error.startswith(error)


def test_a_body_that_raises_ignore_has_succeeded():
    def body(self):
        self.enqueue_next(add, [1, 2])
        raise Ignore

    assert run(body).state == "succeeded" and len(next_jobs()) == 1


def test_a_rollback_of_the_body_keeps_its_next_step():
    """The step belongs to the success of the job, not to a transaction of the body."""

    def body(self):
        with suppress(ZeroDivisionError), transaction.atomic():
            self.enqueue_next(add, [1, 2])
            1 / 0  # noqa: B018

    assert run(body).state == "succeeded" and len(next_jobs()) == 1


def test_success_and_next_step_are_stored_together(monkeypatch):
    """After an error, neither is stored. Both are stored when the database is back."""
    seen, store = [], batches.Rows.store

    def interrupted(self):
        store(self)
        if next_jobs() and not seen:
            seen.append(True)
            raise OperationalError("the connection is lost")

    def look(seconds):
        seen.append((Job.objects.get(task=act.name).state, next_jobs()))

    monkeypatch.setattr(batches.Rows, "store", interrupted)
    monkeypatch.setattr(database.time, "sleep", look)
    job = run(lambda self: self.enqueue_next(add, [1, 2]))
    assert seen == [True, ("running", [])]
    assert job.state == "succeeded" and len(next_jobs()) == 1


def test_a_step_that_cannot_be_stored_makes_its_job_fail(monkeypatch):
    monkeypatch.setattr(batches.Rows, "store", Mock(side_effect=DatabaseError("no")))
    job = run(lambda self: self.enqueue_next(echo))
    assert (job.state, job.error) == ("failed", "Its result cannot be stored: no")
    assert not Job.objects.filter(task=echo.name)


def test_a_coroutine_names_its_next_step():
    async def body(self):
        self.enqueue_next(add, [1, 2], label="after the coroutine")

    coroutine = shared_task(body, name="coroutine", base=JobTask, bind=True)
    job = enqueue(coroutine)
    publish([job])
    [step] = next_jobs()
    assert (step.follows, step.label) == (job.pk, "after the coroutine")


def test_a_body_that_is_called_directly_enqueues_its_next_step():
    act.body = lambda self: (self.enqueue_next(add, [1, 2], label="x", countdown=5), self.batch)[1]
    assert act() is None
    [job] = next_jobs()
    assert (job.label, job.follows, job.times_sent) == ("x", None, 0)




def test_a_body_of_django_names_a_next_step(run_jobs):
    batch = batches.enqueue(double_later, [[3]])
    run_jobs()
    rows = batch.jobs.order_by("created_at").values_list("label", "result")
    assert list(rows) == [("", str(batch.pk)), ("later", 6)]
