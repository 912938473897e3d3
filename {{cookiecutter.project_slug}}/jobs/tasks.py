"""The base class of tasks that are jobs: what Celery's words do with a row, and how a body runs."""

import json
import logging
import sys
from contextlib import suppress
from traceback import format_exception, format_exception_only

from celery.contrib.django.task import DjangoTask
from celery.exceptions import Ignore, Retry, SoftTimeLimitExceeded
from celery.utils.time import maybe_make_aware
from django.conf import settings
from django.db import connection
from django.db.transaction import TransactionManagementError
from django.utils import timezone

from .database import in_transaction, insist, leave_transaction, wait_for
from .lease import Lost, Run
from .models import OVER_TIME_LIMIT, QUEUED, Job, lease
from .pools import pool
from .results import JobBackend

logger = logging.getLogger(__name__)

# Options of apply_async() that a job has, or that do not matter to it.
OPTIONS = ("queue", "headers", "ignore_result", "producer", "retries")


class JobTask(DjangoTask):
    """Base of the tasks for Job.objects.enqueue(): @shared_task(base=JobTask, bind=True).

    Their delay() and apply_async(), and what calls these, enqueue a job. Called, or sent by
    app.send_task(), it is a plain task. After a crash the body runs again, so what it does must bear
    being done twice.
    """

    abstract = True
    is_job = True  # what Job.objects.enqueue() asks
    acks_late = False  # the row survives a crash, so the message may go at once
    ignore_result = True  # the row has the result
    job_run = property(lambda self: getattr(self.request, "job_run", None))

    @classmethod
    def on_bound(cls, app):
        """Refuse what a job cannot have. Lower the soft limit to a short hard limit of the task."""
        for name in ("before_start", "exchange", "expires", "routing_key"):
            if getattr(cls, name, None) != getattr(DjangoTask, name, None):
                raise TypeError(f"{cls.name}: a job cannot have {name}, begin in its body")
        if cls.time_limit and cls.soft_time_limit and cls.soft_time_limit > cls.time_limit:
            cls.soft_time_limit = cls.time_limit * 0.9

    # Celery's own words

    def apply_async(self, args=(), kwargs=None, task_id=None, countdown=None, eta=None, **options):
        """Enqueue a job that nobody owns. Returns its AsyncResult.

        Raises TypeError for what a job cannot have or be, say a member of a group.
        """
        if eta:
            countdown = (maybe_make_aware(eta) - timezone.now()).total_seconds()
        if self.job_run and task_id == self.request.id:
            return self.retry_later(args, kwargs, countdown, **options)
        if refused := [name for name in options if options[name] and name not in OPTIONS]:
            reason = f"a job takes no {', '.join(refused)}, and joins no group, chain or chord"
            raise TypeError(f"{reason}: see Job.objects.enqueue() and enqueue_many()")
        fields = {"pk": task_id} if task_id else {}
        fields |= {"countdown": max(countdown or 0, 0), "queue": options.get("queue")}
        job = Job.objects.enqueue(self, args or (), kwargs, **fields)
        return self.AsyncResult(str(job.pk))

    def AsyncResult(self, task_id, **kwargs):  # noqa: N802
        return self.app.AsyncResult(task_id, backend=JobBackend(self.app), **kwargs)

    def retry(self, args=None, kwargs=None, exc=None, *more, **options):
        """Celery's own, which remembers what led to it."""
        caught = sys.exception()
        if self.job_run and (exc or caught):
            self.job_run.cause = describe(exc or caught, caught)
        return super().retry(args, kwargs, exc, *more, **options)

    def retry_later(self, args, kwargs, countdown, retries, queue=None, **options):
        """Remember what retry() wants: once the body and its transactions have ended, it is written."""
        text = f"Try {retries} failed, the next one in {countdown:.0f} s"
        changes = {"args": args, "kwargs": kwargs, "retries": retries, "message": text}
        self.job_run.retry = {"delay": countdown, **changes, **({"queue": queue} if queue else {})}

    def replace(self, sig):
        raise NotImplementedError("a job cannot be replaced: enqueue the other one, and return")

    # For bodies

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

    # In a worker

    def __call__(self, *args, **kwargs):
        request = self.request
        is_job = not request.called_directly and "job" in (request.headers or {})
        if not is_job or self.job_run:
            return super().__call__(*args, **kwargs)
        job, crashes = Job.objects.filter(pk=request.id), request.headers["job"]
        run = Run(request.id, request.headers.get("run"))
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
        in_block = connection.in_atomic_block  # of who calls it, as tests do
        try:
            try:
                result = self.run(*args, **kwargs)
            finally:
                left = not in_block and leave_transaction()
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
        except BaseException as error:
            if pool.is_shutdown(error):
                insist(run.row.requeue)  # another worker goes on
                raise
            if isinstance(error, SystemExit):
                fail(run, f"The task called sys.exit({error.code!r})")
                raise RuntimeError("sys.exit() in a task") from error  # which keeps its slot
            fail(run, OVER_TIME_LIMIT if isinstance(error, pool.time_limits) else None)
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


def held(query, *args, **kwargs):
    """Return what this query of a run's row brings. Raises Lost if the row is no longer the run's.

    In a transaction of the body it is part of that, so it is tried once.
    """
    wait = not in_transaction()
    if not (answer := wait_for(query, *args, **kwargs) if wait else query(*args, **kwargs)):
        raise Lost
    return answer


def requeue(run):
    if run.retry:
        attempts = insist(run.row.attempts_with, *run.cause)
        insist(run.row.requeue, attempts=attempts, **run.retry)


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
