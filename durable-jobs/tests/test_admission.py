"""Admission: how many jobs of a key run at once, how many start in a period, and who is next."""

import uuid
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from celery import current_app
from celery import signals as celery_signals
from celery.exceptions import SoftTimeLimitExceeded, Terminated
from celery.worker.request import Request
from django.db import Error
from django.db.models import F
from django.utils import timezone
from helpers import (
    alone,
    ask,
    call,
    end,
    free,
    lapse,
    of_job,
    seconds_until_due,
    seconds_waited,
    start,
    sweeper,
)

from durable_jobs import admission, pauses, transitions
from durable_jobs.actions import cancel, run_again
from durable_jobs.beat.sweeper import recover_lapsed
from durable_jobs.database import Now
from durable_jobs.diagnosis import reasons
from durable_jobs.enqueue import enqueue_many
from durable_jobs.exceptions import JobError
from durable_jobs.limits import parse
from durable_jobs.models import Job, Key
from durable_jobs.pools import pool
from durable_jobs.process import process
from durable_jobs.worker import children, lease, shutdown

pytestmark = pytest.mark.django_db


def blocked(key="one"):
    return Job.objects.filter(blocked_by=key).count()


def test_a_job_over_its_limit_is_blocked(sent, commit):
    with commit():
        jobs = [call.enqueue(7) for _ in range(3)]
        other = call.enqueue(8)
    assert sent == [jobs[0].pk, jobs[1].pk, other.pk]
    jobs[2].refresh_from_db()
    assert (jobs[2].blocked_by, jobs[2].send_at, jobs[2].times_sent) == ("tenant:7", None, 0)
    assert jobs[2].state == "queued" and jobs[2].limit_key == "tenant:7"


def test_a_run_hands_its_slot_to_the_oldest_job(sent, commit):
    with commit():
        jobs = enqueue_many([alone.s(number) for number in range(3)])
    for number, job in enumerate(jobs):
        assert sent == [each.pk for each in jobs[: number + 1]]
        with commit():
            end(start(job))
    assert not blocked()


def test_a_failed_run_and_a_retry_hand_over_the_slot(sent, commit):
    with commit():
        jobs = enqueue_many([alone.s(number) for number in range(3)])
    run = start(jobs[0])
    with commit(), run:
        try:
            raise JobError("no")
        except JobError:
            run.fail()
    run = start(jobs[1])
    run.retry = {"delay": 60, "args": [], "kwargs": {}, "retries": 1}
    with commit(), run:
        run.try_again()
    assert sent == [job.pk for job in jobs]
    jobs[1].refresh_from_db()
    assert (jobs[1].state, jobs[1].blocked_by, jobs[1].send_at) == ("queued", "one", None)
    assert jobs[1].due_at > timezone.now() + timedelta(seconds=50)


def test_a_retry_at_once_goes_before_newer_jobs(sent, commit):
    with commit():
        first, _ = enqueue_many([alone.s(1), alone.s(2)])
    run = start(first)
    run.retry = {"delay": 0, "args": [], "kwargs": {}, "retries": 1}
    with run:
        run.try_again()
    assert sent == [first.pk, first.pk]


def test_a_cancelled_task_function_keeps_its_slot(sent, commit):
    with commit():
        first, second = enqueue_many([alone.s(1), alone.s(2)])
    run = start(first)
    with commit():
        cancel(first)
    assert sent == [first.pk]
    with pytest.raises(ValueError, match="is still running"):
        run_again(Job.objects.get(pk=first.pk))
    with commit(), run:
        assert not run.write(transitions.fail, run.row)
    assert sent == [first.pk, second.pk]
    with commit():
        run_again(Job.objects.get(pk=first.pk))
    assert blocked() == 1


def test_the_sweeper_admits_blocked_jobs(sent):
    jobs = enqueue_many([call.s(7, number) for number in range(4)])
    sweeper.sender.send_due()
    assert sent == [job.pk for job in jobs[:2]]
    sweeper.sender.send_due()
    assert sent == [job.pk for job in jobs[:2]]


