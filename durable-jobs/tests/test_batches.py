"""Batches, and what starts when their jobs have ended."""

from datetime import timedelta
from unittest.mock import Mock

import pytest
from celery import current_app, shared_task
from django.db import IntegrityError, OperationalError, transaction
from django.db.models import QuerySet
from helpers import requeue, run_of, sweeper

from durable_jobs import batches, database, messages
from durable_jobs.actions import cancel, run_again
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue
from durable_jobs.exceptions import JobError
from durable_jobs.models import Batch, Job
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask)
def add(x, y):
    return x + y


@shared_task(base=JobTask)
def fail(*args):
    raise JobError("no")


@shared_task(base=JobTask)
def echo(*args):
    return list(args)


@shared_task(base=JobTask, bind=True)
def add_sibling(self, number):
    if number:
        batches.add(
            self.batch, add_sibling.using(label=f"Sibling {number}", queue="io").s(number - 1)
        )
    return number


@shared_task(base=JobTask, bind=True)
async def add_in_coroutine(self):
    await batches.aadd(self.batch, add.s(1, 2))


@shared_task(base=JobTask, bind=True)
def read_batch(self):
    return self.batch and str(self.batch.pk)


def next_jobs(batch):
    """The jobs that the batch has started: the results of `then` and of `ended`."""
    return list(Job.objects.filter(follows=batch.pk).order_by("pk"))


def after(batch):
    batch.refresh_from_db()
    return batch.state, [job.label for job in next_jobs(batch)]


def many(task=add, count=3, has_callbacks=True, **options):
    calls = [task.s(number, 0) for number in range(count)]
    if has_callbacks:
        options["on_success"] = echo.s().set(label="then")
        options["on_finish"] = echo.si().set(label="ended")
    return batches.enqueue(calls, **options)


def test_a_batch_starts_then_and_ended_when_all_jobs_have_succeeded(user, run_jobs):
    batch = many(add.using(queue="io"), 5, owner=user, label="Numbers")
    assert (batch.state, batch.label, batch.owner) == ("open", "Numbers", user)
    assert set(Job.objects.values_list("owner", "queue", "batch")) == {(user.pk, "io", batch.pk)}
    run_jobs()
    batch.refresh_from_db()
    assert (batch.state, batch.counts, batch.error) == ("succeeded", {"succeeded": 5}, "")
    assert batch.ended_at > batch.created_at
    found = {job.label: (job.result, job.owner, job.batch) for job in next_jobs(batch)}
    assert found == {"then": ([[0, 1, 2, 3, 4]], user, None), "ended": ([], user, None)}


def test_a_batch_ends_once(run_jobs):
    batch = many()
    run_jobs()
    batches.end(batch.pk)
    batches.end_all()
    run_jobs()
    assert sorted(job.label for job in next_jobs(batch)) == ["ended", "then"]


@pytest.mark.parametrize("bad", ["failed", "cancelled"])
def test_then_does_not_start_after_a_bad_member(bad, run_jobs):
    with batches.open_batch(on_success=echo.s().set(label="then"), on_finish=echo.si()) as batch:
        first, *_ = batches.add_many(batch, [add.s(1, 2)] * 1000)
        job = batches.add(batch, fail.s())
    ended = {"state": "succeeded", "finished_at": Now(), "send_at": None}
    batch.jobs.filter(task=add.name).exclude(pk=first.pk).update(**ended)
    if bad == "cancelled":
        cancel(job)
    run_jobs()
    assert after(batch) == (bad, [""])
    assert batch.error == f"1 {bad} of 1,001"
    assert batch.counts == {"succeeded": 1000, bad: 1}


@pytest.mark.parametrize("changes", [{"retries": 1}, {"crashes": 1}])
def test_a_retry_or_a_crash_is_not_an_end(changes, run_jobs):
    batch = batches.enqueue([add.s(1, 2)])
    assert requeue(batch.jobs.all(), 60, **changes) == 1
    batches.end(batch.pk)
    batches.end_all()
    assert after(batch) == ("open", [])


def test_an_empty_batch_ends_at_once(run_jobs):
    batch = many(add, 0)
    assert batch.state == "succeeded"
    run_jobs()
    assert sorted((job.label, job.result) for job in next_jobs(batch)) == [
        ("ended", []),
        ("then", [[]]),
    ]


def test_a_batch_without_callbacks_ends(run_jobs):
    batch = many(has_callbacks=False)
    run_jobs()
    assert after(batch) == ("succeeded", [])


