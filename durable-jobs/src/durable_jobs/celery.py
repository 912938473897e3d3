"""Celery's app with support for jobs: by name, with their results, and when they are revoked."""

import logging
import re
from functools import partial
from typing import Any

import celery
import celery_steady.rabbitmq
from celery.app import control, utils
from celery.result import AsyncResult
from django.apps import apps

from durable_jobs import conf
from durable_jobs.messages import find_task, is_job
from durable_jobs.transport import AMQP

__all__ = ["Celery"]

logger = logging.getLogger(__name__)

STEADY_CONSUMER = "celery_steady.consumer:Consumer"
DEFAULTS = {
    "worker_consumer": conf.CONSUMER,
    "beat_scheduler": "celery_steady.beat:Scheduler",
}

# Projects import this module before Django's models are loaded, so the functions import what needs these.


class Control(control.Control):
    def revoke(self, task_id: Any, *args: Any, **kwargs: Any) -> Any:
        """Revoke a task as Celery documents it. A job is cancelled even if no worker runs."""
        try:
            return super().revoke(task_id, *args, **kwargs)
        finally:
            if apps.ready:  # `celery control` does not set up Django
                from durable_jobs.batches import cancel_ids
                from durable_jobs.database import try_once

                try_once(cancel_ids, task_id)


def log_errors(send, *args, **options):
    """Send a signal of the app. Celery itself hides a receiver's error, as of add_periodic_task(): entries are missing."""
    for receiver, error in (answers := send(*args, **options)):
        if isinstance(error, Exception):
            logger.error("%s() ended with %r", receiver.__qualname__, error)
    return answers


def set_defaults(source, **kwargs):
    """Replace Celery's own defaults. With Celery 5.7, add_defaults() would replace the project's settings too."""
    source.maps[-1].update(DEFAULTS)
    if source.worker_consumer == STEADY_CONSUMER:  # the line of its README, from before
        # Before Celery 5.7, CELERY_WORKER_CONSUMER goes before worker_consumer.
        source[source._to_keys("worker_consumer")[0]] = conf.CONSUMER


class Celery(celery_steady.rabbitmq.Celery):
    amqp_cls = AMQP
    control_cls = Control

    def on_init(self):
        for signal in self.on_after_configure, self.on_after_finalize:
            signal.send = partial(log_errors, signal.send)
        self.on_after_configure.connect(set_defaults)

    def send_task(
        self, name: str, args: Any = None, kwargs: dict[str, Any] | None = None, **options: Any
    ) -> AsyncResult:
        """Send a message as Celery documents it. If the task is a job, enqueue it instead."""
        if is_job(task := find_task(name, self)):
            return task.apply_async(args, kwargs, **options)
        return super().send_task(name, args, kwargs, **options)

    def add_periodic_task(self, schedule: Any, sig: Any, *args: Any, **options: Any) -> str:
        """Add an entry to Beat's schedule as Celery documents it. `sig` may be the signature of a job."""
        if is_job(getattr(sig, "task", None)):
            sig = celery.Signature(sig.task.name, sig.args, sig.kwargs, sig.options)
        return super().add_periodic_task(schedule, sig, *args, **options)

    def _get_backend(self):
        from durable_jobs.results import backend

        return backend(self)


# `celery report`, `celery inspect conf` and Flower print all Django settings, and mask most
# passwords. They do not know these settings.
pattern = utils.HIDDEN_SETTINGS.pattern + "|CELERY_BROKER_URL|LOCATION|BASIC_AUTH"
utils.HIDDEN_SETTINGS = re.compile(pattern, re.IGNORECASE)
