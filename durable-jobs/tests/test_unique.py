"""A unique key has at most one active job, however many callers enqueue it at once."""

from contextlib import nullcontext

import pytest
from django.db import IntegrityError, OperationalError, connection, transaction
from django.test.utils import CaptureQueriesContext
from helpers import add, call_concurrently, claim, claim_and_lapse, free

from durable_jobs import actions
from durable_jobs.actions import cancel, run_again, run_all_again
from durable_jobs.beat.sweeper import recover_lapsed
from durable_jobs.enqueue import enqueue, enqueue_many, insert, new_fields
from durable_jobs.models import Job

pytestmark = pytest.mark.django_db


def test_a_unique_key_has_one_active_job(published):
    first = enqueue(add, [1, 2], unique="key")
    assert enqueue(add, [3, 4], unique="key") == first
    claim_and_lapse(first)
    assert enqueue(add, [1, 2], unique="key").state == "running"
    others = [enqueue(add, [1, 2], unique=unique) for unique in ("other", None, None)]
    assert Job.objects.count() == 1 + len(others)
    cancel(Job.objects.filter(pk=first.pk))
    assert enqueue(add, [1, 2], unique="key").state == "queued"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("block", [nullcontext, transaction.atomic])
def test_concurrent_calls_with_a_unique_key_get_one_job(block):
    def enqueue_one():
        with block():
            job = enqueue(add, [1, 2], unique="key", countdown=60)
            return Job.objects.get(pk=job.pk).pk  # the transaction still works

    assert set(call_concurrently(20, enqueue_one)) == {Job.objects.get().pk}


@pytest.mark.django_db(transaction=True)
def test_concurrent_calls_with_a_unique_key_all_get_a_job_that_runs():
    """Some of the jobs end while other threads read them."""

    def enqueue_one():
        return [enqueue(add, [1, 2], unique="key").pk for _ in range(10)]

    jobs = {pk for pks in call_concurrently(20, enqueue_one) for pk in pks}
    assert set(Job.objects.values_list("pk", "state")) == {(pk, "succeeded") for pk in jobs}


def test_a_conflicting_job_that_ends_before_it_is_read_frees_its_unique_key(monkeypatch):
    other = enqueue(add, [1, 2], unique="key")
    # Called in place of each look for an active job, from the end of the list: first nothing, because the other
    # job is not committed yet; then the other job ends.
    steps = [lambda: cancel(Job.objects.all()), lambda: None]

    def look(job):
        steps.pop()()

    monkeypatch.setattr("durable_jobs.enqueue.active_with", look)
    job = enqueue(add, [1, 2], unique="key")
    assert set(Job.objects.values_list("pk", "state")) == {
        (other.pk, "cancelled"),
        (job.pk, "queued"),
    }


@pytest.mark.django_db(transaction=True)
def test_a_job_whose_unique_key_was_taken_meanwhile_does_not_run_again(monkeypatch, published):
    job = enqueue(add, [1, 2], unique="key")
    cancel(job)
    job.refresh_from_db()
    other, found = enqueue(add, [3, 4], unique="key"), [None]
    look = actions.active_with
    monkeypatch.setattr(actions, "active_with", lambda job: found.pop() if found else look(job))
    assert run_again(job) == other
    job.refresh_from_db()
    assert job.state == "cancelled"


def test_a_job_whose_unique_key_is_free_again_before_it_is_read_runs_again(monkeypatch, published):
    job = enqueue(add, [1, 2], unique="key")
    cancel(job)
    job.refresh_from_db()
    other = enqueue(add, [3, 4], unique="key")
    # Called in place of each look for an active job, from the end of the list: first nothing, because the other
    # job is not committed yet; then the other job ends.
    steps = [lambda: cancel(other), lambda: None]

    def look(job):
        steps.pop()()

    monkeypatch.setattr(actions, "active_with", look)
    assert run_again(job) == job
    assert set(Job.objects.values_list("pk", "state")) == {
        (other.pk, "cancelled"),
        (job.pk, "queued"),
    }


