"""Log lines of tasks with django-structlog: `app.steps["worker"].add(LogStep)`."""

import logging

from celery import bootsteps, signals
from django_structlog.celery.receivers import CeleryReceiver
from structlog import contextvars

__all__ = ["LogStep"]


class LogStep(bootsteps.Step, CeleryReceiver):
    """Let django_structlog log each task of a worker, and name the task in each of its lines."""

    def __init__(self, worker, **options):
        bootsteps.Step.__init__(self, worker, **options)
        CeleryReceiver.__init__(self)
        self.connect_worker_signals()
        signals.task_postrun.connect(self.receiver_task_postrun)
        logging.getLogger("celery.app.trace").setLevel("CRITICAL")  # Celery's own lines

    def receiver_task_prerun(self, task, **kwargs):
        task.request.outer = contextvars.get_contextvars()
        super().receiver_task_prerun(task=task, **kwargs)
        contextvars.bind_contextvars(task=task.name)

    def receiver_task_postrun(self, task, **kwargs):
        """If the task was started with apply(), the lines of the outer task have its id again."""
        contextvars.clear_contextvars()
        contextvars.bind_contextvars(**task.request.outer)

    def receiver_task_retry(self, sender, **kwargs):
        with bound_to(sender):
            super().receiver_task_retry(**kwargs)

    def receiver_task_failure(self, sender, **kwargs):
        with bound_to(sender):
            super().receiver_task_failure(sender=sender, **kwargs)


def bound_to(task):
    """Name the task, also if its process was killed and the worker's main process logs it."""
    sent = getattr(task.request, "__django_structlog__", {})
    return contextvars.bound_contextvars(**sent | {"task": task.name, "task_id": task.request.id})
