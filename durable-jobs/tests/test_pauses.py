"""Pauses: while a queue or a task is paused, no job of it starts. The order stays."""

from datetime import timedelta

import pytest
from django.db.models import F
from django.utils import timezone
from helpers import add, alone, call, deliver, end, lapse, requeue, run_of, start, sweeper

from durable_jobs import pauses
from durable_jobs.actions import cancel, run_again
from durable_jobs.beat import purge
from durable_jobs.database import Now
from durable_jobs.diagnosis import reasons
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job, Pause

pytestmark = pytest.mark.django_db
LONG_AGO = Now() - timedelta(hours=1)


def store(count=1, task=add, **options):
    """Store jobs, but send no message: the test's transaction does not commit."""
    args = [1, 2] if task is add else [1]
    return [enqueue(task, args, **options) for _ in range(count)]


def meet_pause(job):
    """The message of this job arrives at a worker, which finds the pause."""
    run = run_of(job)
    assert not run.claim()
    assert run.put_back_if_paused()


def state(job):
    return Job.objects.values_list("blocked_by", "times_sent").get(pk=job.pk)


@pytest.mark.parametrize("name", ["io", add.name])
def test_a_worker_starts_no_job_of_a_paused_queue_or_task(name):
    [job], [other] = store(queue="io"), store(task=alone, queue="cpu")
    pauses.pause(name)
    deliver(job)
    job.refresh_from_db()
    assert (job.state, job.send_at, job.times_sent) == (
        "queued",
        max(job.due_at, job.created_at),
        0,
    )
    Job.objects.filter(pk=other.pk).update(blocked_by=None, send_at=Now())
    start(Job.objects.get(pk=other.pk))


def test_a_job_that_runs_is_not_interrupted_and_ends(commit):
    [job] = store(queue="io")
    run = start(job)
    pauses.pause("io")
    end(run, 7)
    job.refresh_from_db()
    assert (job.state, job.result) == ("succeeded", 7)


@pytest.mark.parametrize("name", ["io", add.name])
def test_the_sweeper_sends_the_rest(sent, name):
    paused, [other] = store(3, queue="io", countdown=60), store(queue="cpu", task=call)
    requeue(Job.objects.filter(pk=other.pk))
    lapse(*paused)
    pauses.pause(name)
    sweeper.sender.send_due()
    assert sent == [other.pk]


def test_the_sweeper_does_not_repeat_the_messages_of_paused_jobs(sent):
    [job] = store(queue="io")
    lapse(job)
    pauses.pause("io")
    sweeper.sender.send_due()
    assert not sent


def test_paused_jobs_start_in_order_when_the_pause_ends(sent):
    jobs = store(4, queue="io")
    pauses.pause("io")
    for job in reversed(jobs):
        meet_pause(job)
    sweeper.sender.send_due()
    assert not sent
    assert pauses.resume("io") is True
    sweeper.sender.send_due()
    assert sent == [job.pk for job in jobs]


def test_a_countdown_continues_during_a_pause(sent):
    _, [soon] = store(queue="io", countdown=3600), store(queue="io", countdown=60)
    pauses.pause("io")
    Job.objects.filter(pk=soon.pk).update(due_at=LONG_AGO, send_at=LONG_AGO)
    sweeper.sender.send_due()
    assert not sent
    pauses.resume("io")
    sweeper.sender.send_due()
    assert sent == [soon.pk]


def test_a_second_pause_keeps_the_time_and_may_change_the_reason():
    first = pauses.pause("io", "SMTP is down")
    assert pauses.pause("io").reason == "SMTP is down"
    again = pauses.pause("io", "x" * 300)
    assert (again.reason, again.since) == ("x" * 255, Pause.objects.get().since)
    assert first.pk == again.pk


def test_resume_says_whether_the_name_was_paused():
    pauses.pause("io")
    assert pauses.resume("io") is True
    assert pauses.resume("io") is False


@pytest.mark.parametrize("name", ["", "oi", "tasks.add"])
def test_the_name_of_no_queue_and_no_task_is_refused(name):
    with pytest.raises(ValueError, match="no queue or task is named .* the queues are celery"):
        pauses.pause(name)


