"""Pauses: while a queue or a task is paused, no job of it starts. The order stays."""

from datetime import timedelta

import pytest
from django.db import connection
from django.db.models import F
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from helpers import CLAIM, add, alone, call, deliver, end, lapse, start, sweeper

from durable_jobs import admission, pauses
from durable_jobs.actions import cancel, run_again
from durable_jobs.beat.purge import Purge
from durable_jobs.diagnosis import reasons
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job, Pause
from durable_jobs.worker.runs import Run

pytestmark = pytest.mark.django_db
LONG_AGO = Now() - timedelta(hours=1)


def store(count=1, task=add, **options):
    """Store jobs, but send no message: the test's transaction does not commit."""
    args = [1, 2] if task is add else [1]
    return [enqueue(task, args, **options) for _ in range(count)]


def meet_pause(job):
    """The message of this job arrives at a worker, which finds the pause."""
    run = Run(job.pk, task=add, limit_key=job.limit_key, **CLAIM)
    assert not run.claim()
    assert run.block_if_paused()


def state(job):
    return Job.objects.values_list("blocked_by", "times_sent").get(pk=job.pk)


@pytest.mark.parametrize("name", ["io", add.name])
def test_a_worker_starts_no_job_of_a_paused_queue_or_task(name):
    [job], [other] = store(queue="io"), store(task=alone, queue="cpu")
    pauses.pause(name)
    deliver(job)
    job.refresh_from_db()
    assert (job.state, job.blocked_by, job.sweep_at, job.times_sent) == (
        "queued",
        f"pause:{name}",
        None,
        0,
    )
    admission.ignore_limits(Job.objects.filter(pk=other.pk))
    start(Job.objects.get(pk=other.pk))


def test_a_job_that_runs_is_not_interrupted_and_ends(commit):
    [job] = store(queue="io")
    run = start(job)
    pauses.pause("io")
    end(run, 7)
    job.refresh_from_db()
    assert (job.state, job.result) == ("succeeded", 7)


def test_the_sweep_holds_what_is_paused_and_sends_the_rest(sent):
    paused, [other] = store(3, queue="io", countdown=60), store(queue="cpu", countdown=60)
    lapse(*paused, other)
    pauses.pause("io")
    sweeper.sender.send_due()
    assert sent == [other.pk]
    assert {state(job) for job in paused} == {("pause:io", 0)}


def test_the_sweep_does_not_repeat_the_messages_of_paused_jobs(sent):
    [job] = store(queue="io")
    lapse(job)
    pauses.pause("io")
    sweeper.sender.send_due()
    assert not sent and state(job) == ("pause:io", 0)


def test_more_jobs_than_a_page_are_held_in_one_round(sent, monkeypatch):
    monkeypatch.setattr(admission, "PAGE", 2)
    lapse(*store(5, queue="io", countdown=60))
    pauses.pause("io")
    sweeper.sender.send_due()
    assert Job.objects.filter(blocked_by="pause:io").count() == 5 and not sent


def test_paused_jobs_start_in_order_when_the_pause_ends(sent, commit):
    jobs = store(4, queue="io")
    pauses.pause("io")
    for job in reversed(jobs):
        meet_pause(job)
    with commit():
        assert pauses.resume("io") is True
    assert sent == [job.pk for job in jobs]


def test_a_countdown_continues_during_a_pause(sent, commit):
    [later], [soon] = store(queue="io", countdown=3600), store(queue="io", countdown=60)
    pauses.pause("io")
    sweeper.sender.send_due()
    assert state(soon) == (None, 0)
    Job.objects.filter(pk=soon.pk).update(due_at=LONG_AGO, sweep_at=LONG_AGO)
    sweeper.sender.send_due()
    assert state(soon) == ("pause:io", 0) and state(later) == (None, 0)
    with commit():
        pauses.resume("io")
    assert sent == [soon.pk]


def test_a_held_job_that_is_not_due_stays_held_after_the_pause(sent, commit):
    [job] = store(queue="io")
    pauses.pause("io")
    meet_pause(job)
    Job.objects.update(due_at=Now() + timedelta(hours=1))
    with commit():
        pauses.resume("io")
    sweeper.sender.send_due()
    assert not sent and state(job) == ("pause:io", 0)
    Job.objects.update(due_at=Now() - timedelta(seconds=1))
    sweeper.sender.send_due()
    assert sent == [job.pk]


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


@pytest.mark.parametrize("name", ["", "oi", "tasks.add", "pause:io"])
def test_the_name_of_no_queue_and_no_task_is_refused(name):
    with pytest.raises(ValueError, match="there is no queue and no task .* the queues are celery"):
        pauses.pause(name)


def test_a_queue_without_settings_can_be_paused_if_it_has_a_job():
    store(queue="tenants")
    assert pauses.pause("tenants")


def test_a_job_whose_queue_and_task_are_paused_waits_for_both(sent, commit):
    [job], others = store(queue="io"), store(3, queue="io")
    pauses.pause("io")
    pauses.pause(add.name, "a bug")
    for each in [job, *others]:
        meet_pause(each)
    for name, other in [("io", add.name), (add.name, "io")]:
        with commit():
            pauses.resume(name)
        assert not sent
        assert state(job) == (f"pause:{other}", 0)
        assert "Paused for" in reasons([Job.objects.get(pk=job.pk)])[job.pk]
        with commit():
            pauses.pause(name)
    pauses.resume("io")
    with commit():
        pauses.resume(add.name)
    sweeper.sender.send_due()
    assert sent == [each.pk for each in [job, *others]]


