"""Limits: how many jobs with the same key run at once, and how many start in a period."""

from datetime import timedelta

import pytest
from celery import shared_task
from django.db import transaction
from django.db.models import F
from django.utils import timezone
from test_jobs import CLAIM

from jobs import messages, sweep, turns, updates
from jobs.models import Job, Pause, Start
from jobs.runs import Run
from jobs.tasks import JobError, JobTask

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask, limit="tenant:{tenant}")
def call(tenant, number=0):
    return number


@shared_task(base=JobTask, limit="one")
def alone(number=0):
    return number


@shared_task(base=JobTask, limit="api")
def ask(number=0):
    return number


@pytest.fixture
def sent(monkeypatch):
    """The ids of the jobs whose messages were sent. No worker takes them."""
    ids = []
    monkeypatch.setattr(messages, "send_one", lambda job, *args, **options: ids.append(job.pk))
    monkeypatch.setattr(sweep, "messages_in", lambda *args: len(ids))
    return ids


def start(job):
    """Claim a job as a worker does. Returns its Run."""
    run = Run(job.pk, task=call, limit_key=job.limit_key, **CLAIM)
    assert run.claim()
    return run


def end(run, result=None):
    with run:
        run.succeed(result)


def held(key="one"):
    return Job.objects.filter(held_by=key).count()


def test_a_job_over_its_limit_is_held(sent, commit):
    with commit():
        jobs = [call.enqueue(7) for _ in range(3)]
        other = call.enqueue(8)
    assert sent == [jobs[0].pk, jobs[1].pk, other.pk]
    jobs[2].refresh_from_db()
    assert (jobs[2].held_by, jobs[2].sweep_at, jobs[2].times_sent) == ("tenant:7", None, 0)
    assert jobs[2].state == "queued" and jobs[2].limit_key == "tenant:7"


def test_a_run_hands_its_place_to_the_oldest_job(sent, commit):
    with commit():
        jobs = Job.objects.enqueue_many(alone, [[number] for number in range(3)])
    for number, job in enumerate(jobs):
        assert sent == [each.pk for each in jobs[: number + 1]]
        with commit():
            end(start(job))
    assert not held()


def test_a_failed_run_and_a_retry_hand_over_the_place(sent, commit):
    with commit():
        jobs = Job.objects.enqueue_many(alone, [[number] for number in range(3)])
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
    assert (jobs[1].state, jobs[1].held_by, jobs[1].sweep_at) == ("queued", "one", None)
    assert jobs[1].due_at > timezone.now() + timedelta(seconds=50)


def test_a_cancelled_body_keeps_its_place(sent, commit):
    with commit():
        first, second = Job.objects.enqueue_many(alone, [[1], [2]])
    run = start(first)
    with commit():
        first.cancel()
    assert sent == [first.pk]
    with pytest.raises(ValueError, match="its body has not ended yet"):
        Job.objects.get(pk=first.pk).run_again()
    with commit(), run:
        assert not run.write(updates.finish, run.row, "failed")
    assert sent == [first.pk, second.pk]
    with commit():
        Job.objects.get(pk=first.pk).run_again()
    assert held() == 1


def test_a_rate_counts_starts_in_the_period(sent, commit):
    with commit():
        jobs = Job.objects.enqueue_many(ask, [[number] for number in range(5)])
    assert len(sent) == 3
    for job in jobs[:3]:
        end(start(job))
    assert Start.objects.count() == 3
    sweep.send_due()
    assert len(sent) == 3
    Start.objects.update(started_at=F("started_at") - timedelta(hours=1))
    sweep.send_due()
    assert sent == [job.pk for job in jobs]


def test_the_sweep_lets_held_jobs_go(sent):
    jobs = Job.objects.enqueue_many(call, [[7, number] for number in range(4)])
    sweep.send_due()
    assert sent == [job.pk for job in jobs[:2]]
    sweep.send_due()
    assert sent == [job.pk for job in jobs[:2]]


def test_places_starts_and_pauses_are_not_read_from_a_replica(replica):
    """It lags behind."""
    with transaction.atomic():  # of which the replica sees nothing
        Job.objects.enqueue_many(ask, [[number] for number in range(5)])
        Start.objects.bulk_create(Start(key="api") for _ in range(2))
        assert len(turns.let_go(["api"])) == 1
        Pause.objects.pause("celery")
        assert turns.paused_names() == ["celery"]
        assert [pause.name for pause in Pause.objects.filter(name="celery")] == ["celery"]
        assert Pause.objects.resume("celery")


def test_jobs_run_in_tests_whatever_their_limits_say(run_jobs, commit):
    with commit():
        first = Job.objects.enqueue_many(ask, [[number] for number in range(10)])
    assert not Job.objects.exclude(state="succeeded").exists()
    Job.objects.enqueue_many(ask, [[number] for number in range(10)])
    run_jobs()
    assert Job.objects.filter(state="succeeded").count() == 20
    assert len(first) == 10


def test_a_paused_job_is_held_when_a_worker_claims_it(sent, commit):
    with commit():
        job = Job.objects.enqueue("x" and alone, [1], queue="io")
    Pause.objects.pause("io", "SMTP is down")
    run = Run(job.pk, task=alone, limit_key="one", **CLAIM)
    assert not run.claim()
    run.hold_if_paused()
    job.refresh_from_db()
    assert (job.held_by, job.sweep_at, job.times_sent) == ("pause:io", None, 0)
    assert turns.reasons([job])[job.pk].endswith(": SMTP is down")
    sent.clear()
    with commit():
        Pause.objects.resume("io")
    sweep.send_due()
    sweep.send_due()
    assert sent == [job.pk]
