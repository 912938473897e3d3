{% from "chosen.jinja" import worker_pool with context %}
"""The base class of tasks that are jobs: claims the row, runs the body, writes how it ended."""

import json
import logging
import threading
import time
from contextlib import suppress
from traceback import format_exception_only

{% print worker_pool.tasks_imports | default %}
from celery import Task
from celery.exceptions import Ignore, Retry, SoftTimeLimitExceeded
from celery.utils.time import maybe_make_aware
from django.conf import settings
from django.db import Error, close_old_connections, connection
from django.db.utils import InterfaceError, OperationalError
from django.utils import timezone

from .lease import Lost, Run
from .models import OVER_TIME_LIMIT, QUEUED, Job
from .results import JobBackend

logger = logging.getLogger(__name__)

OPTIONS = ("queue", "headers", "ignore_result", "producer", "retries")  # of apply_async()
last_chance = threading.Lock()  # held by the one job of this process that has its last try


class JobTask(Task):
    """Base of the tasks for Job.objects.enqueue(): @shared_task(base=JobTask, bind=True).

    Called, or sent by app.send_task(), it is a plain task. After a crash the body runs again, so
    what it does must bear being done twice.
    """

    abstract = True
    acks_late = False  # the row survives a crash, so the message may go at once
    ignore_result = True  # the row has the result

    @classmethod
    def on_bound(cls, app):
        """Refuse what a job cannot have. Lower the soft limit to a short hard limit of the task."""
        for name in ("before_start", "exchange", "expires", "routing_key"):
            if getattr(cls, name, None) != getattr(Task, name, None):
                raise TypeError(f"{cls.name}: a job cannot have {name}, begin in its body")
        if cls.time_limit and cls.soft_time_limit and cls.soft_time_limit > cls.time_limit:
            cls.soft_time_limit = cls.time_limit * 0.9

    job_run = property(lambda self: getattr(self.request, "job_run", None))

    def send(self, job, producer, **options):
        """Publish a job's message: what apply_async() does, in a third of its time."""
        amqp, pk, headers = self.app.amqp, str(job.pk), {"job": job.crashes}
        if self.app.conf.task_always_eager:
            self.apply(job.args, job.kwargs, task_id=pk, retries=job.retries, headers=headers)
            return
        options = {"retries": job.retries, "ignore_result": True, **options}
        message = amqp.create_task_message(pk, self.name, job.args, job.kwargs, **options)
        options = {"queue": job.queue, "priority": self.priority}
        options = amqp.router.route(options, self.name, job.args, job.kwargs)
        options["priority"] = options.get("priority") or 0
        amqp.send_task_message(producer, self.name, message, headers=headers, **options)

    def apply_async(self, args=(), kwargs=None, task_id=None, countdown=None, eta=None, **options):
        """Enqueue a job that nobody owns: what delay() and a schedule do. Returns its AsyncResult.

        Raises TypeError for what a job cannot have or be, say a member of a group.
        """
        if eta:
            countdown = (maybe_make_aware(eta) - timezone.now()).total_seconds()
        if self.job_run and task_id == self.request.id:  # by retry()
            return self.requeue(self.job_run, args, kwargs, countdown, **options)
        if refused := [name for name in options if options[name] and name not in OPTIONS]:
            raise TypeError(f"a job takes no {', '.join(refused)}: see Job.objects.enqueue()")
        fields = {"pk": task_id} if task_id else {}
        fields |= {"countdown": max(countdown or 0, 0), "queue": options.get("queue")}
        job = Job.objects.enqueue(self, args or (), kwargs, **fields)
        return self.AsyncResult(str(job.pk))

    def AsyncResult(self, task_id, **kwargs):  # noqa: N802
        return self.app.AsyncResult(task_id, backend=JobBackend(self.app), **kwargs)

    def requeue(self, run, args, kwargs, countdown=0, retries=0, queue=None, **options):
        """Queue the row of this run again, as retry() wants it."""
        changes = {"queue": queue} if queue else {}
        text = f"Try {retries} failed, the next one in {countdown:.0f} s"
        changes |= {"args": args, "kwargs": kwargs, "retries": retries, "message": text}
        insist(run.row.requeue, countdown, **changes)

    def replace(self, sig):
        raise NotImplementedError("a job cannot be replaced: enqueue the other one, and return")

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
        job, crashes = Job.objects.filter(pk=request.id), request.headers["job"]
        # A crash is no proof against a job that was not alone: let it be the only suspect.
        apart = crashes and crashes + 1 >= settings.JOB_MAX_CRASHES
        if apart and not last_chance.acquire(blocking=False):
            insist(job.filter(QUEUED).requeue, settings.JOB_SWEEP_SECONDS)
            raise Ignore("waits until another job has had its last try")
        try:
            run = Run(request.id)
            limit = request.time_limit or self.time_limit
            if not insist(job.start, run.token, retries=request.retries, limit=limit):
                raise Ignore("a copy of the message, or the job is cancelled")
            request.job_run = run
            with run:
                return self.run_job(run, args, kwargs)
        finally:
            if apart:
                last_chance.release()

    def run_job(self, run, args, kwargs):
        try:
            result = self.run(*args, **kwargs)
            if connection.connection and not connection.in_atomic_block:
                connection.set_autocommit(True)  # raises what is wrong with one that was left open
        except Retry as retry:
            if not retry.sig:
                fail(run, "Retry was raised by hand: self.retry() would queue the job again")
            elif retry.is_eager:
                self.apply_async(retry.sig.args, retry.sig.kwargs, **retry.sig.options)
            raise
        except Ignore:
            result = None
        except Lost:
            raise Ignore("cancelled, or taken over by another run") from None
{% print worker_pool.ends %}
        except BaseException as error:
            over = isinstance(error, SoftTimeLimitExceeded)
            fail(run, OVER_TIME_LIMIT if over else "".join(format_exception_only(error)).strip())
            raise
        succeed(run, result)
        return result


def succeed(run, result):
    try:
        json.dumps(result, allow_nan=False)
        changes = {**run.report, "progress": 100, "result": result}
        written = insist(run.row.finish, "succeeded", **changes)
    except Exception as error:
        fail(run, f"Its result cannot be stored as JSON: {error}")
        raise
    if not written:
        raise Ignore("cancelled, or taken over by another run")


def fail(run, reason):
    if not connection.in_atomic_block:
        connection.close()  # its transaction may be aborted
    insist(run.row.finish, "failed", error=printable(reason), **run.report)


{% print worker_pool.insist | default %}
def insist(update, *args, **kwargs):
    """Return update(…), tried until the database answers: how a job ended must not get lost."""
    while True:
        with suppress(SoftTimeLimitExceeded):  # the limit is the body's
            try:
                return update(*args, **kwargs)
            except Error as error:
                if not is_away(error):
                    raise
                logger.warning("waiting for the database: %s", error)
                close_old_connections()
                time.sleep(1)


def is_away(error):
    """Whether it may pass: PostgreSQL's 25006, "read only", may; class 54, "too large", does not."""
    state = getattr(error.__cause__, "sqlstate", None) or ""
    away = isinstance(error, (OperationalError, InterfaceError)) and not state.startswith("54")
    return away or state == "25006"


def printable(text):
    """Return `text` without what PostgreSQL refuses: NUL characters and lone surrogates."""
    return str(text).replace("\0", "").encode(errors="replace").decode()
