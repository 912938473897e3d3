"""A run: one message starts one, and a run that has lost its job changes nothing."""

import uuid

import pytest
from helpers import act, add, claim, claim_and_lapse, deliver, lapse, receive, requeue, run, run_of

from durable_jobs import publish
from durable_jobs.actions import cancel
from durable_jobs.beat.sweeper import recover_lapsed
from durable_jobs.enqueue import enqueue
from durable_jobs.messages import message_of
from durable_jobs.models import Job
from durable_jobs.worker import lease

pytestmark = pytest.mark.django_db


# Which messages start a run


def test_a_message_from_before_a_crash_does_nothing(published):
    """It would skip the pause after the crash."""
    job = enqueue(add, [1, 2])
    claim_and_lapse(job)
    recover_lapsed()
    assert not claim(job.pk)
    assert claim(job.pk, crashes=1)


def test_a_second_copy_of_a_message_does_nothing():
    runs = []
    job = run(runs.append)
    deliver(job)
    assert len(runs) == 1


def test_a_copy_of_a_message_that_arrives_during_the_run_does_nothing():
    runs = []

    def function(task):
        runs.append(task)
        publish.publish([Job.objects.get()])

    assert run(function).state == "succeeded"
    assert len(runs) == 1


def test_a_message_from_before_a_retry_does_nothing():
    job = enqueue(add, [1, 2])
    Job.objects.update(retries=1)
    assert deliver(job).state == "queued"
    assert deliver(job).state == "succeeded"  # its message is from after the retry


def test_a_header_of_a_message_is_not_taken_for_a_run():
    """Celery makes each header an attribute of the request."""
    job = enqueue(add, [1, 2])
    receive(add, {**message_of(job).headers, "run": str(uuid.uuid4())}, job.args)
    job.refresh_from_db()
    assert (job.state, job.result) == ("succeeded", 3)


def test_a_claim_whose_answer_was_lost_can_be_repeated():
    job, run = enqueue(add, [1, 2]), uuid.uuid4()
    claims = [claim(job.pk, token) for token in (run, run, uuid.uuid4())]
    assert claims == [1, 1, 0]


def test_a_process_runs_one_suspect_at_a_time():
    first, second, third = (run_of(Job(task=add.name)) for _ in range(3))
    assert first.become_suspect() and not second.become_suspect()
    first.lost = True
    assert second.become_suspect() and not third.become_suspect()
    second.ended = True
    assert third.become_suspect()
    third.ended = True


# A run that has lost its job


def replace_run():
    requeue(Job.objects.all())
    claim(Job.objects.get().pk)


@pytest.mark.parametrize(
    "end_run, state", [(lambda: cancel(Job.objects.all()), "cancelled"), (replace_run, "running")]
)
def test_the_result_of_a_run_that_lost_its_job_is_dropped(end_run, state):
    def function(task):
        end_run()
        return "too late"

    job = run(function)
    assert (job.state, job.result) == (state, None)


@pytest.mark.parametrize("end_run", [lambda: cancel(Job.objects.all()), replace_run])
def test_the_next_report_ends_a_task_function_that_lost_its_job(end_run):
    steps = []

    def function(task):
        task.report(1, 3)
        end_run()
        lease.write_and_renew([task._current_run])
        steps.append("before")
        task.report(2, 3)
        steps.append("after")

    job = run(function)
    assert steps == ["before"]
    assert job.progress == 0


CURSOR_USES = [lambda task: task.report(1, cursor=1), lambda task: task.cursor]


@pytest.mark.parametrize("use_cursor", CURSOR_USES, ids=["report", "cursor"])
@pytest.mark.parametrize("end_run", [lambda: cancel(Job.objects.all()), lambda: replace_run()])
def test_a_use_of_the_cursor_ends_a_task_function_that_lost_its_job(use_cursor, end_run):
    steps = []

    def function(task):
        end_run()
        steps.append("before")
        use_cursor(task)
        steps.append("after")

    job = run(function)
    assert (steps, job.cursor) == (["before"], None)


# A failover has lost what was committed


def test_a_job_that_a_failover_has_lost_is_gone_without_an_error():
    ran = []
    act.function = ran.append
    job = enqueue(act)
    Job.objects.all().delete()
    publish.publish([job])
    assert not ran and not Job.objects.exists()


def test_a_job_whose_success_a_failover_has_lost_runs_twice():
    claimed = []
    job = run(lambda task: claimed.append(Job.objects.values().get()))
    assert job.state == "succeeded"
    Job.objects.update(**claimed[0])  # as on a replica that was behind
    lapse(job)
    recover_lapsed()
    job.refresh_from_db()
    assert deliver(job).state == "succeeded"
    assert (len(claimed), job.crashes) == (2, 1)