def test_the_oldest_job_that_is_due_goes_first(sent, commit):
    """A job that is tried again does not wait behind those that were enqueued after it."""
    later, first, second = enqueue_many([alone.s(number) for number in range(3)])
    Job.objects.filter(pk=later.pk).update(due_at=Now() + timedelta(hours=1))
    Job.objects.filter(pk=first.pk).update(due_at=Now() - timedelta(seconds=1), retries=1)
    Job.objects.filter(pk=second.pk).update(due_at=Now() - timedelta(hours=1))
    for expected in [first, second]:
        sweeper.sender.send_due()
        assert sent[-1] == expected.pk
        Job.objects.filter(pk=expected.pk).delete()


def test_deleted_jobs_free_their_slots(sent, commit):
    with commit():
        first, second = enqueue_many([alone.s(1), alone.s(2)])
    Job.objects.filter(pk=first.pk).delete()
    sweeper.sender.send_due()
    assert sent == [first.pk, second.pk]


def test_an_admission_that_fails_is_left_to_the_sweeper(sent, commit, monkeypatch, caplog):
    def refuse(*args):
        raise Error("no")

    with monkeypatch.context() as patch:
        patch.setattr(admission, "free_slots", refuse)
        with commit():
            job = alone.enqueue()
    assert "could not admit jobs of one" in caplog.text and not sent
    sweeper.sender.send_due()
    assert sent == [job.pk]


def test_a_blocked_job_says_what_it_waits_for(sent, commit, settings):
    with commit():
        *_, job = [call.enqueue(7) for _ in range(3)]
    job.refresh_from_db()
    text = "Waiting: limit tenant:7 is full (2 of 2 slots taken)"
    assert reasons(Job.objects.all()) == {job.pk: text}
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {}}
    assert reasons([job]) == {job.pk: "Waiting: limit tenant:7 no longer exists"}


# A slot is kept, or handed over


@pytest.mark.parametrize("way", ["lease", "child"])
def test_a_task_function_of_a_cancelled_job_that_dies_frees_its_slot(
    sent, commit, monkeypatch, way
):
    with commit():
        first, second = enqueue_many([alone.s(1), alone.s(2)])
    run = start(first)
    token, _ = run.token, cancel(first)
    if way == "lease":
        sweeper.sender.send_due()
        assert sent == [first.pk]  # its lease has not lapsed
        lapse(first)
        sweeper.sender.send_due()
        assert sent == [first.pk]  # a worker gets time to renew it
        recover_lapsed()
        sweeper.sender.send_due()
    else:
        monkeypatch.setattr(children, "in_thread", lambda update, *args, delay: update(*args))
        with commit():
            children.recover_later(first.pk, of_job(run_token=token))
    assert sent == [first.pk, second.pk]
    assert Job.objects.get(pk=first.pk).lease_ends_at is None


@pytest.mark.parametrize("renew", ["process", "children"])
def test_a_cancelled_task_function_renews_the_lease_of_its_slot(sent, commit, monkeypatch, renew):
    with commit():
        job = alone.enqueue()
    run = start(job)
    cancel(job)
    Job.objects.update(lease_ends_at=Now() + timedelta(seconds=1))
    if renew == "process":
        lease.write_and_renew([run])
        assert run.lost
    else:
        request = SimpleNamespace(id=str(job.pk), request_dict=of_job(run_token=run.token))
        monkeypatch.setattr(children.state, "active_requests", [request])
        monkeypatch.setattr(children, "between_forks", lambda query, *args: query(*args))
        sleeps = iter([None])
        monkeypatch.setattr(children.time, "sleep", lambda seconds: next(sleeps))
        with pytest.raises(StopIteration):
            children.renew_leases_of_children()
    assert Job.objects.filter(lease_ends_at__gt=Now() + timedelta(seconds=20)).exists()


