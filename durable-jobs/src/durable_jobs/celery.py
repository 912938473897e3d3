"""Celery's app with support for jobs, by name and in a canvas. A canvas has jobs or plain tasks, not both."""

import re
from functools import wraps

import celery
from celery import signals
from celery.app import control, utils
from celery.canvas import Signature
from celery.contrib.django.task import DjangoTask
from celery.utils.functional import maybe_list
from celery.utils.imports import symbol_by_name
from django.apps import apps

from . import transport
from .database import try_once
from .pools import pool_name
from .values import uuids

__all__ = ["Celery"]

NO_CANVAS = "A job cannot be a callback, or part of a group, chain or chord with plain tasks: enqueue it in a task"
# Options of apply_async() that are supported or harmless.
OPTIONS = ("queue", "headers", "ignore_result", "producer", "retries")
CANVAS_OPTIONS = ("link", "link_error", "chain", "chord")  # of apply_async(): they hold other tasks


class Task(DjangoTask):
    """The base class of plain tasks."""

    def apply_async(self, *args, **options):
        refuse_jobs(self.app, options)  # not only in send_task(): eager mode does not call that
        return super().apply_async(*args, **options)


class Control(control.Control):
    def revoke(self, task_id, *args, **kwargs):
        """Revoke a task as Celery documents it. A job is cancelled even if no worker runs."""
        try:
            return super().revoke(task_id, *args, **kwargs)
        finally:
            if apps.ready:  # `celery control` does not set up Django
                try_once(cancel, task_id)


class Celery(celery.Celery):
    task_cls = Task
    control_cls = Control
    # This is a string, because durable_jobs.results imports models, and models need this app.
    backend_cls = "durable_jobs.results:backend"

    def connection_for_read(self, url=None, **kwargs):
        transport.prepare(self, url or self.conf.broker_read_url)
        return super().connection_for_read(url, **kwargs)

    def connection_for_write(self, url=None, **kwargs):
        transport.prepare(self, url or self.conf.broker_write_url)
        return super().connection_for_write(url, **kwargs)

    def send_task(self, name, args=None, kwargs=None, countdown=None, eta=None, **options):
        """Send a message as Celery documents it. If the task is a job, enqueue it instead.

        Raises TypeError if a job is used as a callback.
        """
        refuse_jobs(self, options)
        options |= {"countdown": countdown, "eta": eta}
        if is_job(self, name):
            return self.tasks[name].apply_async(args, kwargs, **options)
        return super().send_task(name, args, kwargs, **options)


# `celery report`, `celery inspect conf` and Flower print all Django settings, and mask most
# passwords. They do not know these settings.
utils.HIDDEN_SETTINGS = re.compile(
    utils.HIDDEN_SETTINGS.pattern + "|CELERY_BROKER_URL|LOCATION|BASIC_AUTH", re.IGNORECASE
)


@signals.celeryd_init.connect
def adapt_to_pool(conf, options, **kwargs):
    """Let threads continue when the broker is lost: Celery would fail to cancel their tasks."""
    if pool_name(options.get("pool") or conf.worker_pool) in ("threads", "solo"):
        conf.worker_cancel_long_running_tasks_on_connection_loss = False


def cancel(task_id):
    """Cancel this job or batch, or each in a list. Ignore plain tasks. Returns the ids of those that are jobs."""
    keys = uuids(maybe_list(task_id) or [])
    jobs, batches = (apps.get_model(name).objects for name in ("durable_jobs.Job", "durable_jobs.Batch"))
    found = jobs.filter(pk__in=list(keys))
    found.cancel()
    for batch in batches.filter(pk__in=list(keys), ended_at=None):
        batch.cancel()
    return [keys[pk] for pk in found.values_list("pk", flat=True)]


def is_job(app, name):
    return getattr(app.tasks.get(name), "_is_job", False)


def refuse_jobs(app, options):
    """Raise TypeError if these options of apply_async() hold a job."""
    for option in CANVAS_OPTIONS:
        if jobs := [name for name in task_names(options.get(option)) if is_job(app, name)]:
            raise TypeError(f"{option}={jobs[0]}: {NO_CANVAS}")


def check_options(options, supported=()):
    """Raise TypeError for options of apply_async() that a job cannot have."""
    known = [*OPTIONS, *supported]
    if refused := [name for name in options if options[name] and name not in known]:
        reason = f"a job does not take {', '.join(refused)}: see Job.objects.enqueue()"
        raise TypeError(f"{reason} and enqueue_many(). {NO_CANVAS}")


def task_names(value):
    """Yield the names of all tasks in a signature, or in a list of signatures."""
    if isinstance(value, dict):
        yield value.get("task")
        # A group, chain or chord has its tasks in kwargs, callbacks are in options.
        value = [*value.get("kwargs", {}).values(), *value.get("options", {}).values()]
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from task_names(each)


def store_jobs(kind):
    """Let this class of Celery's canvas store its tasks as jobs, if they are jobs.

    Celery has no hook for this. It sends the tasks of a group one by one, and tells no task which is the last.
    """
    send = kind.apply_async

    @wraps(send)
    def apply_async(self, args=None, kwargs=None, **options):
        body = (kwargs or {}).get("body")  # chord(header)(body)
        names = {name for name in task_names([self, body]) if name and name not in CANVAS}
        if not any(is_job(self.app, name) for name in names):
            return send(self, args, kwargs, **options)
        if plain := sorted(name for name in names if not is_job(self.app, name)):
            raise TypeError(f"{plain[0]} is not a job. {NO_CANVAS}")
        return symbol_by_name("durable_jobs.results:enqueue")(self, args, kwargs, **options)

    kind.apply_async = apply_async


CANVAS = ("celery.chain", "celery.group", "celery.chord")
for name in ("chain", "group", "chord", "xmap", "xstarmap", "chunks"):
    store_jobs(Signature.TYPES[name])
