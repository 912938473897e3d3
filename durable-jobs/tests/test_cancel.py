"""A cancelled job never starts, and a job that has ended or just started stays as it is."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from django.db import connection
from helpers import add, claim, deliver, failed, run_while_open

from durable_jobs import transitions
from durable_jobs.actions import cancel, run_again, run_all_again
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.models import Failure, Job

pytestmark = pytest.mark.django_db


def test_a_cancelled_job_never_starts():
    job = enqueue(add, [1, 2])
    assert cancel(Job.objects.all()) == 1
    assert (deliver(job).state, job.result) == ("cancelled", None)


def test_a_job_that_has_ended_cannot_be_cancelled():
    job = deliver(enqueue(add, [1, 2]))
    assert cancel(Job.objects.all()) == 0
    job.refresh_from_db()
    assert job.state == "succeeded"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("by", ["owner__username", "failures__error", "state", "pk"])
def test_a_job_that_changes_while_cancel_waits_is_not_cancelled(published, user, by):
    """With a join, PostgreSQL checks no condition of an UPDATE again when it has waited."""
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has one transaction at a time: set DATABASE_URL=postgres://…")
    job, run = enqueue(add, [1, 2], owner=user), uuid.uuid4()
    Failure.objects.create(job=job, started_at=Now(), error=user.username)
    if by == "state":
        change, state = partial(claim, job.pk, run), "running"
    else:
        assert claim(job.pk, run)
        end = {"id": job.pk, "run_token": run, "result": 3, "message": ""}
        change, state = partial(transitions.succeed, **end), "succeeded"
    condition = {by: {"pk": job.pk, "state": "queued"}.get(by, user.username)}
    assert run_while_open(change, lambda: cancel(Job.objects.filter(**condition))) == 0
    job.refresh_from_db()
    assert job.state == state


def test_a_job_that_a_join_repeats_is_cancelled_and_run_again_once(published):
    job = enqueue(add, [1, 2])
    for _ in range(2):
        Failure.objects.create(job=job, started_at=Now(), error="away")
    jobs = Job.objects.filter(failures__error="away")
    assert cancel(jobs) == 1
    assert len(run_all_again(jobs)) == 1


@pytest.mark.django_db(transaction=True)
@pytest.mark.skipif(connection.vendor != "postgresql", reason="SQLite has no locks of rows")
def test_two_calls_that_cancel_the_same_jobs_do_not_deadlock(broker_down):
    """PostgreSQL finds the rows of one call in the order of the table, those of the other by an index."""
    pks = [job.pk for job in enqueue_many([add.s(1, n) for n in range(400)])]
    calls = {
        "enable_indexscan": Job.objects.filter(label=""),
        "enable_seqscan": Job.objects.filter(pk__in=pks),
    }
    both_are_ready = threading.Barrier(2)

    def cancel_them(without):
        with connection.cursor() as cursor:
            cursor.execute(f"SET enable_bitmapscan = off; SET {without} = off")
        try:
            both_are_ready.wait()
            return cancel(calls[without])
        finally:
            connection.close()

    with ThreadPoolExecutor() as threads:
        assert sum(threads.map(cancel_them, calls)) == 400


@pytest.mark.skipif(connection.vendor != "postgresql", reason="SQLite has no locks of rows")
def test_a_job_that_runs_again_while_others_are_cancelled_is_not_changed_without_its_lock(
    published,
):
    """Two calls would lock such jobs in any order, and deadlock."""
    job, late = enqueue(add, [1, 2]), [failed()]

    def run_one_again(execute, sql, *args):
        answer = execute(sql, *args)
        if "FOR UPDATE" in sql and late:
            run_again(late.pop())
        return answer

    with connection.execute_wrapper(run_one_again):
        assert cancel(Job.objects.all()) == 1
    assert set(Job.objects.values_list("state", flat=True)) == {"cancelled", "queued"}
    assert cancel(job) == 0
