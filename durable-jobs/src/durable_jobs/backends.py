"""A backend for Django's Tasks: each function that is decorated with @task runs as a job.

    TASKS = {"default": {"BACKEND": "durable_jobs.backends.TaskBackend", "QUEUES": ["default", …]}}

Django 6 has Tasks as `django.tasks`, Django 5.2 as the package `django_tasks`. With Django 6 this backend
also accepts the @task of `django_tasks`.
"""

import uuid
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import wraps
from inspect import iscoroutine
from typing import Any

from celery import current_app, shared_task
from celery.canvas import Signature
from celery.utils.functional import head_from_fun
from celery.utils.time import maybe_make_aware
from django.apps import apps
from django.core.exceptions import ValidationError
from django.utils import timezone
from django.utils.module_loading import import_string

from .database import wait_for
from .models import Batch, Job
from .queryset import insert, new_fields
from .results import ERRORS
from .runs import describe
from .tasks import JobTask, run_coroutine

try:
    from django.tasks import DEFAULT_TASK_QUEUE_NAME, Task, TaskContext, TaskResult, signals
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.base import TaskError, TaskResultStatus
    from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
except ImportError:  # Django 5.2
    from django_tasks import DEFAULT_TASK_QUEUE_NAME, TaskContext, TaskResult, signals
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.base import Task, TaskError, TaskResultStatus
    from django_tasks.exceptions import InvalidTaskError as InvalidTask
    from django_tasks.exceptions import TaskResultDoesNotExist

__all__ = ["JobContext", "JobFunction", "TaskBackend"]

STATUSES = {
    "queued": TaskResultStatus.READY,
    "running": TaskResultStatus.RUNNING,
    "succeeded": TaskResultStatus.SUCCESSFUL,
    "failed": TaskResultStatus.FAILED,
    "cancelled": TaskResultStatus.FAILED,  # Django has no status for it
}
registered = {}  # Celery's tasks, by the path of their function


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFunction(Task):
    """A function that is decorated with @task, with the additional options of a job.

    `celery` has options of @shared_task: @task(celery={"autoretry_for": (OSError,)}). Set the others
    with using(): see Job.objects.enqueue().
    """

    celery: dict = field(default_factory=dict, compare=False)
    owner: Any = None
    label: str = ""
    countdown: float | None = None
    unique: str | None = None
    idempotency_key: str | None = None

    def using(
        self,
        *,
        priority: int | None = None,
        queue_name: str | None = None,
        run_after: datetime | None = None,
        backend: str | None = None,
        owner: Any = None,
        label: str | None = None,
        queue: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        unique: str | None = None,
        idempotency_key: str | None = None,
    ) -> "JobFunction":
        """Return a copy of the task with Django's options, and those of Job.objects.enqueue().

        `queue` means `queue_name`, and `eta` means `run_after`. Options that are not given stay as they
        are. Raises TypeError if both words are given, or `countdown` and a time; InvalidTask as Django does.
        """
        if queue_name is not None and queue is not None:
            raise TypeError("give queue_name= or queue=, not both: they mean the same")
        times = [time for time in (run_after, eta, countdown) if time is not None]
        if len(times) > 1:
            raise TypeError(
                "give one of run_after=, eta= and countdown=: each says when the job starts"
            )
        changes = {"priority": priority, "queue_name": queue_name or queue, "backend": backend}
        changes |= {"owner": owner, "label": label, "unique": unique}
        changes["idempotency_key"] = idempotency_key
        changes = {name: value for name, value in changes.items() if value is not None}
        if times:
            run_after = run_after or (eta and maybe_make_aware(eta))
            changes |= {"run_after": run_after, "countdown": countdown}
        return replace(self, **changes)

    def s(self, *args, **kwargs) -> Signature:
        """Return a signature with these arguments and the options of using(), for a batch or a chain."""
        return self._job_task().s(*args, **kwargs).set(**self._options())

    def si(self, *args, **kwargs) -> Signature:
        """Return an immutable signature: it does not get the result of the step before it. See s()."""
        return self._job_task().si(*args, **kwargs).set(**self._options())

    def _job_task(self):
        """Return the Celery task that runs the function. Raises InvalidTask."""
        # Again: the settings may have changed since @task ran.
        self.get_backend().validate_task(self)
        task = register(self)
        if task._unknown_to_workers and not current_app.conf.task_always_eager:
            raise InvalidTask(f"No worker knows {self.module_path}: import it in an app's tasks.py")
        return task

    def _options(self):
        """Return those options of Job.objects.enqueue() that were given to using()."""
        # CELERY_TASK_ROUTES decides about the default queue.
        queue = None if self.queue_name == DEFAULT_TASK_QUEUE_NAME else self.queue_name
        options = {"owner": self.owner, "label": self.label, "queue": queue, "unique": self.unique}
        options |= {"countdown": self.countdown, "eta": self.run_after}
        options["idempotency_key"] = self.idempotency_key
        return {name: value for name, value in options.items() if value is not None}

    def _for_call(self, label, queue):
        """Return the Celery task, label and queue of a job. Raises TypeError for other options of using()."""
        options = {"label": label, "queue": queue}
        options = {**self._options(), **{name: options[name] for name in options if options[name]}}
        label, queue = options.pop("label", ""), options.pop("queue", None)
        if options:
            raise TypeError(f"give {', '.join(options)} to this call, not to using()")
        return self._job_task(), label, queue