def test_then_and_ended_have_options_of_their_own(run_jobs):
    then = echo.s("x").set(queue="io", label="Sum", countdown=60)
    batch = batches.enqueue([add.using(queue="cpu").s(1, 2)], on_success=then, label="Numbers")
    run_jobs()
    [job] = next_jobs(batch)
    assert (job.queue, job.label, job.times_sent) == ("io", "Sum", 0)
    assert job.due_at > job.created_at + timedelta(seconds=50)


def test_then_does_not_get_results_if_it_is_immutable(run_jobs):
    batch = batches.enqueue([add.s(1, 2)], on_success=echo.si("x"))
    run_jobs()
    assert [job.result for job in next_jobs(batch)] == [["x"]]


def test_members_of_several_tasks_are_stored_in_one_transaction(user, run_jobs):
    with batches.open_batch(owner=user, on_success=echo.s()) as batch:
        jobs = [batches.add(batch, add.using(label=f"Job {n}").s(n, 0)) for n in range(20)]
        batches.add(batch, echo.using(queue="cpu").s("last"))
    assert [job.label for job in jobs[:2]] == ["Job 0", "Job 1"]
    assert set(Job.objects.values_list("owner", "batch")) == {(user.pk, batch.pk)}
    run_jobs()
    assert [job.result for job in next_jobs(batch)] == [[[*range(20), ["last"]]]]


def test_nothing_is_stored_if_a_member_is_refused():
    with pytest.raises(TypeError, match="missing"), batches.open_batch() as batch:
        batches.add(batch, add.s(1, 2))
        batches.add(batch, add.s(1))
    with pytest.raises(TypeError, match="missing"):
        batches.enqueue([add.s(1, 2), add.s(1)])
    assert not Batch.objects.exists() and not Job.objects.exists()


@pytest.mark.parametrize("name", ["on_success", "on_finish"])
@pytest.mark.parametrize(
    ("signature", "message"),
    [
        (echo, "is not the signature of a job"),
        ("echo", "is not the signature of a job"),
        (add.si(1), "missing"),
        (current_app.signature("no.such.task"), "is not the signature of a job"),
    ],
)
def test_a_callback_that_cannot_start_is_refused(name, signature, message):
    with pytest.raises(TypeError, match=message):
        batches.enqueue([add.s(1, 2)], **{name: signature})
    assert not Batch.objects.exists() and not Job.objects.exists()


def test_a_member_may_add_others(run_jobs):
    batch = batches.enqueue([add_sibling.s(3)], on_success=echo.s())
    run_jobs()
    assert [job.result for job in next_jobs(batch)] == [[[3, 2, 1, 0]]]
    assert set(batch.jobs.values_list("label", "queue")) == {
        ("", "celery"),
        *[(f"Sibling {number}", "io") for number in (1, 2, 3)],
    }


def test_a_batch_that_has_ended_takes_no_job(run_jobs):
    batch = many()
    run_jobs()
    with pytest.raises(ValueError, match="the batch has ended"):
        batches.add(batch, add.s(1, 2))
    with pytest.raises(ValueError, match="the batch has ended"):
        batches.add_many(batch, [add.s(1, 2)])
    assert batch.jobs.count() == 3


def test_a_task_function_knows_its_batch(run_jobs):
    batch = batches.enqueue([read_batch.s()])
    alone = enqueue(read_batch)
    run_jobs()
    alone.refresh_from_db()
    assert (batch.jobs.get().result, alone.result) == (str(batch.pk), None)
    assert read_batch() is None


@pytest.mark.django_db(transaction=True)  # in a transaction, a query is tried only once
def test_a_task_function_reads_its_batch_when_the_database_is_back(published, monkeypatch):
    batch = batches.enqueue([read_batch.s()])
    monkeypatch.setattr(database.time, "sleep", lambda seconds: None)
    read = Mock(side_effect=[OperationalError("away"), batch])
    monkeypatch.setattr(QuerySet, "first", read)
    assert run_of(batch.jobs.get()).read_batch() is batch


def test_a_cancelled_batch_cancels_its_jobs_and_starts_ended(run_jobs):
    batch = many()
    Job.objects.filter(args=[0, 0]).update(state="succeeded", finished_at=Now(), send_at=None)
    assert batches.cancel(batch) == 2
    assert (batch.state, batch.error) == ("cancelled", "2 cancelled of 3")
    assert after(batch) == ("cancelled", ["ended"])
    run_jobs()
    assert batches.cancel(batch) == 0
    assert after(batch) == ("cancelled", ["ended"])


