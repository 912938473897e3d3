"""Leases: a live worker keeps its jobs, and those of a dead one are queued again or fail."""

import threading
import time
from contextlib import suppress
from datetime import timedelta
from unittest.mock import Mock

import pytest
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.db.models import F
from helpers import (
    add,
    ask,
    beside_locked,
    call,
    claim,
    claim_and_lapse,
    errors,
    lapse,
    run_of,
    seconds_until_due,
    seconds_waited,
    start,
    sweeper,
)

from durable_jobs import database, transitions
from durable_jobs.beat.sweeper import recover_lapsed
from durable_jobs.database import Now, SetLocal
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from durable_jobs.worker import lease, runs, shutdown

pytestmark = pytest.mark.django_db
IDLE = "idle_in_transaction_session_timeout"


def test_a_running_job_with_a_lease_is_not_recovered():
    job = enqueue(add, [1, 2])
    claim_and_lapse(job)
    transitions.renew(Job.objects.all())
    recover_lapsed()
    assert seconds_until_due(job) == pytest.approx(30, abs=5)
    assert job.state == "running"


@pytest.mark.parametrize("renewal", [lease.write_and_renew, None, "cursor"])
def test_a_lease_that_is_renewed_after_the_deadline_has_lapsed_and_fails_the_job(renewal):
    job = enqueue(add, [1, 2])
    run = start(job)
    for limit, seconds in (20, 30), (-20, 0):
        Job.objects.update(deadline=Now() + timedelta(seconds=limit))
        if renewal == "cursor":
            run.write_cursor(limit)
        elif renewal:
            renewal([run])
        else:
            lease.renew(Job.objects.all())
        assert seconds_until_due(job) == pytest.approx(seconds, abs=5)
    recover_lapsed()
    job.refresh_from_db()
    assert (job.state, job.error) == ("failed", "Exceeded its time limit")


@pytest.mark.parametrize("limit", [20, 30])
def test_a_job_with_a_short_time_limit_whose_worker_died_runs_again(monkeypatch, limit):
    """Its lease of 30 s lapses at or after the deadline."""
    monkeypatch.setattr(add, "time_limit", limit)
    job = enqueue(add, [1, 2])
    start(job)
    assert seconds_until_due(job) == pytest.approx(30, abs=5)
    past = timedelta(seconds=40)
    Job.objects.update(lease_ends_at=F("lease_ends_at") - past, deadline=F("deadline") - past)
    recover_lapsed()
    job.refresh_from_db()
    assert (job.state, job.crashes) == ("queued", 1)


def test_a_lease_is_renewed_soon_after_the_deadline(monkeypatch):
    monkeypatch.setattr(add, "time_limit", 15)
    clock = Mock(monotonic=Mock(return_value=0))
    monkeypatch.setattr(runs, "time", clock)
    run, renewed = run_of(enqueue(add, [1, 2])), []
    for second in range(40):
        clock.monotonic.return_value = second
        if run.needs_write():
            renewed.append(second)
            run.plan_renewal()
    assert renewed == [11, 17, 28, 39]


def test_the_renewal_of_leases_finds_lost_runs():
    job = enqueue(add, [1, 2])
    mine, other = run_of(job), run_of(job)
    claim(job.pk, mine.token)
    lease.write_and_renew([mine, other])
    assert (mine.lost, other.lost) == (False, True)


def start_admitted(job):
    Job.objects.update(blocked_by=None, send_at=Now())
    return start(job)


def claim_with_rate():
    start_admitted(enqueue(ask, [1]))


def fail_and_hand_over():
    run = start_admitted(enqueue(call, [1]))
    with transaction.atomic(), pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            run.fail()
            raise


def mark_due():
    enqueue(add, [1, 2], countdown=60)
    Job.objects.update(send_at=Now())
    sweeper.sender.send_due()


@pytest.mark.parametrize("write", [claim_with_rate, fail_and_hand_over, mark_due])
def test_a_process_that_freezes_in_a_transaction_locks_no_job_for_long(write, sent):
    """PostgreSQL ends a transaction of which nothing was heard for this time, and frees its rows."""
    if connection.vendor != "postgresql":
        pytest.skip("SQLite locks the whole file: set DATABASE_URL=postgres://…")
    with connection.cursor() as cursor:
        cursor.execute(f"SET LOCAL {IDLE} TO 0")
        write()
        cursor.execute(f"SHOW {IDLE}")
        assert cursor.fetchall() == [("10s",)]


@pytest.mark.parametrize(("task", "waits"), [(add, "off"), (call, "on")])
def test_only_the_claim_of_a_job_with_a_limit_waits_for_the_disk(task, waits, sent):
    if connection.vendor != "postgresql":
        pytest.skip("SQLite waits for each commit: set DATABASE_URL=postgres://…")
    start_admitted(enqueue(task, [1, 2] if task is add else [1]))
    with connection.cursor() as cursor:
        cursor.execute("SHOW synchronous_commit")
        assert cursor.fetchall() == [(waits,)]


