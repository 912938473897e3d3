"""Run again keeps a job's row and its batch. The purge deletes nothing that is still needed."""

import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from celery import chain, chord, shared_task
from celery.exceptions import Ignore
from celery.worker import state as worker_state
from celery.worker.control import Panel
from django.db import connection
from django.db.models import RestrictedError
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from test_jobs import call_concurrently, claim, published  # noqa: F401  a fixture

from jobs import batches, runs, sweep, updates, worker
from jobs.lease import write_and_renew
from jobs.models import Batch, Failure, Job
from jobs.publish import publish
from jobs.tasks import JobError, JobTask

pytestmark = pytest.mark.django_db
only_postgresql = pytest.mark.skipif(
    "connection.vendor != 'postgresql'", reason="set DATABASE_URL=postgres://…"
)
with_transactions = pytest.mark.django_db(transaction=True)
broken = set()  # the numbers for which work() fails


@pytest.fixture(autouse=True)
def nothing_is_broken():
    broken.clear()


@shared_task(base=JobTask)
def work(n):
    if n in broken:
        raise JobError("broken")
    return n


@shared_task(base=JobTask)
def collect(*args):
    return list(args)


@shared_task(base=JobTask, bind=True, max_retries=1)
def retried(self, n):
    if n in broken:
        raise self.retry(countdown=0)
    return n


def failed(**fields):
    """Return a job that failed in its third try, after a crash."""
    fields = {"task": work.name, "args": [1], "queue": "celery", **fields}
    fields |= {"state": "failed", "retries": 2, "crashes": 1, "error": "no", "public_error": "no"}
    fields |= {"finished_at": timezone.now(), "started_at": timezone.now(), "message": "Row 7"}
    return Job.objects.create(**fields)


def numbers(batch):
    return list(batch.jobs.order_by("created_at").values_list("state", flat=True))


def follow(batch):
    """Return the results of what this batch has started."""
    batch.refresh_from_db()
    return list(Job.objects.filter(follows=batch.pk).values_list("result", flat=True))


def age(rows, field, days=31):
    rows.update(**{field: Now() - timedelta(days=days)})


def purge():
    for model, field in (Job, "finished_at"), (Batch, "ended_at"):
        sweep.Purge(model, field).delete_page()


# One job


@pytest.mark.parametrize("way", ["job", "queryset"])
def test_a_failed_job_is_queued_again_in_its_own_row(published, user, commit, way):  # noqa: F811
    then = [{"task": collect.name, "args": [], "kwargs": {}, "queue": "celery", "label": ""}]
    kept = {"owner": user, "label": "Import", "idempotency_key": "key", "cursor": 7, "then": then}
    job = failed(**kept, progress=70)
    Failure.objects.create(job=job, started_at=timezone.now(), error="no")
    created_at = Job.objects.get().created_at
    with commit():
        again = job.run_again() if way == "job" else Job.objects.all().run_again()[0]
        assert published == []  # its message is sent after the commit
    assert (again.pk, again.state, published) == (job.pk, "queued", [str(job.pk)])
    row = Job.objects.get()
    assert (row.state, row.retries, row.crashes, row.times_sent) == ("queued", 0, 0, 1)
    assert (row.error, row.public_error, row.message, row.result) == ("", "", "", None)
    assert (row.finished_at, row.created_at, row.progress) == (None, created_at, 70)
    assert {name: getattr(row, name) for name in kept} == kept
    assert row.failures.count() == 1
    for name in ("state", "retries", "crashes", "error", "progress", "due_at", "sweep_at"):
        assert getattr(again, name) == getattr(row, name), name


def test_a_job_that_runs_again_may_be_retried_and_may_crash_as_often_as_a_new_one(run_jobs):
    broken.add(1)
    job = Job.objects.enqueue(retried, [1])
    run_jobs()
    job.refresh_from_db()
    assert (job.state, job.retries, job.failures.count()) == ("failed", 1, 2)
    Job.objects.update(crashes=2)
    job.run_again()
    run_jobs()
    job.refresh_from_db()
    assert (job.state, job.retries, job.crashes, job.failures.count()) == ("failed", 1, 0, 4)
    broken.clear()
    job.run_again()
    run_jobs()
    job.refresh_from_db()
    assert (job.state, job.result, job.error) == ("succeeded", 1, "")


def test_without_a_cursor_the_progress_starts_again(published):  # noqa: F811
    again = failed(progress=70).run_again()
    assert (again.progress, Job.objects.get().progress) == (0, 0)