@pytest.mark.promise("Follow-up jobs and batch callbacks are stored exactly once")
def test_the_sweeper_ends_a_batch_whose_worker_died_before_it_could(monkeypatch):
    batch = many()
    with monkeypatch.context() as died:
        died.setattr(batches, "end", Mock())
        messages.send(list(batch.jobs.all()))
    assert after(batch) == ("open", [])
    sweeper.do_round()
    assert after(batch)[0] == "succeeded"


def test_a_batch_whose_next_step_cannot_start_ends_and_says_why(caplog):
    bad, good = many(), many()
    Batch.objects.filter(pk=bad.pk).update(on_finish={"no": "plan"})
    Job.objects.all().delete()
    batches.end_all()
    assert after(good)[0] == "succeeded"
    assert after(bad) == ("failed", [])
    assert bad.error.startswith("Its callbacks cannot start: TypeError")
    assert bad.on_finish == {"no": "plan"}  # it starts when the batch ends again
    assert f"the callbacks of the batch {bad.pk} cannot start" in caplog.text


def test_the_error_of_a_batch_shows_no_error_of_the_database(monkeypatch):
    batch = many()
    Job.objects.all().delete()
    monkeypatch.setattr(batches, "insert_many", Mock(side_effect=IntegrityError("table, key")))
    batches.end_all()
    assert (after(batch)[0], batch.error) == ("failed", "Its callbacks cannot start")


def test_a_batch_stays_open_while_the_database_is_away(monkeypatch, caplog):
    batch = many()
    Job.objects.all().delete()
    with monkeypatch.context() as away:
        away.setattr(batches, "start_callbacks", Mock(side_effect=OperationalError))
        batches.end_all()
    assert after(batch)[0] == "open"
    batches.end_all()
    assert after(batch)[0] == "succeeded"


@pytest.mark.parametrize("name", ["on_success", "on_finish"])
@pytest.mark.parametrize("value", ["echo", [1], 1])
def test_what_comes_next_is_a_call(name, value):
    with pytest.raises(TypeError, match="is not the signature of a job"):
        batches.enqueue([add.s(1, 2)], **{name: value})


def test_arguments_that_a_worker_cannot_decode_are_refused():
    with pytest.raises(TypeError, match="cannot be stored as JSON"):
        enqueue(echo, [{"__type__": "unknown", "__value__": 1}])


def test_what_comes_next_waits_for_the_database(run_jobs, monkeypatch):
    batch = many()
    messages.send(list(batch.jobs.all()))
    monkeypatch.setattr(database.time, "sleep", lambda seconds: None)
    read = Mock(side_effect=[OperationalError("away"), [1, 2]])
    monkeypatch.setattr(batches, "results_of", read)
    run_jobs()
    assert {job.label: job.result for job in next_jobs(batch)}["then"] == [[1, 2]]


def test_a_failed_next_step_runs_again_with_the_same_results(run_jobs):
    batch = batches.enqueue([add.s(1, 2)], on_success=fail.s())
    run_jobs()
    [job] = next_jobs(batch)
    run_again(job)
    job.refresh_from_db()
    assert (job.args, batches.results_of(job.results_of)) == ([], [3])


def test_a_stored_batch_is_not_saved_as_a_whole(run_jobs):
    batch = many()
    run_jobs()
    with pytest.raises(TypeError, match="use save"):
        batch.save()


def test_a_coroutine_knows_its_batch(run_jobs):
    batch = batches.enqueue([add_in_coroutine.s()])
    run_jobs()
    assert set(batch.jobs.values_list("result", flat=True)) == {None, 3}


def test_cancel_in_a_transaction_ends_the_batch_in_it_or_after_it(commit):
    batch = many()
    with commit():
        assert batches.cancel(batch) == 3
    assert after(batch) == ("cancelled", ["ended"])


def test_a_deleted_member_is_not_waited_for(run_jobs):
    batch = many()
    batch.jobs.all()[0].delete()
    run_jobs()
    assert (after(batch)[0], batch.counts) == ("succeeded", {"succeeded": 2})


@pytest.mark.django_db(transaction=True)
def test_a_router_with_a_replica_stops_no_batch(replica, monkeypatch):
    """Batches are neither written to a replica nor read from it: it lags behind."""
    monkeypatch.setattr(messages, "send_one", lambda *args, **options: None)
    with transaction.atomic():  # of which the replica sees nothing
        batch = many()
        assert batch.jobs.first().batch == batch
        assert batches.cancel(batch) == 3
        assert after(batch) == ("cancelled", ["ended"])
