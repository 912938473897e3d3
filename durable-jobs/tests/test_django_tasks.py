"""Django's Tasks: a function that @task declares is a job, and behaves as Django documents."""

import asyncio
import time
from datetime import timedelta

import pytest
from asgiref.current_thread_executor import CurrentThreadExecutor
from celery import current_app, shared_task
from celery.exceptions import (
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
    WorkerLostError,
)
from django.db import OperationalError, transaction
from django.utils import timezone
from helpers import runs_on, sweeper

from durable_jobs.actions import cancel, run_again
from durable_jobs.contrib.django_tasks import TaskBackend
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from durable_jobs.pools import pool
from durable_jobs.publish import publish
from durable_jobs.tasks import JobTask
from durable_jobs.worker.lease import recover

try:
    from django.tasks import TaskResultStatus, default_task_backend, signals, task
    from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist, TaskResultMismatch
except ImportError:  # Django 5.2
    from django_tasks import TaskResultStatus, default_task_backend, signals, task
    from django_tasks.exceptions import (
        InvalidTaskError as InvalidTask,
    )
    from django_tasks.exceptions import TaskResultDoesNotExist, TaskResultMismatch

pytestmark = pytest.mark.django_db
seen = []


@task
def add(a, b=1):
    return a + b


@task(takes_context=True)
def identify(context, word):
    return [context.task_result.id, context.attempt, word]


@task
def broken():
    raise LookupError("no such thing")


@task(queue_name="io")
async def read(n):
    await asyncio.sleep(0.01)
    return [n, await Job.objects.acount()]


@shared_task(base=JobTask, bind=True, autoretry_for=(OSError,), default_retry_delay=0)
async def celery_read(self, n):
    await asyncio.sleep(0.01)
    if self.request.retries == 0:
        raise OSError
    return [n, self.request.retries, await Job.objects.acount()]


@shared_task(base=JobTask)
async def read_unbound(n):
    return n


@shared_task(base=JobTask, bind=True, default_retry_delay=0)
async def count_down(self, n):
    if n:
        self.retry(args=[n - 1])
    return n


@shared_task(base=JobTask)
async def read_for_ever():
    seen.append("started")
    try:
        await asyncio.sleep(60)
    finally:
        seen.append("ended")


@pytest.fixture(autouse=True)
def clear_seen():
    seen.clear()


def run(task, *args):
    """Enqueue a task and run it with all its retries. Return its TaskResult."""
    result = task.enqueue(*args)
    publish([Job.objects.get(pk=result.id)])
    for _ in range(3):
        sweeper.sender.send_due()
    result.refresh()
    return result


def test_a_task_runs_after_the_commit(commit):
    with commit():
        result = add.enqueue(1, b=2)
        assert result.status == TaskResultStatus.READY
        assert (result.args, result.kwargs, result.task) == ([1], {"b": 2}, add)
        assert result.enqueued_at == Job.objects.get().created_at
        assert not result.started_at and not result.attempts
        with pytest.raises(ValueError, match="not finished"):
            assert result.return_value
    result.refresh()
    assert result.status == TaskResultStatus.SUCCESSFUL and result.return_value == 3
    assert result.enqueued_at <= result.started_at == result.last_attempted_at
    assert result.started_at <= result.finished_at and result.attempts == 1
    assert result.errors == []
    assert add.get_result(result.id) == default_task_backend.get_result(result.id) == result


def test_a_rollback_leaves_no_row_and_no_message(commit):
    with commit() as callbacks, pytest.raises(ZeroDivisionError), transaction.atomic():
        add.enqueue(1)
        raise ZeroDivisionError
    assert not Job.objects.exists() and not callbacks


def test_a_task_of_celery_has_the_path_and_the_name_of_its_function():
    job = Job.objects.get(pk=broken.enqueue().id)
    assert job.task == broken.module_path == f"{__name__}.broken"
    assert current_app.tasks[job.task].__name__ == "broken"


def test_a_task_can_take_its_context():
    result = run(identify, "word")
    assert result.return_value == [result.id, 1, "word"]


def test_a_failed_task_has_its_error_and_traceback():
    result = run(broken)
    assert result.status == TaskResultStatus.FAILED and result.is_finished
    assert result.attempts == 1
    [error] = result.errors
    assert error.exception_class is LookupError
    assert error.traceback.endswith("LookupError: no such thing\n")
    with pytest.raises(ValueError, match="failed"):
        assert result.return_value


@pytest.mark.parametrize(
    ("task", "end"),
    [
        (add, ("finished", "SUCCESSFUL", 0)),
        (broken, ("finished", "FAILED", 1)),
    ],
)
def test_each_step_sends_a_signal(task, end):
    """A receiver that fails does not fail the job."""
    steps, receivers = [], {}
    for name in ["enqueued", "started", "finished"]:

        def receiver(sender, task_result, name=name, **kwargs):
            assert sender is TaskBackend
            steps.append((name, task_result.status, len(task_result.errors)))
            if name != "enqueued":
                raise ValueError

        receivers[name] = receiver
        getattr(signals, f"task_{name}").connect(receiver)
    result = run(task, *[1] * (end[1] == "SUCCESSFUL"))
    starts = [("started", "RUNNING", tries) for tries in range(max(end[2], 1))]
    assert steps == [("enqueued", "READY", 0), *starts, end]
    assert result.status == end[1]


def test_a_task_function_waits_for_an_unavailable_database(monkeypatch):
    answers = iter([OperationalError("away")])
    get_result = TaskBackend.get_result

    def get(backend, id):
        for error in answers:
            raise error
        return get_result(backend, id)

    job = Job.objects.get(pk=add.enqueue(1).id)
    monkeypatch.setattr(TaskBackend, "get_result", get)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    publish([job])
    job.refresh_from_db()
    assert job.result == 2


