{% from "chosen.jinja" import broker, worker_pool with context %}
"""The base class of tasks that are jobs: claims the row, runs the body, writes how it ended."""

import json
import logging
import time
{% if broker.flower %}
from contextlib import suppress
{% endif %}

{% print worker_pool.tasks_imports | default %}
from celery import Task
from celery.exceptions import Ignore, Retry, SoftTimeLimitExceeded
{% if broker.flower %}
from celery.utils.functional import maybe_list
{% endif %}
from celery.utils.time import maybe_make_aware
{% if broker.flower %}
from celery.worker.control import Panel
{% endif %}
{% if broker.flower %}
from django.core.exceptions import ValidationError
{% endif %}
from django.db import Error, close_old_connections{{ ", connection" if broker.flower }}
from django.db.utils import InterfaceError, OperationalError
from django.utils import timezone

from .lease import Lost, Run
from .models import OVER_TIME_LIMIT, Job

logger = logging.getLogger(__name__)


class JobTask(Task):
    """Base of the tasks for Job.objects.enqueue(): @shared_task(base=JobTask, bind=True).

    Called, or sent without a row, it is a plain task. After a crash the body runs again, so what it
    does must bear being done twice.
    """

    abstract = True
    acks_late = False  # the row survives a crash, so the message may go at once
    ignore_result = True  # the row has the result

    @classmethod
    def on_bound(cls, app):
        """Lower the soft limit of the settings for a task with a short hard limit of its own."""
        if cls.time_limit and cls.soft_time_limit and cls.soft_time_limit > cls.time_limit:
            cls.soft_time_limit = cls.time_limit * 0.9

    @property
    def job_run(self):
        return getattr(self.request, "job_run", None)

    def send(self, job, producer, **options):
        """Publish a job's message: what apply_async() does, in a third of its time."""
        amqp, pk, headers = self.app.amqp, str(job.pk), {"job": True}
        if self.app.conf.task_always_eager:
            self.apply(job.args, job.kwargs, task_id=pk, retries=job.retries, headers=headers)
            return
        options = {"retries": job.retries, "ignore_result": True, **options}
        message = amqp.create_task_message(pk, self.name, job.args, job.kwargs, **options)
        options = {"queue": job.queue, "priority": self.priority}
        options = amqp.router.route(options, self.name, job.args, job.kwargs)
        options["priority"] = options.get("priority") or 0
        amqp.send_task_message(producer, self.name, message, headers=headers, **options)

    def report(self, done, total=100, message=""):
        """Show the progress, `done` of `total`, and a line of text. Ends a cancelled job's body."""
        if run := self.job_run:
            if run.lost:
                raise Lost
            percent = int(100 * done / total) if total else 100
            message = printable(message)[:255]
            run.report = {"progress": max(0, min(percent, 100)), "message": message}

    def __call__(self, *args, **kwargs):
        request = self.request
        is_job = not request.called_directly and "job" in (request.headers or {})
        if not is_job or self.job_run:
            return super().__call__(*args, **kwargs)
        run = Run(request.id)
        limit = request.time_limit or self.time_limit
        job = Job.objects.filter(pk=request.id)
        if not insist(job.start, run.token, retries=request.retries, limit=limit):
            raise Ignore("a copy of the message, or the job is cancelled")
        request.job_run = run
        with run:
            return self.run_job(run, args, kwargs)

    def run_job(self, run, args, kwargs):
        try:
            result = self.run(*args, **kwargs)
        except Retry:  # the row is queued again, see signature_from_request()
            raise
        except Ignore:
            result = None
        except Lost:
            raise Ignore("cancelled, or taken over by another run") from None
        except SoftTimeLimitExceeded:
            fail(run, OVER_TIME_LIMIT)
            raise
{% print worker_pool.ends %}
        except BaseException as error:
            fail(run, f"{type(error).__name__}: {error}")
            raise
        succeed(run, result)
        return result

    def signature_from_request(self, request=None, args=None, kwargs=None, queue=None, **options):
        """What retry() sends: for a job no message, the row is queued until the retry is due."""
        signature = super().signature_from_request(request, args, kwargs, queue, **options)
        if run := self.job_run:
            changes = {"args": signature.args, "kwargs": signature.kwargs}
            if queue:
                changes["queue"] = queue
            apply = signature.apply

            def requeue(**kwargs):
                delay, retries = options["countdown"], options["retries"]
                if eta := options["eta"]:
                    delay = (maybe_make_aware(eta) - timezone.now()).total_seconds()
                text = f"Try {retries} failed, the next one in {delay:.0f} s"
                insist(run.row.requeue, delay, retries=retries, message=text, **changes)

            def requeue_and_apply(**kwargs):  # what Celery calls where tasks are eager
                requeue()
                return apply(**kwargs)

            signature.apply_async, signature.apply = requeue, requeue_and_apply
        return signature


def succeed(run, result):
    changes = {**run.report, "progress": 100, "result": result}
    try:
        json.dumps(result, allow_nan=False)
        written = insist(run.row.finish, "succeeded", **changes)
    except (TypeError, ValueError, Error) as error:
        fail(run, f"Its result cannot be stored as JSON: {error}")
        raise
    if not written:
        raise Ignore("cancelled, or taken over by another run")


def fail(run, reason):
    insist(run.row.finish, "failed", error=printable(reason), **run.report)


{% print worker_pool.insist | default %}
def insist(update, *args, **kwargs):
    """Return update(…), tried until the database answers: how a job ended must not get lost."""
    while True:
        try:
            return update(*args, **kwargs)
        except Error as error:
            if not is_away(error):
                raise
            logger.warning("waiting for the database: %s", error)
            close_old_connections()
            time.sleep(1)


def is_away(error):
    """Whether it may pass: also PostgreSQL's 25006, "read only", as after a failover."""
    read_only = getattr(error.__cause__, "sqlstate", None) == "25006"
    return read_only or isinstance(error, (OperationalError, InterfaceError))


def printable(text):
    """Return `text` without what PostgreSQL refuses: NUL characters and lone surrogates."""
    return str(text).replace("\0", "").encode(errors="replace").decode()
{% if broker.flower %}


def follow_revokes(**kwargs):
    """Cancel the job of every task that this worker is told to revoke.

    Celery's signal task_revoked comes when the message reaches a free slot, on some pools never.
    """
    revoke = Panel.data["revoke"]

    def cancel_and_revoke(state, task_id, terminate=False, signal=None, **kwargs):
        for pk in maybe_list(task_id) or []:
            with suppress(ValidationError, Error):  # some task's own kind of id
                Job.objects.filter(pk=pk).cancel()
        connection.close()  # it would grow stale here, and a child must not inherit it
        # Whatever signal Flower asks for: one that children ignore would leave the task running.
        return revoke(state, task_id, terminate=terminate, signal="SIGKILL", **kwargs)

    Panel.data["revoke"] = cancel_and_revoke
{% endif %}
