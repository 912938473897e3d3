"""A backend for Django's Tasks: each function that is decorated with @task runs as a job.

    TASKS = {"default": {"BACKEND": "durable_jobs.contrib.django_tasks.TaskBackend", "QUEUES": ["default", …]}}

It does what Django documents. Options such as `owner`, `label` or `limit` are for @job.

Django 6 has Tasks as `django.tasks`, Django 5.2 as the package `django_tasks`. With Django 6 this backend
also accepts the @task of `django_tasks`.
"""

from functools import wraps
from inspect import iscoroutine

from celery import shared_task
from celery.utils.functional import head_from_fun
from django.core.exceptions import ValidationError
from django.utils import timezone
from django.utils.module_loading import import_string

from durable_jobs.database import wait_for
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from durable_jobs.results import ERRORS
from durable_jobs.tasks import JobTask
from durable_jobs.worker.execution import run_coroutine
from durable_jobs.worker.runs import describe

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

__all__ = ["TaskBackend"]

STATUSES = {
    "queued": TaskResultStatus.READY,
    "running": TaskResultStatus.RUNNING,
    "succeeded": TaskResultStatus.SUCCESSFUL,
    "failed": TaskResultStatus.FAILED,
    "cancelled": TaskResultStatus.FAILED,  # Django has no status for it
}
registered = {}  # Celery's tasks, by the path of their function


class TaskBackend(BaseTaskBackend):
    supports_defer = supports_async_task = supports_get_result = True
    supports_priority = False  # put urgent tasks in a queue that has its own workers

    def validate_task(self, task):
        super().validate_task(task)
        register(task)

    def enqueue(self, task, args, kwargs):
        """Store a job, and send its message when the caller's transaction commits, or at `run_after`.

        Returns its TaskResult. Raises InvalidTask, and the errors of durable_jobs.enqueue.enqueue().
        """
        self.validate_task(task)  # again: the settings may have changed since @task ran
        # CELERY_TASK_ROUTES decides about the default queue.
        queue = None if task.queue_name == DEFAULT_TASK_QUEUE_NAME else task.queue_name
        job = enqueue(register(task), args, kwargs, queue=queue, eta=task.run_after)
        result = self._result_of(job, task)
        signals.task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id):
        """Return the TaskResult of a job.

        Raises TaskResultDoesNotExist if there is no such job, or if its task was not made by @task.
        """
        try:
            job = Job.objects.get(pk=result_id)
            task = import_string(job.task)
        except (Job.DoesNotExist, ValidationError, ImportError) as error:
            raise TaskResultDoesNotExist(result_id) from error
        if not isinstance(task, Task):  # it was made by @shared_task
            raise TaskResultDoesNotExist(result_id)
        return self._result_of(job, task)

    def _result_of(self, job, task):
        failures = list(job.failures.all())
        runs = [(failure.started_at, failure.worker) for failure in failures]
        if job.started_at and (not runs or job.started_at > runs[-1][0]):
            # The last run has no Failure: it is running, succeeded, was cancelled or its worker stopped.
            runs.append((job.started_at, job.worker))
        errors = [
            TaskError(
                exception_class_path=failure.exception,
                traceback=failure.traceback or failure.error,
            )
            for failure in failures
        ]
        if job.state == "cancelled" or (job.state == "failed" and not errors):
            path = f"celery.exceptions.{ERRORS[job.state]}"
            error = TaskError(exception_class_path=path, traceback=job.error)
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
        set_fields(result, _return_value=job.result)
        return result


class FunctionTask(JobTask):
    """The Celery task that runs a function of Django's Tasks, and sends their signals."""

    abstract = True

    def _send_started(self, task):
        """Send the signal task_started. Returns the context of the function."""
        result = wait_for(task.get_backend().get_result, self.request.id)
        self.request.task_result = result
        signals.task_started.send_robust(type(task.get_backend()), task_result=result)
        return TaskContext(task_result=result)

    def on_success(self, retval, *args):
        self._send_finished(status=TaskResultStatus.SUCCESSFUL, _return_value=retval)

    def on_failure(self, exc, *args):
        if result := getattr(self.request, "task_result", None):
            error = describe(exc)
            error = TaskError(exception_class_path=error["exception"], traceback=error["traceback"])
            self._send_finished(status=TaskResultStatus.FAILED, errors=[*result.errors, error])

    def _send_finished(self, **changes):
        result = self.request.task_result
        set_fields(result, finished_at=timezone.now(), **changes)
        signals.task_finished.send_robust(type(result.task.get_backend()), task_result=result)


def set_fields(result, **values):
    for name, value in values.items():
        object.__setattr__(result, name, value)  # as Django does, because the dataclass is frozen


def register(task):
    """Register the function with Celery, if it is not registered yet. Returns the Celery task."""
    if task.module_path not in registered:

        @wraps(task.func)
        def run(self, *args, **kwargs):
            if self._current_run:
                context = self._send_started(task)
                args = (context, *args) if task.takes_context else args
            result = task.func(*args, **kwargs)
            return run_coroutine(self, result) if iscoroutine(result) else result

        header = staticmethod(head_from_fun(task.func, bound=task.takes_context))
        options = {"name": task.module_path, "__header__": header}
        registered[task.module_path] = shared_task(run, base=FunctionTask, bind=True, **options)
    return registered[task.module_path]