@pytest.mark.parametrize(
    "error, is_free",
    [(Terminated(9), True), (SystemExit(), True), (SoftTimeLimitExceeded(), False)],
)
def test_a_revoke_frees_the_slot_only_if_it_kills_the_task_function(
    sent, commit, monkeypatch, error, is_free
):
    """SIGUSR1 is the soft time limit: the task function may continue."""
    monkeypatch.setattr(process, "is_prefork", True)
    monkeypatch.setattr(children, "in_thread", lambda update, *args, delay: update(*args))
    monkeypatch.setattr(Request, "on_failure", Mock())
    with commit():
        job = alone.enqueue()
    headers = {"id": str(job.pk), "task": job.task, **of_job(run_token=start(job).token)}
    cancel(job)
    message = Mock(headers=headers, payload=([], {}, {}), delivery_info={}, properties={})
    request = children.JobRequest(message, app=current_app)
    request._already_revoked = True
    request.on_failure(SimpleNamespace(exception=error, traceback=""))
    assert (Job.objects.get(pk=job.pk).lease_ends_at is None) == is_free


def test_a_run_that_was_overtaken_frees_no_slot_of_the_newer_one(sent, commit):
    """The newer run was cancelled, and it still runs."""
    with commit():
        first, _ = enqueue_many([alone.s(1), alone.s(2)])
    old = start(first)
    Job.objects.filter(pk=first.pk).update(crashes=1, run_token=uuid.uuid4())
    cancel(first)
    with commit(), old:
        assert not old.write(transitions.fail, old.row)
    assert Job.objects.get(pk=first.pk).lease_ends_at
    assert sent == [first.pk]


def test_a_queued_job_that_is_queued_again_keeps_its_slot(sent, commit):
    """Its worker shuts down, or it must not run beside another suspect."""
    with commit():
        first, _ = enqueue_many([alone.s(1), alone.s(2)])
    transitions.send_again(Job.objects.filter(pk=first.pk), 60)
    sweeper.sender.send_due()
    first.refresh_from_db()
    assert (first.blocked_by, first.times_sent) == (None, 0) and first.send_at
    assert sent == [first.pk] and blocked() == 1


def test_a_job_that_is_released_is_the_next_one_again(sent, commit):
    """A deploy must not put it behind all jobs of its key."""
    with commit():
        first, _ = enqueue_many([alone.s(1), alone.s(2)])
    run = start(first)
    with run:
        run.release()
    assert sent == [first.pk, first.pk] and blocked() == 1


def test_a_message_that_cannot_be_sent_keeps_the_slot(commit, broker_down):
    with commit():
        first, _ = enqueue_many([alone.s(1), alone.s(2)])
    first.refresh_from_db()
    assert (first.blocked_by, first.times_sent) == (None, 0) and first.send_at
    assert blocked() == 1


def test_what_a_process_releases_at_its_end_keeps_its_slot_and_starts_later(
    sent, commit, monkeypatch
):
    """Until the process has ended the task functions run: neither these jobs nor the next ones may start."""
    with commit():
        [first, _], other = enqueue_many([alone.s(1), alone.s(2)]), free.enqueue()
    states = []

    def look(_):
        states.append([Job.objects.get(pk=job.pk).state for job in (first, other)])

    monkeypatch.setattr(pool, "sleep", look)
    monkeypatch.setattr("os._exit", look)
    ended = Mock()  # for example, it exports the process's spans
    celery_signals.worker_shutdown.connect(ended)
    Job.objects.update(due_at=Now() - timedelta(seconds=1000))
    with start(first), start(other):
        shutdown.requeue_and_exit(Mock())
        for run in list(process.runs.values()):
            run.has_written = True
            run.limit_key = None  # the process has ended, so no run does
    assert ended.called
    assert states == [["running", "running"], ["running", "queued"], ["queued", "queued"]]
    for job in first, other:
        assert -1000 < seconds_until_due(job) <= 1
    assert seconds_waited(other) < 100  # again from now
    Job.objects.filter(send_at__isnull=False).update(send_at=Now() + timedelta(seconds=60))
    sweeper.sender.send_due()
    assert sent == [first.pk, other.pk] and blocked() == 1
    Job.objects.filter(send_at__isnull=False).update(send_at=Now())
    sweeper.sender.send_due()
    assert sorted(sent) == sorted([first.pk, other.pk] * 2) and blocked() == 1


