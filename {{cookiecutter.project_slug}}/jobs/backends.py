"""A backend for Django's Tasks: a function that @task declares runs as a job.

    TASKS = {"default": {"BACKEND": "jobs.backends.TaskBackend", "QUEUES": ["default", …]}}

Django 6 has these Tasks as `django.tasks`, Django 5.2 as the package `django_tasks`. With Django 6 a
@task of either one uses this backend.
"""

from dataclasses import dataclass, field, replace
from functools import wraps
from inspect import iscoroutine
from typing import Any

from celery import shared_task
from celery.utils.functional import head_from_fun
from django.core.exceptions import ValidationError
from django.utils import timezone
from django.utils.module_loading import import_string

from .database import wait_for
from .models import Job
from .tasks import JobTask, describe, run_coroutine

try:
    from django.tasks import DEFAULT_TASK_QUEUE_NAME, Task, TaskContext, TaskResult, signals
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.base import TaskError, TaskResultStatus
    from django.tasks.exceptions import TaskResultDoesNotExist
except ImportError:  # Django 5.2
    from django_tasks import DEFAULT_TASK_QUEUE_NAME, TaskContext, TaskResult, signals
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.base import Task, TaskError, TaskResultStatus
    from django_tasks.exceptions import TaskResultDoesNotExist

STATUSES = {
    "queued": TaskResultStatus.READY,
    "running": TaskResultStatus.RUNNING,
    "succeeded": TaskResultStatus.SUCCESSFUL,
    "failed": TaskResultStatus.FAILED,
    "cancelled": TaskResultStatus.FAILED,  # Django has no status for it
}
ENDS = {  # the error of a job that ended without an attempt that failed
    "failed": "celery.exceptions.TaskError",
    "cancelled": "celery.exceptions.TaskRevokedError",
}
declared = {}  # Celery's tasks by the path of their function


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFunction(Task):
    """A function that @task declares, with what a job has besides.

    `celery` has options of @shared_task: @task(celery={"autoretry_for": (OSError,)}). A job's
    `owner` and `unique` come with using(): see Job.objects.enqueue().
    """

    celery: dict = field(default_factory=dict, compare=False)
    owner: Any = None
    unique: str | None = None

    def using(self, *, owner=None, unique=None, **changes):
        task = super(JobFunction, self).using(**changes)  # slots: super() alone is of another class
        return replace(task, owner=owner or self.owner, unique=unique or self.unique)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobContext(TaskContext):
    """What a body with takes_context gets: report(), cursor and retry() are those of JobTask."""

    job: JobTask

    report = property(lambda self: self.job.report)
    retry = property(lambda self: self.job.retry)
    cursor = property(lambda self: self.job.cursor)


class TaskBackend(BaseTaskBackend):
    task_class = JobFunction
    supports_defer = supports_async_task = supports_get_result = True
    supports_priority = False  # what must not wait has a queue with workers of its own

    def validate_task(self, task):
        super().validate_task(task)
        declare(task)

    def enqueue(self, task, args, kwargs):
        """Store a job, and send its message when the caller's transaction commits.

        Returns the TaskResult of the job; of the active one, if there is one with this `unique`.
        Raises InvalidTask, and what Job.objects.enqueue() does.
        """
        self.validate_task(task)  # again: the settings may be others than at its declaration
        options = {"owner": task.owner, "unique": task.unique}
        if task.queue_name != DEFAULT_TASK_QUEUE_NAME:  # else CELERY_TASK_ROUTES says which
            options["queue"] = task.queue_name
        if task.run_after:
            options["countdown"] = max((task.run_after - timezone.now()).total_seconds(), 0)
        job = Job.objects.enqueue(declare(task), args, kwargs, **options)
        if job.task != task.module_path:  # the active one with this `unique`
            return self.get_result(job.pk)
        result = self.result_of(job, task)
        signals.task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id):
        """Return the TaskResult of a job. Raises TaskResultDoesNotExist if no @task declares it."""
        try:
            job = Job.objects.get(pk=result_id)
            task = import_string(job.task)
        except (Job.DoesNotExist, ValidationError, ImportError) as error:
            raise TaskResultDoesNotExist(result_id) from error
        if not isinstance(task, Task):  # @shared_task declares it
            raise TaskResultDoesNotExist(result_id)
        return self.result_of(job, task)

    def result_of(self, job, task):
        attempts = list(job.attempts.all())
        runs = [(attempt.started_at, attempt.worker) for attempt in attempts]
        if job.started_at and (not runs or job.started_at > runs[-1][0]):
            runs.append((job.started_at, job.worker))  # it runs, succeeded or was cancelled
        errors = [
            TaskError(
                exception_class_path=attempt.exception,
                traceback=attempt.traceback or attempt.error,
            )
            for attempt in attempts
        ]
        if job.state == "cancelled" or (job.state == "failed" and not errors):
            error = TaskError(exception_class_path=ENDS[job.state], traceback=job.error)
            errors.append(error)
        result = TaskResult(
            task=task,
            id=str(job.pk),
            status=STATUSES[job.state],
            enqueued_at=job.created_at,
            started_at=runs[0][0] if runs else None,
            last_attempted_at=runs[-1][0] if runs else None,
            finished_at=job.finished_at,
            args=job.args,
            kwargs=job.kwargs,
            backend=self.alias,
            errors=errors,
            worker_ids=[worker for _, worker in runs],
        )
        change(result, _return_value=job.result)
        return result


class FunctionTask(JobTask):
    """Celery's task of a function that @task declares. It sends the signals of Django's Tasks."""

    abstract = True

    def start(self, task):
        """Send task_started. Returns the context of the body."""
        result = wait_for(task.get_backend().get_result, self.request.id)
        self.request.task_result = result
        signals.task_started.send_robust(type(task.get_backend()), task_result=result)
        return JobContext(task_result=result, job=self)

    def on_success(self, retval, *args):
        self.finish(status=TaskResultStatus.SUCCESSFUL, _return_value=retval)

    def on_failure(self, exc, *args):
        if result := getattr(self.request, "task_result", None):
            error = describe(exc)
            error = TaskError(exception_class_path=error["exception"], traceback=error["traceback"])
            self.finish(status=TaskResultStatus.FAILED, errors=[*result.errors, error])

    def finish(self, **changes):
        result = self.request.task_result
        change(result, finished_at=timezone.now(), **changes)
        signals.task_finished.send_robust(type(result.task.get_backend()), task_result=result)


def change(result, **changes):
    for name, value in changes.items():
        object.__setattr__(result, name, value)  # as Django does: it is a frozen dataclass


def declare(task):
    """Register a function as a task of Celery, unless it is. Returns that task."""
    if task.module_path not in declared:

        @wraps(task.func)
        def run(self, *args, **kwargs):
            if self.job_run:
                context = self.start(task)
                args = (context, *args) if task.takes_context else args
            result = task.func(*args, **kwargs)
            return run_coroutine(self, result) if iscoroutine(result) else result

        header = staticmethod(head_from_fun(task.func, bound=task.takes_context))
        options = {"name": task.module_path, "__header__": header, **task.celery}
        declared[task.module_path] = shared_task(run, base=FunctionTask, bind=True, **options)
    return declared[task.module_path]