@pytest.mark.django_db(transaction=True)
def test_a_worker_that_freezes_while_it_renews_a_lease_locks_no_job_for_long(monkeypatch):
    if connection.vendor != "postgresql":
        pytest.skip("SQLite locks the whole file: set DATABASE_URL=postgres://…")
    monkeypatch.setattr(database, "IDLE_TIMEOUT", SetLocal(name=IDLE, value="'100ms'"))
    job = enqueue(add, [1, 2], countdown=60)
    run = run_of(job)
    assert claim(job.pk, run.token)
    frozen, resumed = threading.Event(), threading.Event()

    def freeze():
        frozen.set()
        resumed.wait()
        return {"lease_ends_at": Now()}

    def renew(function, argument):
        with suppress(DatabaseError):
            function(argument)
        connection.close()

    monkeypatch.setattr(transitions, "renewed", freeze)
    mine = Job.objects.filter(pk=job.pk)
    for renewal in (lease.write_and_renew, [run]), (lease.renew, mine):
        frozen.clear(), resumed.clear()
        thread = threading.Thread(target=renew, args=renewal)
        thread.start()
        assert frozen.wait(60)
        for _ in range(300):
            with transaction.atomic():
                if free := list(mine.select_for_update(skip_locked=True)):
                    break
            time.sleep(0.1)
        resumed.set()
        thread.join()
        assert free == [job]


# A lease has lapsed


def test_a_job_waits_longer_after_each_crash_and_fails_after_the_third(caplog):
    job = enqueue(add, [1, 2])
    for crashes, delay in (1, 5), (2, 10):
        claim_and_lapse(job)
        recover_lapsed()
        assert seconds_until_due(job) == pytest.approx(delay, rel=0.3)
        assert (job.state, job.crashes, job.times_sent) == ("queued", crashes, 0)
    claim_and_lapse(job)
    recover_lapsed()
    job.refresh_from_db()
    assert (job.state, job.error) == ("failed", "Its worker died 3 times")
    assert (
        job.public_error == "The worker running this job stopped unexpectedly 3 times"
    )  # for its owner
    assert f"job {job.pk} failed: Its worker died 3 times" in caplog.text
    assert errors(job) == ["Its worker died"] * 3


def test_a_job_past_its_deadline_fails():
    job = enqueue(add, [1, 2])
    claim_and_lapse(job, limit=-1)
    transitions.renew(Job.objects.all())  # its worker is alive
    recover_lapsed()
    job.refresh_from_db()
    assert (job.state, job.error, job.crashes) == ("failed", "Exceeded its time limit", 0)
    assert job.public_error == job.error
    assert errors(job) == ["Exceeded its time limit"]


def test_a_job_whose_worker_died_earlier_runs_again_after_its_deadline():
    """Beat, or everything, was down meanwhile."""
    job = enqueue(add, [1, 2])
    claim_and_lapse(job, limit=-1)
    recover_lapsed()
    job.refresh_from_db()
    assert (job.state, job.crashes) == ("queued", 1)


def test_the_waiting_time_starts_again_after_a_crash_or_a_retry(settings):
    crashed, retried = (enqueue(add, [1, 2]) for _ in range(2))
    Job.objects.update(due_at=Now() - timedelta(seconds=500))
    claim_and_lapse(crashed)
    claim_and_lapse(retried)
    transitions.retry(Job.objects.filter(pk=retried.pk), None, 30)
    recover_lapsed()
    assert seconds_waited(crashed) == pytest.approx(-5, abs=3)
    assert seconds_waited(retried) == pytest.approx(-30, abs=3)


def test_a_job_that_cannot_be_recovered_does_not_stop_others(monkeypatch, caplog):
    jobs = [enqueue(add, [1, 2]) for _ in range(5)]
    for job in jobs:
        claim_and_lapse(job)
    recover = transitions.recover

    def fail(self, *args, **kwargs):
        if self.filter(pk=jobs[3].pk).exists():
            raise IntegrityError("a trigger")
        return recover(self, *args, **kwargs)

    monkeypatch.setattr(transitions, "recover", fail)
    recover_lapsed()
    assert list(Job.objects.filter(state="running")) == [jobs[3]]
    assert "a trigger" in caplog.text


BULK_UPDATES = {
    "to send": lambda runs: sweeper.sender.send_due(),
    "to find lapsed leases": lambda runs: recover_lapsed(),
    "to recover": lambda runs: lease.recover(Job.objects.all()),
    "to renew": lease.write_and_renew,
    "to renew for children": lambda runs: lease.renew(Job.objects.all()),
    "to release": shutdown.release,
}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("update", BULK_UPDATES)
def test_an_update_of_many_jobs_skips_locked_rows(published, update):
    """A wait for one row would delay all others."""
    locked, other = jobs = [enqueue(add, [1, 2], countdown=1) for _ in range(2)]
    both = [run_of(job) for job in jobs]
    if update != "to send":
        for run in both:
            assert claim(run.job_id, run.token)
    lapse(*jobs)
    beside_locked(locked, lambda: BULK_UPDATES[update](both))
    assert seconds_until_due(locked) < 0 < seconds_until_due(other)