def test_a_queue_without_settings_can_be_paused_if_it_has_a_job():
    store(queue="tenants")
    assert pauses.pause("tenants")


def test_a_job_whose_queue_and_task_are_paused_waits_for_both(sent):
    [job] = store(queue="io")
    pauses.pause("io")
    pauses.pause(add.name, "a bug")
    meet_pause(job)
    pauses.resume("io")
    sweeper.sender.send_due()
    assert not sent
    assert "a bug" in reasons([Job.objects.get(pk=job.pk)])[job.pk]
    pauses.resume(add.name)
    sweeper.sender.send_due()
    assert sent == [job.pk]


def test_a_paused_job_can_be_cancelled_and_run_again(sent):
    [job] = store(queue="io")
    pauses.pause("io")
    meet_pause(job)
    assert cancel(Job.objects.get(pk=job.pk))
    run_again(Job.objects.get(pk=job.pk))
    meet_pause(job)
    pauses.resume("io")
    sweeper.sender.send_due()
    assert sent == [job.pk]


def test_an_ended_job_of_a_paused_queue_is_deleted(commit):
    [job] = store(queue="io")
    pauses.pause("io")
    meet_pause(job)
    cancel(job)
    Job.objects.update(finished_at=Now() - timedelta(days=99))
    purge.of_jobs().delete_page()
    assert not Job.objects.exists()


# With limits


def test_a_paused_job_gives_its_slot_to_the_next_one_at_once(sent, commit):
    with commit():
        [paused], [other] = store(task=alone, queue="io"), store(task=alone, queue="cpu")
        Job.objects.filter(pk=paused.pk).update(due_at=LONG_AGO)  # SQLite's times have milliseconds
    pauses.pause("io")
    with commit():
        meet_pause(Job.objects.get(pk=paused.pk))
    assert sent == [paused.pk, other.pk]
    assert state(paused) == ("one", 0)


def test_a_paused_job_whose_message_is_lost_keeps_no_slot(sent, commit):
    with commit():
        [paused], [other] = store(task=alone, queue="io"), store(task=alone, queue="cpu")
    lapse(paused)
    pauses.pause("io")
    sweeper.sender.send_due()
    assert sent == [paused.pk, other.pk]
    assert state(paused) == ("one", 0)


def test_paused_jobs_of_a_key_do_not_delay_those_of_other_queues(sent, commit):
    paused = store(3, task=alone, queue="io")
    pauses.pause("io")
    with commit():
        [other] = store(task=alone, queue="cpu")
    assert sent == [other.pk]
    sweeper.sender.send_due()
    assert {state(job) for job in paused} == {("one", 0)}


def test_after_a_pause_jobs_wait_for_their_limits(sent):
    jobs = store(3, task=alone, queue="io")
    pauses.pause("io")
    sweeper.sender.send_due()
    assert not sent
    pauses.resume("io")
    sweeper.sender.send_due()
    assert sent == [jobs[0].pk]
    assert [state(job) for job in jobs] == [(None, 1), ("one", 0), ("one", 0)]


def test_a_retry_during_a_pause_waits_for_the_pause(sent):
    [job] = store(queue="io")
    run = start(job)
    pauses.pause("io")
    run.retry = {"delay": 0, "args": [1, 2], "kwargs": {}, "retries": 1}
    with run:
        run.try_again()
    sweeper.sender.send_due()
    assert not sent and state(job) == (None, 0)


# For people


def test_a_pause_of_another_day_shows_the_day():
    pauses.pause("io")
    Pause.objects.update(since=F("since") - timedelta(days=3))
    pause = Pause.objects.get()
    assert str(pause) == f"Paused since {timezone.localtime(pause.since):%Y-%m-%d %H:%M}"


def test_a_paused_job_is_shown_with_the_reason_until_it_is_resumed(sent):
    [job] = store(task=call, queue="io")
    pauses.pause("io", "SMTP is down")
    sweeper.sender.send_due()
    job.refresh_from_db()
    assert reasons([job])[job.pk].endswith(": SMTP is down")
    pauses.resume("io")
    assert "SMTP" not in str(reasons([job]))