def test_a_job_whose_function_no_longer_exists_fails(monkeypatch, caplog):
    job = Job.objects.get(pk=add.enqueue(1).id)
    monkeypatch.delitem(globals(), "add")
    publish([job])
    job.refresh_from_db()
    assert (job.state, job.error) == (
        "failed",
        f"{TaskResultDoesNotExist.__module__}.TaskResultDoesNotExist: {job.pk}",
    )
    assert "task_result" not in caplog.text  # no error, although task_started was never sent


@pytest.mark.parametrize(
    ("is_late", "status", "error"),
    [(False, "READY", WorkerLostError), (True, "FAILED", TimeLimitExceeded)],
)
def test_a_dead_worker_counts_as_an_attempt(is_late, status, error):
    """Also one that Celery killed at its time limit."""
    result = add.enqueue(1)
    started = {"started_at": timezone.now(), "worker": "celery@host"}
    Job.objects.update(**runs_on() | started)
    recover(Job.objects.all(), is_late)
    result.refresh()
    assert (result.status, result.worker_ids) == (status, ["celery@host"])
    assert [each.exception_class for each in result.errors] == [error]
    assert result.errors[0].traceback


def test_a_queue_that_is_not_in_the_settings_is_refused(settings):
    assert Job.objects.get(pk=add.using(queue_name="cpu").enqueue(1).id).queue == "cpu"
    assert Job.objects.get(pk=add.enqueue(1).id).queue == "celery"  # the queue of the routes
    with pytest.raises(InvalidTask, match="'slow' is not valid"):
        add.using(queue_name="slow")
    to_cpu = add.using(queue_name="cpu")
    settings.TASKS = {"default": {**settings.TASKS["default"], "QUEUES": ["io"]}}
    with pytest.raises(InvalidTask, match="'cpu' is not valid"):
        to_cpu.enqueue(1)


def test_a_priority_is_refused():
    with pytest.raises(InvalidTask, match="priority"):
        add.using(priority=1)


def test_a_task_waits_until_run_after():
    later = timezone.now() + timedelta(hours=1)
    job = Job.objects.get(pk=add.using(run_after=later).enqueue(1).id)
    assert job.state == "queued" and job.times_sent == 0
    assert abs(job.due_at - later) < timedelta(seconds=5)
    past = timezone.now() - timedelta(hours=1)
    assert Job.objects.get(pk=add.using(run_after=past).enqueue(1).id).times_sent == 1


def test_a_cancelled_task_has_failed(user):
    result = add.enqueue(1)
    cancel(Job.objects.all())
    result.refresh()
    assert result.status == TaskResultStatus.FAILED and result.attempts == 0
    assert result.errors == []  # of executions


def test_a_result_is_found_only_by_the_id_of_a_task():
    plain = enqueue(read_unbound, [1])
    for unknown in ["no id", "00000000-0000-0000-0000-000000000000", plain.pk]:
        with pytest.raises(TaskResultDoesNotExist):
            default_task_backend.get_result(str(unknown))
    with pytest.raises(TaskResultMismatch):
        broken.get_result(add.enqueue(1).id)


@pytest.mark.parametrize("args", [[], [1, 2, 3], [object()]])
def test_arguments_are_checked_when_a_task_is_enqueued(args):
    with pytest.raises(TypeError):
        add.enqueue(*args)
    assert not Job.objects.exists()


def test_the_job_of_a_task_can_run_again(commit):
    result = run(add, 1)
    with commit():
        again = run_again(Job.objects.get(pk=result.id))
    again.refresh_from_db()
    assert again.result == 2


def test_call_runs_the_function():
    assert add.call(1, 2) == 3


def test_a_coroutine_can_be_a_task():
    result = run(read, 5)
    assert result.return_value == [5, 1], result.errors
    assert Job.objects.get().queue == "io"


def test_a_coroutine_can_be_the_task_function_of_a_job_task():
    job = enqueue(celery_read, [5])
    other = enqueue(read_unbound, [6])
    publish([job, other])
    sweeper.sender.send_due()
    for row in [job, other]:
        row.refresh_from_db()
    assert (job.result, other.result) == ([5, 1, 2], 6), job.error
    assert read_unbound(7) == 7


def test_a_coroutine_can_be_retried_with_other_arguments():
    job = enqueue(count_down, kwargs={"n": 1})
    publish([job])
    sweeper.sender.send_due()
    job.refresh_from_db()
    assert (job.state, job.result, job.args, job.kwargs) == ("succeeded", 0, [0], {}), job.error


def test_a_coroutine_over_its_time_limit_is_cancelled(monkeypatch):
    def interrupt(self, future):
        while "started" not in seen:
            time.sleep(0.01)
        raise SoftTimeLimitExceeded

    monkeypatch.setattr(CurrentThreadExecutor, "run_until_future", interrupt)
    job = enqueue(read_for_ever)
    publish([job])
    job.refresh_from_db()
    assert (job.state, job.error) == ("failed", "Exceeded its time limit")
    for _ in range(100):
        if "ended" in seen:
            break
        time.sleep(0.05)
    assert seen == ["started", "ended"]


@pytest.mark.django_db(transaction=True)
def test_an_async_view_can_enqueue_a_task():
    async def view():
        values = []
        for task in [add, read]:
            result = await task.aenqueue(1)
            await result.arefresh()
            values.append((await task.aget_result(result.id)).return_value)
        stack = current_app.tasks[read.module_path].request_stack
        return [*values, stack.top]

    assert pool.run_coroutine(view) == [2, [1, 2], None]
