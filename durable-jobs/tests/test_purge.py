"""The purge deletes old jobs and batches, and nothing that is still needed."""

from datetime import timedelta

import pytest
from django.db import connection
from django.db.models import ProtectedError, RestrictedError
from django.db.models.signals import pre_delete
from django.utils import timezone
from helpers import (
    add,
    beside_locked,
    broken,
    collect,
    deliver,
    explain,
    failed,
    follow,
    queries,
    rows_read,
    work,
)

from durable_jobs import admission, batches, conf
from durable_jobs.actions import run_again, run_all_again
from durable_jobs.beat import purge
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Batch, Failure, Job
from durable_jobs.publish import publish

pytestmark = pytest.mark.django_db


def age(rows, field, days=31):
    rows.update(**{field: Now() - timedelta(days=days)})


def purge_all():
    purge.of_jobs().delete_page()
    purge.of_batches().delete_page()


@pytest.mark.promise("Nothing piles up")
def test_old_final_jobs_are_deleted_with_their_idempotency_keys(settings, caplog):
    caplog.set_level("INFO")
    old = deliver(enqueue(add, [1, 2], idempotency_key="key"))
    new = deliver(enqueue(add, [1, 2]))
    active = enqueue(add, [1, 2])
    past = Now() - timedelta(days=conf.RETENTION_DAYS, seconds=1)
    Job.objects.update(created_at=past)
    Job.objects.filter(pk=old.pk).update(finished_at=past)
    Failure.objects.create(job=old, started_at=timezone.now())
    purge.of_jobs().delete_page()
    assert "deleted 1 jobs older than 30 days" in caplog.text
    assert set(Job.objects.all()) == {new, active}
    enqueue(add, [1, 2], idempotency_key="key")


def test_old_jobs_that_cannot_be_deleted_do_not_stop_the_purge(settings, caplog):
    jobs = [deliver(enqueue(add, [1, 2])) for _ in range(7)]
    past = Now() - timedelta(days=conf.RETENTION_DAYS, seconds=1)
    Job.objects.update(finished_at=past)

    def protect(instance, **kwargs):
        if instance in (jobs[2], jobs[5]):
            raise ProtectedError("an order refers to it", {instance})

    pre_delete.connect(protect, sender=Job)
    old_jobs = purge.of_jobs()
    try:
        old_jobs.delete_pages()
    finally:
        pre_delete.disconnect(protect, sender=Job)
    assert set(Job.objects.all()) == {jobs[2], jobs[5]}
    later = deliver(enqueue(add, [1, 2]))
    Job.objects.filter(pk=later.pk).update(finished_at=past + timedelta(milliseconds=500))
    old_jobs.delete_pages()  # it skips the two that could not be deleted
    assert set(Job.objects.all()) == {jobs[2], jobs[5]}
    assert caplog.text.count("an order refers to it") == 2
    old_jobs.start_over_at = 0
    old_jobs.delete_pages()
    assert not Job.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_the_purge_does_not_wait_for_a_locked_row(caplog):
    locked, _ = [deliver(enqueue(add, [1, 2])) for _ in range(2)]
    age(Job.objects, "finished_at")
    beside_locked(locked, purge.of_jobs().delete_page)
    assert list(Job.objects.all()) == [locked]
    assert "lock timeout" not in caplog.text


def test_no_member_is_deleted_before_its_batch_and_its_callbacks_have_ended(run_jobs):
    broken.add(2)
    batch = batches.enqueue([work.s(1), work.s(2)], on_success=collect.s())
    run_jobs()
    broken.clear()
    batches.run_failed_again(batch)
    age(batch.jobs.filter(state="succeeded"), "finished_at")
    purge_all()
    assert batch.jobs.count() == 2  # the batch is open
    publish([batch.jobs.get(state="queued")])
    age(Job.objects.filter(state="succeeded"), "finished_at")
    purge_all()
    assert batch.jobs.count() == 2  # the batch has just ended
    age(Batch.objects.all(), "ended_at")
    purge_all()
    assert batch.jobs.count() == 2  # its callback is queued
    run_jobs()
    assert follow(batch) == [[[1, 2]]]
    purge_all()
    assert batch.jobs.count() == 2  # its callback has just ended
    age(Job.objects.all(), "finished_at")
    purge_all()
    purge_all()
    assert (Job.objects.count(), Batch.objects.count()) == (0, 0)


@pytest.mark.parametrize("way", ["job", "queryset", "batch"])
def test_a_job_of_a_batch_that_is_being_deleted_does_not_run_again(run_jobs, way):
    """`then` would start without the jobs that are gone."""
    broken.add(2)
    batch = batches.enqueue([work.s(1), work.s(2)], on_success=collect.s())
    run_jobs()
    age(Batch.objects.all(), "ended_at")
    job = batch.jobs.get(state="failed")
    if way == "job":
        with pytest.raises(ValueError, match="its batch is too old"):
            run_again(job)
    elif way == "queryset":
        assert run_all_again(Job.objects.filter(pk=job.pk)) == []
    else:
        assert batches.run_failed_again(batch) == []
    job.refresh_from_db()
    batch.refresh_from_db()
    assert (job.state, batch.state) == ("failed", "failed")


def test_a_callback_whose_batch_has_lost_members_fails(run_jobs):
    batch = batches.enqueue([work.s(1), work.s(2)], on_success=collect.s())
    run_jobs()
    callback = Job.objects.get(follows=batch.pk)
    batch.jobs.first().delete()
    again = run_again(callback)
    run_jobs()
    again.refresh_from_db()
    assert again.state == "failed"
    assert f"it needs the results of the batch {batch.pk}, which were deleted" in again.error