def test_what_a_process_releases_at_its_end_waits_for_its_rate_again(sent, commit, monkeypatch):
    with commit():
        job = ask.enqueue(1)
    monkeypatch.setattr(pool, "sleep", Mock())
    monkeypatch.setattr("os._exit", Mock())
    run = start(job)
    with run:
        shutdown.requeue_and_exit(Mock())
        run.has_written, run.limit_key = True, None
    Job.objects.update(due_at=Now())
    sweeper.sender.send_due()
    assert sent == [job.pk] and blocked("api") == 1
    later(3600)
    sweeper.sender.send_due()
    assert sent == [job.pk, job.pk] and blocked("api") == 0


def test_a_countdown_of_a_blocked_job_takes_no_slot_and_wakes_the_sweeper(sent, commit):
    with commit():
        later, now = alone.using(countdown=3).enqueue(), alone.enqueue()
    assert sent == [now.pk]
    assert 2 < sweeper.sender.send_due() < 3
    assert reasons([Job.objects.get(pk=later.pk)]) == {}


def test_a_claim_that_is_repeated_succeeds_although_a_pause_has_begun(sent, commit):
    """Its answer was lost: the run owns the job."""
    with commit():
        job = alone.enqueue()
    run = start(job)
    pauses.pause("celery")
    assert run.claim()


def test_a_lowered_limit_admits_no_job_until_enough_have_ended(sent, commit, settings):
    with commit():
        jobs = enqueue_many([call.s(7, number) for number in range(4)])
    first, second = map(start, jobs[:2])
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {
        "LIMITS": {**settings.DURABLE_JOBS["LIMITS"], "tenant": "1"}
    }
    with commit():
        end(first)
    assert len(sent) == 2
    with commit():
        end(second)
    assert len(sent) == 3


def test_a_raised_limit_applies_at_the_next_round(sent, commit, settings):
    with commit():
        jobs = enqueue_many([call.s(7, number) for number in range(4)])
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"tenant": "4"}}
    sweeper.sender.send_due()
    assert sent == [job.pk for job in jobs]


# Rates


def later(seconds):
    """So many seconds pass for the rates."""
    Key.objects.update(next_at=F("next_at") - timedelta(seconds=seconds))


def test_starts_of_a_rate_are_spread_evenly(sent, commit):
    """3 an hour."""
    with commit():
        jobs = enqueue_many([ask.s(number) for number in range(3)])
    for number, job in enumerate(jobs, 1):
        assert sent == [each.pk for each in jobs[:number]]
        with commit():
            end(start(job))
        later(1190)
        sweeper.sender.send_due()
        assert len(sent) == number
        later(11)
        sweeper.sender.send_due()


def test_a_start_counts_whatever_happens_to_its_job(sent, commit):
    with commit():
        deleted, retried, back, _ = enqueue_many([ask.s(number) for number in range(4)])
    end(start(deleted))
    Job.objects.filter(pk=deleted.pk).delete()
    later(1200)
    sweeper.sender.send_due()
    run = start(retried)
    run.retry = {"delay": 7200, "args": [], "kwargs": {}, "retries": 1}
    with commit(), run:
        run.try_again()
    later(1200)
    sweeper.sender.send_due()
    run = start(back)
    with commit(), run:
        run.release()
    sweeper.sender.send_due()
    assert sent == [deleted.pk, retried.pk, back.pk] and blocked("api") == 3


def test_few_jobs_of_a_rate_are_admitted_before_one_starts(sent, settings):
    """Else all would start at once when the workers come back."""
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"one": "9/h", "api": "30/h"}}
    enqueue_many([alone.s(number) for number in range(9)])
    enqueue_many([ask.s(number) for number in range(9)])
    for _ in range(3):
        sweeper.sender.send_due()
        later(3600)
    assert (blocked("one"), blocked("api")) == (8, 6)