def test_a_message_of_the_run_before_starts_the_job_once(published):  # noqa: F811
    """A cancelled job may still have a message in the broker."""
    job = Job.objects.enqueue(work, [1])
    job.cancel()
    job.refresh_from_db()
    job.run_again()
    assert [claim(job.pk), claim(job.pk)] == [1, 0]


def test_a_job_that_succeeded_is_enqueued_anew(published, user):  # noqa: F811
    batch = Batch.objects.enqueue(work, [[1]], owner=user)
    job = batch.jobs.get()
    updates.finish(Job.objects.all(), "succeeded", cursor=7, then=[], result=1)
    batches.end(batch.pk)
    job.refresh_from_db()
    for again in job.run_again(), *Job.objects.filter(pk=job.pk).run_again():
        assert again.pk != job.pk
        again.refresh_from_db()
        assert (again.follows, again.owner, again.args) == (job.pk, user, [1])
        assert (again.batch, again.then, again.cursor) == (None, None, None)
    job.refresh_from_db()
    batch.refresh_from_db()
    assert (job.state, job.result, batch.state) == ("succeeded", 1, "succeeded")


def test_a_unique_job_gives_way_to_the_active_one(published):  # noqa: F811
    batch = Batch.objects.create(state="failed", ended_at=timezone.now())
    job = failed(unique_key="key", batch=batch)
    other = Job.objects.enqueue(work, [2], unique="key")
    before = Job.objects.filter(pk=job.pk).values().get()
    assert job.run_again() == other
    assert Job.objects.filter(pk=job.pk).run_again() == [other]
    assert (job.state, Job.objects.filter(pk=job.pk).values().get()) == ("failed", before)
    batch.refresh_from_db()
    assert batch.state == "failed"
    other.cancel()
    assert job.run_again() == job
    assert Job.objects.enqueue(work, [2], unique="key") == job


@with_transactions
def test_two_who_run_a_job_again_run_it_once():
    job = Job.objects.enqueue(work, [1], countdown=60)
    for way in range(4):
        job.cancel()
        job.refresh_from_db()

        def again(way=way):
            try:
                row = Job.objects.get(pk=job.pk)
                if row.state == "queued":
                    raise ValueError
                return len(Job.objects.all().run_again()) if way % 2 else bool(row.run_again())
            except ValueError:
                return 0

        Job.objects.filter(pk=job.pk).update(queue=f"none-{way}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jobs.queryset.publish", lambda jobs: None)
            assert sum(call_concurrently(5, again)) == 1
        job.refresh_from_db()
        assert job.state == "queued"


def zombie_of(job):
    """Start a run of this job, and freeze its worker."""
    run = runs.Run(
        job.pk,
        worker="",
        retries=job.retries,
        crashes=job.crashes,
        times_sent=1,
        limit=timedelta(seconds=60),
        lease=timedelta(seconds=30),
    )
    assert run.claim()
    return run


@pytest.mark.parametrize("end", ["succeed", "fail", "cursor", "renewal"])
def test_a_frozen_run_does_not_write_into_the_run_that_was_started_again(published, end):  # noqa: F811
    job = Job.objects.enqueue(work, [1])
    zombie = zombie_of(job)
    job.cancel()
    job.refresh_from_db()
    job.run_again()
    new = zombie_of(job)
    check_zombie(zombie, end)
    job.refresh_from_db()
    assert (job.state, job.run_token, job.cursor) == ("running", new.token, None)
    new.succeed(1)
    job.refresh_from_db()
    assert (job.state, job.result) == ("succeeded", 1)


@pytest.mark.parametrize("end", ["succeed", "fail"])
def test_a_run_that_knows_that_it_is_lost_does_not_take_the_queued_job(published, end):  # noqa: F811
    """For example a thread over its time limit, whose job was run again, and waits for a slot."""
    job = Job.objects.enqueue(work, [1])
    zombie = zombie_of(job)
    job.cancel()
    zombie.overtaken = True  # the renewal of its lease has found out
    job.refresh_from_db()
    job.run_again()
    check_zombie(zombie, end)
    job.refresh_from_db()
    assert (job.state, job.retries, claim(job.pk)) == ("queued", 0, 1)


def check_zombie(zombie, end):
    zombie.task, zombie.in_body = work, end in ("cursor", "renewal")
    if end == "succeed":
        with pytest.raises(Ignore):
            zombie.succeed(99)
    elif end == "fail":
        try:
            raise OSError
        except OSError:
            zombie.fail()
    elif end == "cursor":
        with pytest.raises(runs.JobLost):
            zombie.write_cursor(99)
    else:
        zombie.report = {"progress": 99, "message": "zombie"}
        write_and_renew([zombie])
        assert zombie.lost