def test_the_results_of_a_batch_are_kept_for_a_copy_of_its_callback(run_jobs):
    batch = batches.enqueue([work.s(1), work.s(2)], on_success=collect.s())
    run_jobs()
    copy = run_again(Job.objects.get(follows=batch.pk))
    age(Job.objects.filter(state="succeeded"), "finished_at")
    age(Batch.objects.all(), "ended_at")
    purge_all()
    publish([copy])
    copy.refresh_from_db()
    assert (copy.state, copy.result) == ("succeeded", [[1, 2]])
    age(Job.objects.all(), "finished_at")
    purge_all()
    purge_all()
    assert (Job.objects.count(), Batch.objects.count()) == (0, 0)


@pytest.mark.django_db(transaction=True)
def test_a_job_that_runs_again_while_it_is_purged_is_not_deleted(monkeypatch):
    """It was read by the purge as an old one."""
    monkeypatch.setattr("durable_jobs.enqueue.publish", lambda jobs: None)
    job = failed()
    age(Job.objects.all(), "finished_at")
    in_halves = purge.try_in_halves

    def run_again_first(*args):
        run_again(Job.objects.get())
        return in_halves(*args)

    monkeypatch.setattr(purge, "try_in_halves", run_again_first)
    purge_all()
    assert Job.objects.get(pk=job.pk).state == "queued"


@pytest.mark.parametrize(("limit", "left"), [(60, 0), (0, 5)])
def test_a_round_deletes_pages_until_its_time_is_over(limit, left, monkeypatch):
    monkeypatch.setattr(purge, "PAGE", 2)
    monkeypatch.setattr(purge, "PURGE_SECONDS", limit)
    for _ in range(7):
        failed()
    age(Job.objects.all(), "finished_at")
    purge.of_jobs().delete_pages()
    assert Job.objects.count() == left


def test_jobs_that_must_be_kept_stop_no_purge_of_others(monkeypatch):
    monkeypatch.setattr(purge, "PAGE", 10)
    is_open = Batch.objects.create()
    for _ in range(35):
        failed(batch=is_open)
    age(Job.objects.all(), "finished_at", 40)  # all at the same time
    other = failed()
    age(Job.objects.filter(pk=other.pk), "finished_at", 35)
    purges = purge.of_jobs()
    for page in range(4):
        assert Job.objects.filter(pk=other.pk).exists(), page
        purges.delete_page()
    assert not Job.objects.filter(pk=other.pk).exists()
    assert is_open.jobs.count() == 35
    batches.end(is_open.pk)
    age(Batch.objects.all(), "ended_at")
    purges.delete_page()
    assert is_open.jobs.count() == 35  # it starts over once an hour
    purges.delete_pages()
    assert is_open.jobs.count() == 0


def test_a_batch_without_jobs_is_deleted_when_it_is_old(user):
    old, new = batches.enqueue([], owner=user), batches.enqueue([])
    age(Batch.objects.filter(pk=old.pk), "ended_at")
    purge_all()
    assert list(Batch.objects.all()) == [new]


def test_a_batch_is_deleted_after_its_jobs():
    """Else one transaction would delete all of them, however many there are."""
    failed(batch=Batch.objects.create(state="failed", ended_at=timezone.now()))
    age(Job.objects.all(), "finished_at")
    age(Batch.objects.all(), "ended_at")
    left = []
    for table in purge.of_batches(), purge.of_jobs(), purge.of_batches():
        table.delete_page()
        left.append((Batch.objects.count(), Job.objects.count()))
    assert left == [(1, 1), (1, 0), (0, 0)]


def test_a_batch_or_a_user_with_active_jobs_is_not_deleted(user, admin_client):
    batch = batches.enqueue([work.s(1), work.s(2)], owner=user)
    for row in batch, user:
        with pytest.raises(RestrictedError, match="active jobs: cancel them first"):
            row.delete()
    page = admin_client.get(f"/admin/auth/user/{user.pk}/delete/").content.decode()
    assert "would require deleting the following protected" in page
    batches.cancel(batch)
    user.delete()
    assert (Job.objects.count(), Batch.objects.count()) == (0, 0)


@pytest.mark.parametrize("failing", ["delete_pages", "delete_old_keys"])
def test_an_error_stops_no_other_step(monkeypatch, caplog, failing):
    called = []

    def step(owner, name):
        def run(*args):
            called.append(name)
            if name == failing:
                raise OSError("no")

        run.__qualname__ = name
        monkeypatch.setattr(owner, name, run)

    step(purge.Purge, "delete_pages")
    step(admission, "delete_old_keys")
    pauses = iter([None, None])
    monkeypatch.setattr("time.sleep", lambda _: next(pauses))
    with pytest.raises(StopIteration):
        purge.clean_forever()
    round_ = ["delete_pages", "delete_pages", "delete_old_keys"]
    assert called == round_ * 2
    assert f"{failing} failed and will be retried" in caplog.text


def test_the_purge_reads_only_old_jobs(backlog, settings):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"RETENTION_DAYS": 1 / 24 / 60}
    deliver(enqueue(add, [1, 2]))
    Job.objects.filter(started_at__isnull=False).update(finished_at=Now() - timedelta(minutes=2))
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE durable_jobs_job")
    page = queries(purge.of_jobs().delete_page)[0]
    assert "durable_jobs_job_finished" in explain(page) and rows_read(page) <= 1, explain(page)
