{% from "chosen.jinja" import worker_pool with context %}
"""The base class of tasks that are jobs: claims the row, runs the body, writes how it ended."""

import json
import logging
import sys
import time
from contextlib import suppress
from traceback import format_exception, format_exception_only

{% print worker_pool.tasks_imports | default %}
from celery.exceptions import Ignore, Retry, SoftTimeLimitExceeded
from django.conf import settings
from django.db import Error, close_old_connections, connection
from django.db.transaction import TransactionManagementError
from django.db.utils import InterfaceError, OperationalError

from .celery import CeleryTask
from .lease import Lost, Run
from .models import OVER_TIME_LIMIT, QUEUED, Job, lease

logger = logging.getLogger(__name__)


class JobTask(CeleryTask):
    """Base of the tasks for Job.objects.enqueue(): @shared_task(base=JobTask, bind=True).

    Called, or sent by app.send_task(), it is a plain task. After a crash the body runs again, so
    what it does must bear being done twice.
    """

    abstract = True
    acks_late = False  # the row survives a crash, so the message may go at once
    ignore_result = True  # the row has the result

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

    @property
    def cursor(self):
        """What the last report() with a cursor has left, of this run or of an earlier one, or None.

        None also where the task is called. Read it once, at the start of the body.
        """
        run = self.job_run
        if run and not run.cursor:
            run.cursor = held(list, run.row.values_list("cursor", flat=True))
        return run.cursor[0] if run else None

    def report(self, done, total=100, message="", *, cursor=None):
        """Show the progress, `done` of `total`, and a line of text. Ends a cancelled job's body.

        With a `cursor`, whatever JSON can hold, the next run goes on here: self.cursor is that
        after a crash, a deploy or a retry. It is stored when this returns; inside your own atomic()
        with what else that changes: together, once, or not at all. Keep that short: until it ends
        nobody can cancel the job. Raises TypeError or ValueError for a cursor that is not JSON.
        """
        if run := self.job_run:
            if run.lost:
                raise Lost
            percent = int(100 * done / total) if total else 100
            message = printable(message)[:255]
            run.report = {"progress": max(0, min(percent, 100)), "message": message}
            if cursor is not None:
                json.dumps(cursor, allow_nan=False)
                held(run.row.update, cursor=cursor, wake_at=lease(), **run.report)
                run.cursor = []  # perhaps it is rolled back

    def retry(self, args=None, kwargs=None, exc=None, *more, **options):
        """Celery's own, which remembers what led to it."""
        caught = sys.exception()
        if self.job_run and (exc or caught):
            self.job_run.cause = describe(exc or caught, caught)
        return super().retry(args, kwargs, exc, *more, **options)

    def __call__(self, *args, **kwargs):
        request = self.request
        is_job = not request.called_directly and "job" in (request.headers or {})
        if not is_job or self.job_run:
            return super().__call__(*args, **kwargs)
        job, crashes = Job.objects.filter(pk=request.id), request.headers["job"]
        run = Run(request.id)
{% print worker_pool.run | default %}
        # A crash is no proof against a job that was not alone: let it be the only suspect.
        if crashes and crashes + 1 >= settings.JOB_MAX_CRASHES and not run.is_only_suspect():
            insist(job.filter(QUEUED).requeue, settings.JOB_SWEEP_SECONDS)
            raise Ignore("waits until another job has had its last try")
        try:
            limit = request.time_limit or self.time_limit
            if not insist(job.start, run.token, retries=request.retries, limit=limit):
                raise Ignore("a copy of the message, or the job is cancelled")
            request.job_run = run
            with run:
                return self.run_job(run, args, kwargs)
        finally:
            run.ended = True

    def run_job(self, run, args, kwargs):
        in_transaction = connection.in_atomic_block  # of who calls it, as tests do
        try:
            try:
                result = self.run(*args, **kwargs)
            finally:
                left = not in_transaction and leave_transaction()
            if left:
                raise TransactionManagementError("The task left a transaction open")
        except Retry as retry:
            if retry.is_eager:
                self.apply_async(retry.sig.args, retry.sig.kwargs, **retry.sig.options)
            if not run.retry:
                fail(run, "Retry was raised by hand: self.retry() would queue the job again")
            requeue(run)
            raise
        except Ignore:
            result = None
        except Lost:
            raise Ignore("cancelled, or taken over by another run") from None
{% print worker_pool.ends %}
        except BaseException as error:
            fail(run, OVER_TIME_LIMIT if isinstance(error, SoftTimeLimitExceeded) else None)
            raise
        if run.retry:  # with throw=False
            requeue(run)
            raise Ignore("queued again")
        succeed(run, result)
        return result


def succeed(run, result):
    try:
        with suppress(SoftTimeLimitExceeded):  # the limit is the body's, here and in insist()
            json.dumps(result, allow_nan=False)
        changes = {**run.report, "progress": 100, "result": result}
        written = insist(run.row.finish, "succeeded", **changes)
    except Exception as error:
        fail(run, f"Its result cannot be stored as JSON: {error}")
        raise
    if not written:
        raise Ignore("cancelled, or taken over by another run")


def fail(run, reason=None):
    """Write that it failed: for this reason, or for that of the exception that is handled."""
    error, traceback = describe(sys.exception())
    error = printable(reason) if reason else error
    attempts = insist(run.row.attempts_with, error, traceback)
    insist(run.row.finish, "failed", error=error, attempts=attempts, **run.report)


def insist(update, *args, **kwargs):
    """Do as wait_for() also over the soft time limit: how a job ended must not get lost."""
    while True:
        with suppress(SoftTimeLimitExceeded):
            return wait_for(update, *args, **kwargs)


def held(query, *args, **kwargs):
    """Return what this query of a run's row brings. Raises Lost if the row is no longer the run's.

    In a transaction of the body it is part of that, so it is tried once.
    """
    wait = not transaction_open()
    if not (answer := wait_for(query, *args, **kwargs) if wait else query(*args, **kwargs)):
        raise Lost
    return answer


{% print worker_pool.wait_for | default %}
def wait_for(query, *args, **kwargs):
    """Return query(…), tried until the database answers."""
    while True:
        try:
            return query(*args, **kwargs)
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


def requeue(run):
    if run.retry:
        attempts = insist(run.row.attempts_with, *run.cause)
        insist(run.row.requeue, attempts=attempts, **run.retry)


def transaction_open():
    return connection.connection and (connection.in_atomic_block or not connection.autocommit)


def leave_transaction():
    """Roll back what a body left open, or else how it ended would be part of it. Returns if so."""
    with suppress(Error):
        if connection.connection and not (connection.in_atomic_block or connection.autocommit):
            connection.set_autocommit(True)  # perhaps all was committed
    if left := transaction_open():
        connection.close()
        with suppress(Error):
            connection.connect()  # forgets the blocks, also if it fails
    return left


def describe(error, caught=None):
    """Return class and message of an exception, and the end of the traceback of the one caught."""
    try:
        text = "".join(format_exception_only(error)).strip()
        frames = format_exception(caught or error, limit=-20)
    except Exception:  # of an exception that cannot be shown, or is none
        return type(error).__name__, ""
    return printable(text), printable("".join(frame[:500] for frame in frames)[-4000:])


def printable(text):
    """Return `text` without what PostgreSQL refuses: NUL characters and lone surrogates."""
    return str(text).replace("\0", "").encode(errors="replace").decode()
