"""Run again keeps the row of a failed job and its batch, and no run before writes into it."""

import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import shared_task
from celery.exceptions import Ignore
from celery.worker import state as worker_state
from celery.worker.control import Panel
from django.db import connection
from django.utils import timezone
from helpers import broken, call_concurrently, claim, collect, failed, finish, follow, start, work

from durable_jobs import batches
from durable_jobs.actions import cancel, run_again, run_all_again
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue
from durable_jobs.exceptions import JobLost
from durable_jobs.models import Batch, Failure, Job
from durable_jobs.tasks import JobTask
from durable_jobs.worker import remote_control
from durable_jobs.worker.lease import write_and_renew
from durable_jobs.worker.steps import run_step

pytestmark = pytest.mark.django_db
only_postgresql = pytest.mark.skipif(
    "connection.vendor != 'postgresql'", reason="set DATABASE_URL=postgres://…"
)


@shared_task(base=JobTask, bind=True, max_retries=1)
def retried(self, n):
    if n in broken:
        raise self.retry(countdown=0)
    return n


@pytest.mark.parametrize("way", ["job", "queryset"])
def test_a_failed_job_is_queued_again_in_its_own_row(published, user, commit, way):
    kept = {"owner": user, "label": "Import", "idempotency_key": "key"}
    kept |= {"cursor": 7, "steps": {"charge": 7}}
    job = failed(**kept, progress=70)
    Failure.objects.create(job=job, started_at=timezone.now(), error="no")
    created_at = Job.objects.get().created_at
    with commit():
        again = run_again(job) if way == "job" else run_all_again(Job.objects.all())[0]
        assert published == []  # its message is sent after the commit
    assert (again.pk, again.state, published) == (job.pk, "queued", [str(job.pk)])
    row = Job.objects.get()
    assert (row.state, row.retries, row.crashes, row.times_sent) == ("queued", 0, 0, 1)
    assert (row.error, row.public_error, row.message, row.result) == ("", "", "", None)
    assert (row.finished_at, row.created_at, row.progress) == (None, created_at, 70)
    assert {name: getattr(row, name) for name in kept} == kept
    assert row.failures.count() == 1
    for name in ("state", "retries", "crashes", "error", "progress", "due_at", "send_at"):
        assert getattr(again, name) == getattr(row, name), name


def test_a_job_that_runs_again_may_be_retried_and_may_crash_as_often_as_a_new_one(run_jobs):
    broken.add(1)
    job = enqueue(retried, [1])
    run_jobs()
    job.refresh_from_db()
    assert (job.state, job.retries, job.failures.count()) == ("failed", 1, 2)
    Job.objects.update(crashes=2)
    run_again(job)
    run_jobs()
    job.refresh_from_db()
    assert (job.state, job.retries, job.crashes, job.failures.count()) == ("failed", 1, 0, 4)
    broken.clear()
    run_again(job)
    run_jobs()
    job.refresh_from_db()
    assert (job.state, job.result, job.error) == ("succeeded", 1, "")


def test_without_a_cursor_the_progress_starts_again(published):
    again = run_again(failed(progress=70))
    assert (again.progress, Job.objects.get().progress) == (0, 0)


def test_a_message_of_the_run_before_starts_the_job_once(published):
    """A cancelled job may still have a message in the broker."""
    job = enqueue(work, [1])
    cancel(job)
    job.refresh_from_db()
    run_again(job)
    assert [claim(job.pk), claim(job.pk)] == [1, 0]


def test_a_job_that_succeeded_is_enqueued_anew(published, user):
    batch = batches.enqueue([work.s(1)], owner=user)
    job = batch.jobs.get()
    finish(Job.objects.all(), "succeeded", cursor=7, steps={"a": 1}, result=1)
    batches.end(batch.pk)
    job.refresh_from_db()
    for again in run_again(job), *run_all_again(Job.objects.filter(pk=job.pk)):
        assert again.pk != job.pk
        again.refresh_from_db()
        assert (again.follows, again.owner, again.args) == (job.pk, user, [1])
        assert (again.batch, again.cursor, again.steps) == (None, None, {})
    job.refresh_from_db()
    batch.refresh_from_db()
    assert (job.state, job.result, batch.state) == ("succeeded", 1, "succeeded")