def test_another_error_of_a_constraint_ends_run_again(monkeypatch):
    job = enqueue(add, [1, 2], unique="key")
    cancel(job)
    job.refresh_from_db()
    monkeypatch.setattr(actions, "times", lambda *args, **options: {"send_at": None})
    with pytest.raises(IntegrityError, match="durable_jobs_job_state"):
        run_again(job)


@pytest.mark.parametrize("conflict", ["idempotency_key", "pk"])
def test_a_unique_key_hides_no_other_conflict(conflict):
    first = enqueue(add, [1, 2], unique="first", idempotency_key="unique_key")
    fields, keys = new_fields(add, [1, 2]), {"unique": "second"}
    (fields if conflict == "pk" else keys)[conflict] = getattr(first, conflict)
    with CaptureQueriesContext(connection) as captured:
        with pytest.raises(IntegrityError, match="used before"):
            insert(fields, **keys)
    assert len([each for each in captured if each["sql"].startswith("INSERT")]) == 1


def test_a_unique_key_is_found_outside_of_a_users_jobs(user, admin_user):
    first = enqueue(add, [1, 2], owner=user, unique="key")
    assert enqueue(add, [1, 2], owner=admin_user, unique="key") == first


def test_two_tasks_may_use_one_unique_key(published):
    jobs = [enqueue(task, args, unique="42") for task, args in [(add, [1, 2]), (free, [3])]]
    assert [job.task for job in jobs] == [add.name, free.name]
    assert [enqueue(free, [3], unique="42"), Job.objects.count()] == [jobs[1], 2]


def test_the_caller_learns_whether_a_job_is_new(published):
    assert [enqueue(add, [1, 2], unique="key").is_new for _ in range(2)] == [True, False]
    assert enqueue_many([add.s(1, 2)])[0].is_new and not Job.objects.latest("created_at").is_new


def test_a_job_that_is_unique_until_its_start_does_not_stand_for_a_later_call(published):
    late = add.using(unique="key", unique_until="start")
    first = late.enqueue(1, 2)
    assert late.enqueue(1, 2) == first
    claim_and_lapse(first)
    second = late.enqueue(1, 2)
    assert second.is_new
    recover_lapsed()  # both are queued
    assert list(Job.objects.values_list("state", flat=True)) == ["queued"] * 2
    assert late.enqueue(1, 2) == second


@pytest.mark.django_db(transaction=True)
def test_a_job_that_is_unique_until_its_start_starts_after_the_transaction_of_its_callers(
    published,
):
    """Otherwise it could read what was there before their changes, and be the last to do so."""
    if connection.vendor == "sqlite":
        pytest.skip("a transaction locks the whole database: set DATABASE_URL=postgres://…")
    late = add.using(unique="key", unique_until="start")
    job = late.enqueue(1, 2)
    with transaction.atomic():
        assert late.enqueue(1, 2) == job
        with pytest.raises(OperationalError, match="lock timeout"):
            call_concurrently(1, lambda: claim(job.pk))
    assert claim(job.pk)


@pytest.mark.parametrize(("unique", "until"), [("key", "succeeded"), (None, "start")])
def test_a_wrong_end_of_uniqueness_is_refused(unique, until):
    with pytest.raises(ValueError, match="give unique= and unique_until="):
        enqueue(add, [1, 2], unique=unique, unique_until=until)


def test_a_unique_key_must_not_be_empty():
    with pytest.raises(ValueError, match="unique= must be a string of 1 to 255 characters"):
        enqueue(add, [1, 2], unique="")


def test_jobs_with_one_unique_key_run_again_as_one(published):
    for _ in range(3):
        enqueue(add, [1, 2], unique="key")
        cancel(Job.objects.all())
    [again] = run_all_again(Job.objects.all())
    assert again.state == "queued"