@dataclass(frozen=True, slots=True, kw_only=True)
class JobContext(TaskContext):
    """The context of a body with takes_context=True, with the methods that JobTask has for bodies."""

    _job: JobTask

    @property
    def report(self):
        return self._job.report

    @property
    def retry(self):
        return self._job.retry

    @property
    def then(self):
        return self._job.then

    @property
    def cursor(self) -> Any:
        return self._job.cursor

    @property
    def batch(self) -> Batch | None:
        return self._job.batch


class TaskBackend(BaseTaskBackend):
    task_class = JobFunction
    supports_defer = supports_async_task = supports_get_result = True
    supports_priority = False  # put urgent tasks in a queue that has its own workers

    def validate_task(self, task):
        super().validate_task(task)
        register(task)

    def enqueue(self, task, args, kwargs):
        """Store a job, and send its message when the caller's transaction commits, or at `run_after`.

        Returns the TaskResult of the job, or of the active job with the same `unique`. Raises InvalidTask,
        also if that job was not made by @task, and the errors of Job.objects.enqueue().
        """
        celery_task, options, pk = task._job_task(), task._options(), uuid.uuid4()
        unique, key = options.pop("unique", None), options.pop("idempotency_key", None)
        fields = new_fields(celery_task, args, kwargs, **options)
        fields |= {"pk": pk, "idempotency_key": key}
        job = insert(Job.objects, fields, unique)
        if job.pk != pk:  # an active job has this `unique`
            try:
                return self.get_result(job.pk)
            except TaskResultDoesNotExist:
                error = f"unique={unique!r} belongs to a job of {job.task}, which has no TaskResult"
                raise InvalidTask(error) from None
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
    """The Celery task that runs a JobFunction and sends the signals of Django's Tasks."""

    abstract = True

    def _send_started(self, task):
        """Send the signal task_started. Returns the context for the body."""
        result = wait_for(task.get_backend().get_result, self.request.id)
        self.request.task_result = result
        signals.task_started.send_robust(type(task.get_backend()), task_result=result)
        return JobContext(task_result=result, _job=self)

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
        options = {"name": task.module_path, "__header__": header, **task.celery}
        # Before Django was ready, this process has imported what workers import: see apps.py.
        options["_unknown_to_workers"] = apps.ready
        registered[task.module_path] = shared_task(run, base=FunctionTask, bind=True, **options)
    return registered[task.module_path]
