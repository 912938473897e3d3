"""Celery's signals and a task's own hooks for what happens to a job while no worker runs it."""

import logging
from contextlib import contextmanager
from functools import partial

from billiard.einfo import ExceptionInfo
from celery import signals
from celery.app.task import Context
from django.db import transaction

from durable_jobs.messages import MESSAGE_FIELDS, arguments_of, find_task, message_of
from durable_jobs.models import Job

logger = logging.getLogger(__name__)


@contextmanager
def requested(job):
    """Yield the task of this job, and its request, which is self.request meanwhile. No task: yield None."""
    task = find_task(job.task)
    args, kwargs = arguments_of(job)
    request = Context(message_of(job).headers, args=args, kwargs=kwargs, called_directly=False)
    if task is None:  # this code no longer has it
        yield None, request
        return
    task.request_stack.push(request)
    try:
        yield task, request
    finally:
        task.request_stack.pop()


def info_of(error):
    """Return Celery's ExceptionInfo of an exception that nobody has raised yet."""
    try:
        raise error
    except type(error):
        return ExceptionInfo()


def call(hook, *args):
    try:
        hook(*args)
    except Exception:  # the project's own
        logger.exception("%s() of %s failed", hook.__name__, hook.__self__.name)


def failed(job, error):
    """Say that this job has failed with `error`, although no run has."""
    with requested(job) as (task, request):
        if task:
            id, info, args = str(job.pk), info_of(error), (request.args, request.kwargs)
            call(task.on_failure, error, id, *args, info)
            sent = {"task_id": id, "exception": error, "einfo": info}
            sent |= {"args": request.args, "kwargs": request.kwargs}
            signals.task_failure.send(sender=task, **sent, traceback=error.__traceback__)


def retried(job, error):
    """Say that this job runs again, because its worker died with `error`."""
    with requested(job) as (task, request):
        if task:
            info = info_of(error)
            call(task.on_retry, error, str(job.pk), request.args, request.kwargs, info)
            signals.task_retry.send(sender=task, request=request, reason=error, einfo=info)


def revoked(pks):
    """Say that these jobs were cancelled before they ran."""
    for job in Job.objects.filter(pk__in=pks, state="cancelled").only(*MESSAGE_FIELDS):
        with requested(job) as (task, request):
            sent = {"request": request, "terminated": False, "signum": None, "expired": False}
            signals.task_revoked.send(sender=task, **sent)


def after_commit(hook, *args):
    transaction.on_commit(partial(hook, *args), robust=True)


def revoked_after_commit(pks):
    if pks and signals.task_revoked.receivers:
        after_commit(revoked, pks)
