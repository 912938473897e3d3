"""Celery's app with support for jobs: by name, with their results, and when they are revoked."""

import logging
from functools import partial
from typing import Any

import celery
import celery_steady
from celery.app import control
from celery.result import AsyncResult
from celery_steady import defaults
from django.apps import apps

from durable_jobs import conf
from durable_jobs.messages import find_task, is_job
from durable_jobs.transport import AMQP

__all__ = ["Celery"]

logger = logging.getLogger(__name__)

STEADY_CONSUMER = "celery_steady.consumer:Consumer"

# Projects import this module before Django's models are loaded, so the functions import what needs these.


class Control(control.Control):
    def revoke(self, task_id: Any, *args: Any, **kwargs: Any) -> Any:
        """Revoke a task as Celery documents it. A job is cancelled even if no worker runs."""
        try:
            answer = super().revoke(task_id, *args, **kwargs)
        except Exception as error:
            if not cancel_jobs(task_id):
                raise
            logger.warning("Jobs are cancelled, but the workers could not be told: %r", error)
        else:
            cancel_jobs(task_id)
            return answer


def cancel_jobs(task_id):
    """Cancel the jobs among these ids. Return the ids of jobs."""
    if not apps.ready:  # `celery control` does not set up Django
        return []
    from durable_jobs.batches import cancel_ids
    from durable_jobs.database import try_once

    return try_once(cancel_ids, task_id)


def log_errors(send, *args, **options):
    """Send a signal of the app. Celery itself hides a receiver's error, as of add_periodic_task(): entries are missing."""
    for receiver, error in (answers := send(*args, **options)):
        if isinstance(error, Exception):
            logger.error("%s() ended with %r", receiver.__qualname__, error)
    return answers


class Celery(celery_steady.Celery):
    amqp_cls = AMQP
    control_cls = Control

    def on_init(self):
        for signal in self.on_after_configure, self.on_after_finalize:
            signal.send = partial(log_errors, signal.send)

    def default_settings(self):
        return super().default_settings() | {"worker_consumer": conf.CONSUMER}

    def _set_defaults(self, source, **kwargs):
        super()._set_defaults(source, **kwargs)
        if source.worker_consumer == STEADY_CONSUMER:  # of a project's settings, before it had jobs
            defaults.override(source, "worker_consumer", conf.CONSUMER)

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

        defaults.for_results(self)
        return backend(self)