@pytest.mark.parametrize("rate", ["1/min", "9/min", "10/min", "35/min", "1000/min"])
def test_never_more_starts_than_the_rate_in_any_period(rate):
    """Also if jobs come one by one, and then as many as may be ahead."""
    limit = parse(rate)
    times = [limit.interval * n for n in range(limit.starts)]
    times += [limit.interval * limit.starts] * limit.ahead
    spans = [last - first for first, last in zip(times, times[limit.starts :], strict=False)]
    assert min(spans) > limit.period - timedelta(milliseconds=1)


def test_a_job_that_starts_while_others_are_admitted_counts(sent, commit, settings, monkeypatch):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"api": "20/h"}}  # two are ahead
    with commit():
        first = ask.enqueue(1)
    enqueue_many([ask.s(2), ask.s(3)])
    waits, looks = admission.waits_for_rates, iter(range(9))

    def start_under_the_lock(limits):
        found = waits(limits)
        if next(looks) == 1:
            start(first)
        return found

    monkeypatch.setattr(admission, "waits_for_rates", start_under_the_lock)
    admission.admit(["api"])
    assert len(sent) == 2 and blocked("api") == 1


def test_a_rate_says_what_a_job_waits_for(sent, commit):
    with commit():
        first, second = enqueue_many([ask.s(1), ask.s(2)])
    start(first)
    text = "Waiting: limit api allows at most 3/h"
    assert reasons([Job.objects.get(pk=second.pk)]) == {second.pk: text}


@pytest.mark.parametrize("seconds", [0, 900])
def test_the_sweeper_wakes_when_the_next_job_of_a_rate_may_start(sent, settings, seconds):
    """Also if it has just admitted one: when this has ended, nobody else looks."""
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"SWEEP_SECONDS": 9999}
    jobs = enqueue_many([ask.s(number) for number in range(5)])
    assert sweeper.sender.send_due() == 1200
    end(start(jobs[0]))
    later(seconds)
    assert sweeper.sender.send_due() == pytest.approx(1200 - seconds, abs=5)


@pytest.mark.parametrize(
    "limit, running, expected",
    [("1000/h", 0, 100), ("2, 1000/h", 0, 2), ("2, 1000/h", 1, 1), ("2, 1000/h", 2, 2)],
)
def test_the_sweeper_wakes_when_the_admitted_jobs_of_a_rate_have_started(
    sent, commit, settings, limit, running, expected
):
    """Not after the time of one start: their worker may be down, or they may run for long."""
    limits = {"SWEEP_SECONDS": 9999, "LIMITS": {"api": limit}}
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | limits
    with commit():
        jobs = enqueue_many([ask.s(number) for number in range(101)])
    for job in jobs[:running]:
        start(job)
    later(9999)
    wait = expected * parse(limit).interval.total_seconds()
    assert sweeper.sender.send_due() == pytest.approx(wait)


@pytest.mark.parametrize("waits, expected", [((9, 0.001), 0.02), ((0.01, 9), 0.5), ((9, 3), 3)])
def test_the_sweeper_rests_between_two_rounds(sent, monkeypatch, waits, expected):
    """A rate such as 5/s needs shorter rests than a countdown."""
    monkeypatch.setattr(admission, "admit_due", lambda paused: waits)
    assert sweeper.sender.send_due() == expected


def test_old_keys_are_deleted():
    Key.objects.bulk_create(Key(key=key) for key in ["api", "one"])
    Key.objects.filter(key="one").update(next_at=Now() - timedelta(hours=2))
    admission.delete_old_keys()
    assert Key.objects.get().key == "api"


def test_a_round_of_the_sweeper_is_short_however_many_keys_are_due(sent):
    """Countdowns, recovery and other queues wait for it."""
    enqueue_many([call.s(n) for n in range(400)])
    assert sweeper.sender.send_due() < 0.1
    assert 0 < len(sent) <= 300
    sweeper.sender.send_due()
    assert len(sent) == len(set(sent)) == 400