def test_a_unique_job_gives_way_to_the_active_one(published):
    batch = Batch.objects.create(state="failed", ended_at=timezone.now())
    job = failed(unique_key="key", batch=batch)
    other = enqueue(work, [2], unique="key")
    before = Job.objects.filter(pk=job.pk).values().get()
    assert run_again(job) == other
    assert run_all_again(Job.objects.filter(pk=job.pk)) == [other]
    assert (job.state, Job.objects.filter(pk=job.pk).values().get()) == ("failed", before)
    batch.refresh_from_db()
    assert batch.state == "failed"
    cancel(other)
    assert run_again(job) == job
    assert enqueue(work, [2], unique="key") == job


@pytest.mark.django_db(transaction=True)
def test_two_who_run_a_job_again_run_it_once():
    job = enqueue(work, [1], countdown=60)
    for way in range(4):
        cancel(job)
        job.refresh_from_db()

        def again(way=way):
            try:
                row = Job.objects.get(pk=job.pk)
                if row.state == "queued":
                    raise ValueError
                return len(run_all_again(Job.objects.all())) if way % 2 else bool(run_again(row))
            except ValueError:
                return 0

        Job.objects.filter(pk=job.pk).update(queue=f"none-{way}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("durable_jobs.enqueue.publish", lambda jobs: None)
            assert sum(call_concurrently(5, again)) == 1
        job.refresh_from_db()
        assert job.state == "queued"


def freeze():
    """Return a job that was run again, and its run before, whose worker is frozen."""
    job = enqueue(work, [1])
    zombie = start(job)
    cancel(job)
    job.refresh_from_db()
    run_again(job)
    return job, zombie


def check_zombie(zombie, end):
    zombie.task = work
    if end == "succeed":
        with pytest.raises(Ignore):
            zombie.succeed(99)
    elif end == "fail":
        try:
            raise OSError
        except OSError:
            zombie.fail()
    elif end == "cursor":
        with pytest.raises(JobLost):
            zombie.write_cursor(99)
    elif end == "step":
        with pytest.raises(JobLost):
            run_step(zombie, "charge", pytest.fail, ["called"], {})
    else:
        zombie.report = {"progress": 99, "message": "zombie"}
        write_and_renew([zombie])
        assert zombie.lost


@pytest.mark.parametrize("end", ["succeed", "fail", "cursor", "step", "renewal"])
def test_a_frozen_run_does_not_write_into_the_run_that_was_started_again(published, end):
    job, zombie = freeze()
    new = start(job)
    check_zombie(zombie, end)
    job.refresh_from_db()
    assert (job.state, job.run_token, job.cursor, job.steps) == ("running", new.token, None, {})
    new.succeed(1)
    job.refresh_from_db()
    assert (job.state, job.result) == ("succeeded", 1)


@pytest.mark.parametrize("end", ["succeed", "fail"])
def test_a_run_that_is_lost_does_not_take_the_queued_job(published, end):
    """For example a thread over its time limit, whose job was run again, and waits for a slot."""
    job, zombie = freeze()
    check_zombie(zombie, end)
    job.refresh_from_db()
    assert (job.state, job.retries, claim(job.pk)) == ("queued", 0, 1)


def test_a_revoked_job_can_run_again(published, monkeypatch):
    """A worker of Celery ignores each message of a revoked id for three hours."""
    job, plain = enqueue(work, [1]), str(uuid.uuid4())
    revoke = lambda state, ids, **kwargs: worker_state.revoked.update(ids)  # noqa: E731  as Celery's does
    monkeypatch.setitem(Panel.data, "revoke", revoke)
    monkeypatch.setitem(Panel.data, "terminate", None)
    monkeypatch.setattr(remote_control, "in_thread", lambda update, *args: update(*args))
    remote_control.cancel_revoked_jobs()
    Panel.data["revoke"](None, [str(job.pk), plain, "no id"])
    job.refresh_from_db()
    assert job.state == "cancelled"
    assert str(job.pk) not in worker_state.revoked
    assert plain in worker_state.revoked and "no id" in worker_state.revoked
    worker_state.revoked.clear()


# Many jobs


def test_many_jobs_run_again(published, commit):
    batch = Batch.objects.create(state="failed", ended_at=timezone.now())
    rows = [Job(task=work.name, args=[n], queue="celery", batch=batch) for n in range(400)]
    for n, job in enumerate(rows):
        job.state = ["failed", "cancelled", "succeeded", "queued"][n % 4]
        ended = job.state != "queued"
        job.finished_at = timezone.now() if ended else None
        job.send_at = None if ended else timezone.now()
    Job.objects.bulk_create(rows)
    Job.objects.filter(pk=rows[0].pk).update(task="gone")
    with commit():
        again = run_all_again(Job.objects.all())
    assert len(again) == len(set(again)) == 299
    assert sorted(published) == sorted(str(job.pk) for job in again)
    assert Job.objects.filter(state="queued", batch=batch).count() == 100 + 199
    assert Job.objects.filter(follows__isnull=False, batch=None, state="queued").count() == 100
    batch.refresh_from_db()
    assert batch.state == "open"


def test_a_slice_of_jobs_can_run_again(published):
    first, second, _ = sorted((failed() for _ in range(3)), key=lambda job: job.pk)
    assert set(run_all_again(Job.objects.order_by("pk")[:2])) == {first, second}


# Batches


def test_a_batch_whose_failed_jobs_run_again_starts_what_comes_next_once(run_jobs):
    broken.update([1, 3])
    batch = batches.enqueue(
        [work.s(n) for n in range(5)], on_success=collect.s("then"), on_finish=collect.si("ended")
    )
    run_jobs()
    assert follow(batch) == [["ended"]]
    assert (batch.state, batch.counts) == ("failed", {"succeeded": 3, "failed": 2})
    broken.remove(1)
    again = batches.run_failed_again(batch)
    assert (len(again), batch.state, batch.ended_at, batch.error) == (2, "open", None, "")
    run_jobs()
    assert follow(batch) == [["ended"]]  # `ended` has started at the first end, and not again
    assert (batch.state, batch.error) == ("failed", "1 failed of 5")
    broken.clear()
    run_again(batch.jobs.get(state="failed"))
    run_jobs()
    assert sorted(follow(batch), key=len) == [["ended"], [[0, 1, 2, 3, 4], "then"]]
    assert (batch.state, batch.counts) == ("succeeded", {"succeeded": 5})
    assert batches.run_failed_again(batch) == []
    batches.end_all()
    assert len(follow(batch)) == 2


def test_a_cancelled_batch_can_run_again(run_jobs):
    batch = batches.enqueue([work.s(n) for n in range(3)], on_success=collect.s())
    batches.cancel(batch)
    assert batch.state == "cancelled"
    batches.run_failed_again(batch)
    run_jobs()
    assert follow(batch) == [[[0, 1, 2]]]


def test_only_the_batches_of_jobs_that_run_again_open(run_jobs):
    done = batches.enqueue([work.s(1)])
    run_jobs()
    broken.add(2)
    bad = batches.enqueue([work.s(2)])
    run_jobs()
    run_all_again(Job.objects.all())
    done.refresh_from_db()
    bad.refresh_from_db()
    assert (done.state, bad.state) == ("succeeded", "open")


@only_postgresql
@pytest.mark.django_db(transaction=True)
@pytest.mark.timeout(600)
def test_run_again_while_a_batch_ends_loses_no_callback(monkeypatch):
    """A member fails and is run again, while the other one ends. Then all have succeeded."""
    monkeypatch.setattr("durable_jobs.enqueue.publish", lambda jobs: None)
    rounds = int(os.environ.get("ROUNDS", 100))

    def finish(pk, state):
        Job.objects.filter(pk=pk).update(
            state=state, finished_at=Now(), send_at=None, run_token=None
        )

    def end(barrier, batch, members):
        try:
            for first, second in members:
                barrier.wait(60)
                finish(second, "succeeded")
                batches.end(batch[first])
        finally:
            connection.close()

    def again(barrier, batch, members):
        try:
            for first, _ in members:
                barrier.wait(60)
                job = Job.objects.get(pk=first)
                run_again(job)
                finish(first, "succeeded")
                batches.end(batch[first])
        finally:
            connection.close()

    batch, members = {}, []
    for _ in range(rounds):
        row = batches.enqueue(
            [work.s(1), work.s(2)], on_success=collect.s(), on_finish=collect.si("ended")
        )
        first, second = row.jobs.order_by("created_at").values_list("pk", flat=True)
        finish(first, "failed")
        batch[first] = row.pk
        members.append((first, second))
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(side, barrier, batch, members) for side in (end, again)]:
            each.result()
    assert Batch.objects.filter(state="succeeded").count() == rounds
    follows = list(Job.objects.filter(follows__isnull=False).values_list("follows", "args"))
    assert len([pk for pk, args in follows if args == ["ended"]]) == rounds
    assert len([pk for pk, args in follows if args != ["ended"]]) == rounds
    assert len({pk for pk, _ in follows}) == rounds