def test_a_revoked_job_can_run_again(published, monkeypatch):  # noqa: F811
    """A worker of Celery ignores each message of a revoked id for three hours."""
    job, plain = Job.objects.enqueue(work, [1]), str(uuid.uuid4())
    revoke = lambda state, ids, **kwargs: worker_state.revoked.update(ids)  # noqa: E731  as Celery's does
    monkeypatch.setitem(Panel.data, "revoke", revoke)
    monkeypatch.setitem(Panel.data, "terminate", None)
    monkeypatch.setattr(worker, "in_thread", lambda update, *args: update(*args))
    worker.cancel_revoked_jobs()
    Panel.data["revoke"](None, [str(job.pk), plain, "no id"])
    job.refresh_from_db()
    assert job.state == "cancelled"
    assert str(job.pk) not in worker_state.revoked
    assert plain in worker_state.revoked and "no id" in worker_state.revoked
    worker_state.revoked.clear()


# Many jobs


def test_many_jobs_run_again_together(published, commit, monkeypatch):  # noqa: F811
    monkeypatch.setattr("jobs.queryset.BATCH_SIZE", 100)
    batch = Batch.objects.create(state="failed", ended_at=timezone.now())
    rows = [Job(task=work.name, args=[n], queue="celery", batch=batch) for n in range(400)]
    for n, job in enumerate(rows):
        job.state = ["failed", "cancelled", "succeeded", "queued"][n % 4]
        ended = job.state != "queued"
        job.finished_at = timezone.now() if ended else None
        job.sweep_at = None if ended else timezone.now()
    Job.objects.bulk_create(rows)
    Job.objects.filter(pk=rows[0].pk).update(task="gone")
    with CaptureQueriesContext(connection) as queries, commit():
        again = Job.objects.all().run_again()
    assert len(queries) < 25
    assert len(again) == len(set(again)) == 299
    assert sorted(published) == sorted(str(job.pk) for job in again)
    assert Job.objects.filter(state="queued", batch=batch).count() == 100 + 199
    assert Job.objects.filter(follows__isnull=False, batch=None, state="queued").count() == 100
    batch.refresh_from_db()
    assert batch.state == "open"


def test_a_slice_of_jobs_can_run_again(published):  # noqa: F811
    first, second, _ = sorted((failed() for _ in range(3)), key=lambda job: job.pk)
    assert Job.objects.order_by("pk")[:2].run_again() == [first, second]


# Batches


def test_a_batch_whose_failed_jobs_run_again_starts_what_comes_next_once(run_jobs):
    broken.update([1, 3])
    batch = Batch.objects.enqueue(
        work, [[n] for n in range(5)], then=collect.s("then"), ended=collect.si("ended")
    )
    run_jobs()
    assert follow(batch) == [["ended"]]
    assert (batch.state, batch.counts) == ("failed", {"succeeded": 3, "failed": 2})
    broken.remove(1)
    again = batch.run_failed_again()
    assert (len(again), batch.state, batch.ended_at, batch.error) == (2, "open", None, "")
    run_jobs()
    assert follow(batch) == [["ended"]]  # `ended` has started at the first end, and not again
    assert (batch.state, batch.error) == ("failed", "1 failed of 5")
    broken.clear()
    batch.jobs.get(state="failed").run_again()
    run_jobs()
    assert sorted(follow(batch), key=len) == [["ended"], [[0, 1, 2, 3, 4], "then"]]
    assert (batch.state, batch.counts) == ("succeeded", {"succeeded": 5})
    assert batch.run_failed_again() == []
    batches.end_all()
    assert len(follow(batch)) == 2


def test_a_cancelled_batch_can_run_again(run_jobs):
    batch = Batch.objects.enqueue(work, [[n] for n in range(3)], then=collect.s())
    batch.cancel()
    assert batch.state == "cancelled"
    batch.run_failed_again()
    run_jobs()
    assert follow(batch) == [[[0, 1, 2]]]


def test_a_failed_step_of_a_chain_continues_the_chain(run_jobs):
    broken.add(2)
    last = chain(work.si(1), work.si(2), collect.s(3))()
    run_jobs()
    Job.objects.get(state="failed").run_again()
    broken.clear()
    run_jobs()
    assert last.get() == [2, 3]
    assert Job.objects.count() == 3


