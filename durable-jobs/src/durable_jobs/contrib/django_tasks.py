"""A backend for Django's Tasks: each function that is decorated with @task runs as a job.

    TASKS = {"default": {"BACKEND": "durable_jobs.contrib.django_tasks.TaskBackend", "QUEUES": ["default", …]}}

It does what Django documents. Options such as `owner`, `label` or `limit` are for @job.

Django 6 has Tasks as `django.tasks`, Django 5.2 as the package `django_tasks`. With Django 6 this backend
also accepts the @task of `django_tasks`.
"""

from contextlib import suppress
from functools import wraps
from inspect import iscoroutine

from celery import shared_task
from celery.utils.functional import head_from_fun
from django.core.exceptions import ValidationError
from django.utils.module_loading import import_string

from durable_jobs.coroutines import run_coroutine
from durable_jobs.database import wait_for
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from durable_jobs.tasks import JobTask

try:
    from django.tasks import base, signals
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.exceptions import TaskResultDoesNotExist
except ImportError:  # Django 5.2
    from django_tasks import base, signals
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.exceptions import TaskResultDoesNotExist

__all__ = ["TaskBackend"]

STATUSES = {
    "queued": base.TaskResultStatus.READY,
    "running": base.TaskResultStatus.RUNNING,
    "succeeded": base.TaskResultStatus.SUCCESSFUL,
    "failed": base.TaskResultStatus.FAILED,
    "cancelled": base.TaskResultStatus.FAILED,  # Django has no status for it
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
        queue = None if task.queue_name == base.DEFAULT_TASK_QUEUE_NAME else task.queue_name
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
        if not isinstance(task, base.Task):  # it was made by @shared_task
            raise TaskResultDoesNotExist(result_id)
        return self._result_of(job, task)

    def _result_of(self, job, task):
        failures = list(job.failures.all())
        runs = [(failure.started_at, failure.worker) for failure in failures]
        last = (job.started_at, job.worker)
        if job.started_at and last not in runs:  # it has not failed
            runs.append(last)
        errors = [
            base.TaskError(
                exception_class_path=failure.exception, traceback=failure.traceback or failure.error
            )
            for failure in failures
        ]
        result = base.TaskResult(
            task=task,
            id=str(job.pk),
            status=STATUSES[job.state],
            enqueued_at=job.created_at,
            started_at=runs[0][0] if runs else None,
            last_attempted_at=job.started_at,
            finished_at=job.finished_at,
            args=job.args,
            kwargs=job.kwargs,
            backend=self.alias,
            errors=errors,
            worker_ids=[worker for _, worker in runs],
        )
        object.__setattr__(result, "_return_value", job.result)  # as Django does: it is frozen
        return result


class FunctionTask(JobTask):
    """The Celery task that runs a function of Django's Tasks, and sends their signals."""

    abstract = True

    def _send(self, signal):
        """Send this signal. Returns the TaskResult."""
        backend = self.of_django.get_backend()
        result = wait_for(backend.get_result, self.request.id)
        signal.send_robust(type(backend), task_result=result)
        return result

    def on_success(self, *args):
        self._send(signals.task_finished)

    def on_failure(self, *args):
        # If the function no longer exists, task_started has failed, too.
        with suppress(TaskResultDoesNotExist):
            self._send(signals.task_finished)


def register(task):
    """Register the function with Celery, if it is not registered yet. Returns the Celery task."""
    if task.module_path not in registered:

        @wraps(task.func)
        def run(self, *args, **kwargs):
            if self._current_run:
                result = self._send(signals.task_started)
                args = (base.TaskContext(task_result=result), *args) if task.takes_context else args
            result = task.func(*args, **kwargs)
            return run_coroutine(self, result) if iscoroutine(result) else result

        header = staticmethod(head_from_fun(task.func, bound=task.takes_context))
        options = {"name": task.module_path, "of_django": task, "__header__": header}
        registered[task.module_path] = shared_task(run, base=FunctionTask, bind=True, **options)
    return registered[task.module_path]