def test_the_sweep_rests_while_jobs_wait_for_a_second_pause(sent, commit):
    [job] = store(queue="io")
    pauses.pause("io")
    pauses.pause(add.name)
    Job.objects.update(blocked_by="pause:io", sweep_at=None, times_sent=0)
    Pause.objects.filter(name="io").delete()  # its process died before it let the jobs go
    sweeper.sender.send_due()
    assert state(job) == (f"pause:{add.name}", 0)
    assert sweeper.sender.send_due() == 5


def test_a_paused_job_can_be_cancelled_and_run_again(sent, commit):
    [job] = store(queue="io")
    pauses.pause("io")
    meet_pause(job)
    assert cancel(Job.objects.get(pk=job.pk))
    assert state(job) == (None, 0)
    run_again(Job.objects.get(pk=job.pk))
    meet_pause(job)
    with commit():
        pauses.resume("io")
    assert sent[-1] == job.pk


def test_an_ended_job_of_a_paused_queue_is_deleted(commit):
    [job] = store(queue="io")
    pauses.pause("io")
    meet_pause(job)
    cancel(job)
    Job.objects.update(finished_at=Now() - timedelta(days=99))
    Purge(Job, "finished_at").delete_page()
    assert not Job.objects.exists()


# With limits


def test_a_paused_job_gives_its_place_to_the_next_one_at_once(sent, commit):
    with commit():
        [paused], [other] = store(task=alone, queue="io"), store(task=alone, queue="cpu")
        Job.objects.filter(pk=paused.pk).update(due_at=LONG_AGO)  # SQLite's times have milliseconds
    pauses.pause("io")
    with commit():
        meet_pause(Job.objects.get(pk=paused.pk))
    assert sent == [paused.pk, other.pk]
    assert state(paused) == ("pause:io", 0)


def test_paused_jobs_of_a_key_do_not_delay_those_of_other_queues(sent, commit):
    paused = store(3, task=alone, queue="io")
    pauses.pause("io")
    with commit():
        [other] = store(task=alone, queue="cpu")
    assert sent == [other.pk]
    sweeper.sender.send_due()
    assert {state(job) for job in paused} == {("pause:io", 0)}


def test_after_a_pause_jobs_wait_for_their_limits_and_start_at_once(sent, commit):
    jobs = store(3, task=alone, queue="io")
    pauses.pause("io")
    sweeper.sender.send_due()
    assert {state(job) for job in jobs} == {("pause:io", 0)}
    with commit():
        pauses.resume("io")
    assert sent == [jobs[0].pk]
    assert [state(job) for job in jobs] == [(None, 1), ("one", 0), ("one", 0)]


def test_a_limit_may_have_the_name_of_a_paused_queue(sent, settings):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {
        "LIMITS": {**settings.DURABLE_JOBS["LIMITS"], "io": "1"}
    }
    [limited], [paused] = store(task=alone, queue="cpu"), store(queue="io")
    Job.objects.filter(pk=limited.pk).update(blocked_by="io", limit_key="io")
    pauses.pause("io")
    meet_pause(paused)
    sweeper.sender.send_due()
    assert sent == [limited.pk]


def test_a_retry_during_a_pause_waits_for_the_pause(sent, commit):
    [job] = store(queue="io")
    run = start(job)
    pauses.pause("io")
    run.retry = {"delay": 0, "args": [1, 2], "kwargs": {}, "retries": 1}
    with run:
        run.try_again()
    sweeper.sender.send_due()
    assert not sent and state(job) == ("pause:io", 0)


def test_a_paused_job_is_held_when_a_worker_claims_it(sent, commit):
    with commit():
        job = enqueue(alone, [1], queue="io")
    pauses.pause("io", "SMTP is down")
    run = Run(job.pk, task=alone, limit_key="one", **CLAIM)
    assert not run.claim()
    run.block_if_paused()
    job.refresh_from_db()
    assert (job.blocked_by, job.sweep_at, job.times_sent) == ("pause:io", None, 0)
    assert reasons([job])[job.pk].endswith(": SMTP is down")
    sent.clear()
    with commit():
        pauses.resume("io")
    sweeper.sender.send_due()
    sweeper.sender.send_due()
    assert sent == [job.pk]


def test_paused_jobs_of_many_keys_are_held_in_one_go(sent):
    for tenant in range(30):
        call.enqueue(tenant)
    pauses.pause(call.name)
    with CaptureQueriesContext(connection) as captured:
        sweeper.sender.send_due()
    assert Job.objects.filter(blocked_by=f"pause:{call.name}").count() == 30
    assert len([query for query in captured if "'pause:'" in query["sql"]]) == 1


# For people


def test_a_pause_of_another_day_shows_the_day():
    pauses.pause("io")
    Pause.objects.update(since=F("since") - timedelta(days=3))
    pause = Pause.objects.get()
    assert str(pause) == f"Paused since {timezone.localtime(pause.since):%Y-%m-%d %H:%M}"


def test_a_held_job_is_shown_with_the_reason_until_it_is_resumed(sent, commit):
    [job] = store(task=call, queue="io")
    pauses.pause("io", "SMTP is down")
    sweeper.sender.send_due()
    job.refresh_from_db()
    assert reasons([job])[job.pk].endswith(": SMTP is down")
    with commit():
        pauses.resume("io")
    job.refresh_from_db()
    assert reasons([job]) == {}
