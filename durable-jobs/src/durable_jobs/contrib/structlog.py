"""For projects that log with django-structlog: `app.steps["worker"].add(LogStep)`."""

from django.dispatch import receiver
from django_structlog.celery.receivers import CeleryReceiver
from django_structlog.celery.signals import bind_extra_task_metadata
from django_structlog.celery.steps import DjangoStructLogInitStep
from structlog.contextvars import bind_contextvars, bound_contextvars

__all__ = ["LogStep"]


class LogReceiver(CeleryReceiver):
    def receiver_task_failure(self, task_id, sender, **kwargs):
        # The main process logs that a child was killed. It knows the request only from the message.
        with bound_contextvars(**getattr(sender.request, "__django_structlog__", {})):
            super().receiver_task_failure(task_id=task_id, sender=sender, **kwargs)


class LogStep(DjangoStructLogInitStep):
    """Name the request in each log line of a task, also if the task's process was killed."""

    def __init__(self, parent, **kwargs):
        # Skip the one of DjangoStructLogInitStep, which connects its own receiver.
        super(DjangoStructLogInitStep, self).__init__(parent, **kwargs)
        self.receiver = LogReceiver()
        self.receiver.connect_worker_signals()


@receiver(bind_extra_task_metadata)
def name_task(task, **kwargs):
    """Add the task's name to each log line of a task."""
    bind_contextvars(task=task.name)