@pytest.mark.parametrize("way", ["batch", "job"])
def test_a_chord_in_a_chord_opens_with_its_parent(run_jobs, way):
    broken.add(2)
    header = [chord([work.si(1), work.si(2)], collect.s("inner")), work.si(3)]
    last = chord(header)(collect.s("outer"))
    run_jobs()
    outer = Batch.objects.get(parent=None)
    assert [outer.state, outer.children.get().state] == ["failed", "failed"]
    broken.clear()
    if way == "batch":
        assert len(outer.run_failed_again()) == 1
    else:
        Job.objects.get(state="failed").run_again()
        outer.refresh_from_db()
    assert [outer.state, outer.children.get().state] == ["open", "open"]
    run_jobs()
    assert last.get() == [[[[1, 2], "inner"], 3], "outer"]
    assert Job.objects.count() == 5


def test_only_the_batches_of_jobs_that_run_again_open(run_jobs):
    done = Batch.objects.enqueue(work, [[1]])
    run_jobs()
    broken.add(2)
    bad = Batch.objects.enqueue(work, [[2]])
    run_jobs()
    Job.objects.all().run_again()
    done.refresh_from_db()
    bad.refresh_from_db()
    assert (done.state, bad.state) == ("succeeded", "open")


@only_postgresql
@with_transactions
@pytest.mark.timeout(600)
def test_run_again_while_a_batch_ends_loses_no_callback(monkeypatch):
    """A member fails and is run again, while the other one ends. Then all have succeeded."""
    monkeypatch.setattr("jobs.queryset.publish", lambda jobs: None)
    rounds = int(os.environ.get("ROUNDS", 100))

    def finish(pk, state):
        Job.objects.filter(pk=pk).update(
            state=state, finished_at=Now(), sweep_at=None, run_token=None
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
                job.run_again()
                finish(first, "succeeded")
                batches.end(batch[first])
        finally:
            connection.close()

    batch, members = {}, []
    for _ in range(rounds):
        row = Batch.objects.enqueue(work, [[1], [2]], then=collect.s(), ended=collect.si("ended"))
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


# The purge


def test_no_member_is_deleted_before_its_batch_and_its_callbacks_have_ended(run_jobs):
    broken.add(2)
    batch = Batch.objects.enqueue(work, [[1], [2]], then=collect.s())
    run_jobs()
    broken.clear()
    batch.run_failed_again()
    age(batch.jobs.filter(state="succeeded"), "finished_at")
    purge()
    assert batch.jobs.count() == 2  # the batch is open
    publish([batch.jobs.get(state="queued")])
    age(Job.objects.filter(state="succeeded"), "finished_at")
    purge()
    assert batch.jobs.count() == 2  # the batch has just ended
    age(Batch.objects.all(), "ended_at")
    purge()
    assert batch.jobs.count() == 2  # its callback is queued
    run_jobs()
    assert follow(batch) == [[[1, 2]]]
    purge()
    assert batch.jobs.count() == 2  # its callback has just ended
    age(Job.objects.all(), "finished_at")
    purge()
    purge()
    assert (Job.objects.count(), Batch.objects.count()) == (0, 0)


def test_a_result_is_kept_while_the_next_step_is_unfinished(run_jobs):
    last = chain(work.si(1), collect.s(2))()
    publish([Job.objects.get()])
    age(Job.objects.filter(state="succeeded"), "finished_at")
    purge()
    assert Job.objects.count() == 2
    run_jobs()
    assert last.get() == [1, 2]


def test_members_of_a_batch_inside_an_open_one_are_kept(run_jobs):
    broken.add(1)
    chord([chord([work.si(1), work.si(2)], collect.s("inner")), work.si(3)])(collect.s("outer"))
    run_jobs()
    inner, outer = Batch.objects.exclude(parent=None).get(), Batch.objects.get(parent=None)
    age(Job.objects.all(), "finished_at")
    age(Batch.objects.filter(pk=inner.pk), "ended_at")
    purge()
    assert (Job.objects.count(), Batch.objects.count()) == (3, 2)
    broken.clear()
    assert len(outer.run_failed_again()) == 1  # so this still works
    run_jobs()
    assert follow(outer) == [[[[[1, 2], "inner"], 3], "outer"]]
    age(Job.objects.all(), "finished_at")
    age(Batch.objects.all(), "ended_at")
    for _ in range(3):
        purge()
    assert (Job.objects.count(), Batch.objects.count()) == (0, 0)


@pytest.mark.parametrize("way", ["job", "queryset", "batch"])
def test_a_job_of_a_batch_that_is_being_deleted_does_not_run_again(run_jobs, way):
    """`then` would start without the jobs that are gone."""
    broken.add(2)
    batch = Batch.objects.enqueue(work, [[1], [2]], then=collect.s())
    run_jobs()
    age(Batch.objects.all(), "ended_at")
    job = batch.jobs.get(state="failed")
    if way == "job":
        with pytest.raises(ValueError, match="its batch is so old"):
            job.run_again()
    elif way == "queryset":
        assert Job.objects.filter(pk=job.pk).run_again() == []
    else:
        assert batch.run_failed_again() == []
    job.refresh_from_db()
    batch.refresh_from_db()
    assert (job.state, batch.state) == ("failed", "failed")


def test_a_callback_whose_batch_has_lost_members_fails(run_jobs):
    batch = Batch.objects.enqueue(work, [[1], [2]], then=collect.s())
    run_jobs()
    callback = Job.objects.get(follows=batch.pk)
    batch.jobs.first().delete()
    again = callback.run_again()
    run_jobs()
    again.refresh_from_db()
    assert again.state == "failed"
    assert f"it needs the results of the batch {batch.pk}, which were deleted" in again.error


@with_transactions
def test_a_job_that_runs_again_while_it_is_purged_is_not_deleted(monkeypatch):
    """It was read by the purge as an old one."""
    monkeypatch.setattr("jobs.queryset.publish", lambda jobs: None)
    job = failed()
    age(Job.objects.all(), "finished_at")
    in_halves = sweep.try_in_halves

    def run_again_first(*args):
        Job.objects.get().run_again()
        return in_halves(*args)

    monkeypatch.setattr(sweep, "try_in_halves", run_again_first)
    purge()
    assert Job.objects.get(pk=job.pk).state == "queued"


def test_jobs_that_must_be_kept_stop_no_purge_of_others(monkeypatch):
    monkeypatch.setattr(sweep, "PURGE_BATCH", 10)
    is_open = Batch.objects.create()
    for _ in range(35):
        failed(batch=is_open)
    age(Job.objects.all(), "finished_at", 40)  # all at the same time
    other = failed()
    age(Job.objects.filter(pk=other.pk), "finished_at", 35)
    purges = sweep.Purge(Job, "finished_at", start_over_at=time.monotonic() + 60)
    for page in range(4):
        assert Job.objects.filter(pk=other.pk).exists(), page
        purges.delete_page()
    assert not Job.objects.filter(pk=other.pk).exists()
    assert is_open.jobs.count() == 35
    batches.end(is_open.pk)
    age(Batch.objects.all(), "ended_at")
    purges.delete_page()
    assert is_open.jobs.count() == 35  # it starts over once an hour
    purges.start_over_at = 0
    for _ in range(6):
        purges.delete_page()
    assert is_open.jobs.count() == 0


def test_a_batch_without_jobs_is_deleted_when_it_is_old(user):
    old, new = Batch.objects.enqueue(work, [], owner=user), Batch.objects.enqueue(work, [])
    age(Batch.objects.filter(pk=old.pk), "ended_at")
    purge()
    assert list(Batch.objects.all()) == [new]


def test_a_batch_is_deleted_after_its_jobs_and_the_batches_in_it():
    """Else one transaction would delete all of them, however many there are."""
    ended = {"state": "failed", "ended_at": timezone.now()}
    outer = Batch.objects.create(**ended)
    inner = Batch.objects.create(**ended, parent=outer)
    failed(batch=inner)
    age(Job.objects.all(), "finished_at")
    age(Batch.objects.all(), "ended_at")
    left = []
    for table in sweep.Purge(Batch, "ended_at"), sweep.Purge(Job, "finished_at"):
        table.delete_page()
        left.append((Batch.objects.count(), Job.objects.count()))
    for _ in range(2):
        sweep.Purge(Batch, "ended_at").delete_page()
        left.append((Batch.objects.count(), Job.objects.count()))
    assert left == [(2, 1), (2, 0), (1, 0), (0, 0)]


def test_a_batch_or_a_user_with_active_jobs_is_not_deleted(user, admin_client):
    batch = Batch.objects.enqueue(work, [[1], [2]], owner=user)
    for row in batch, user:
        with pytest.raises(RestrictedError, match="active jobs: cancel them first"):
            row.delete()
    page = admin_client.get(f"/admin/auth/user/{user.pk}/delete/").content.decode()
    assert "would require deleting the following protected" in page
    batch.cancel()
    user.delete()
    assert (Job.objects.count(), Batch.objects.count()) == (0, 0)
