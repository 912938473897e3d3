"""JobTask: what delay(), retry() and report() do with a job's row, and how a worker runs a body."""

import asyncio
import json
import logging
import sys
from contextlib import suppress
from datetime import timedelta
from functools import partial
from inspect import getattr_static, iscoroutinefunction
from traceback import format_exception, format_exception_only

from asgiref.sync import async_to_sync
from celery.contrib.django.task import DjangoTask
from celery.exceptions import Ignore, Retry, SoftTimeLimitExceeded
from celery.utils.time import maybe_make_aware
from django.conf import settings
from django.db import connection, transaction
from django.db.models.functions import Now
from django.db.transaction import TransactionManagementError
from django.utils import timezone

from .celery import NO_CANVAS
from .database import (
    end_interrupted_query,
    in_transaction,
    roll_back_open_transaction,
    store_outcome,
    wait_for,
)
from .lease import JobLost, Run, WorkerStopping, runs
from .models import MAX_COUNTDOWN, OVER_TIME_LIMIT, QUEUED, Job, LockTimeout, as_json, lease_end
from .pools import pool, shutting_down
from .results import JobBackend

logger = logging.getLogger(__name__)

# Options of apply_async() that are supported or harmless.
OPTIONS = ("queue", "headers", "ignore_result", "producer", "retries")


class JobError(Exception):
    """Ends a job with an error text for its owner: raise JobError("Row 17 has no e-mail").

    The text of any other exception of the body is for staff: the owner only sees that the job failed.
    """


class JobTask(DjangoTask):
    """The base class of tasks that are jobs: @shared_task(base=JobTask, bind=True).

    delay(), apply_async() and everything that calls them enqueue a job without an owner. If an app that
    is not a jobs.celery.Celery sends it by name, a worker stores the job. A task that is called directly
    runs as a plain function. After a crash the body runs again, so it must be safe to repeat.
    """

    abstract = True
    is_job = True  # checked by Job.objects.enqueue()
    acks_late = False  # the row survives a crash, so acknowledge the message at once
    retry_on_worker_lost = False  # the row counts crashes
    ignore_result = True  # the row has the result
    job_run = property(lambda self: getattr(self.request, "job_run", None))

    @classmethod
    def bind(cls, app):
        """Prefer nine tenths of the task's own time limit to the soft limit of the settings."""
        if cls.time_limit and not cls.soft_time_limit:
            cls.soft_time_limit = cls.time_limit * 0.9
        return super().bind(app)

    @classmethod
    def on_bound(cls, app):
        """Raise TypeError for options that a job cannot have, and prepare the time limits and the body.

        A soft time limit above the hard one is lowered. A coroutine function runs in an event loop.
        """
        for name in ("before_start", "exchange", "expires", "routing_key"):
            if getattr(cls, name, None) != getattr(DjangoTask, name, None):
                raise TypeError(f"{cls.name}: a job cannot have {name}")
        if cls.time_limit and cls.soft_time_limit and cls.soft_time_limit > cls.time_limit:
            cls.soft_time_limit = cls.time_limit * 0.9
        if iscoroutinefunction(cls.run):
            body = getattr_static(cls, "run")  # not yet bound to an instance
            cls.run = lambda self, *args, **kwargs: run_coroutine(
                self, body.__get__(self, cls)(*args, **kwargs)
            )

    # For callers: Celery's methods

    def apply_async(self, args=(), kwargs=None, task_id=None, countdown=None, eta=None, **options):
        """Enqueue a job without an owner. Returns its AsyncResult.

        Raises TypeError for options that a job cannot have, such as `link`, or the `group_id` that Celery
        passes to the tasks of a group.
        """
        if eta:
            countdown = (maybe_make_aware(eta) - timezone.now()).total_seconds()
        if self.job_run and task_id == self.request.id:  # Celery's retry() calls this
            return self.retry_later(args, kwargs, countdown, **options)
        self.check_options(options)
        fields = {"pk": task_id} if task_id else {}
        fields |= {"countdown": max(countdown or 0, 0), "queue": options.get("queue")}
        job = Job.objects.enqueue(self, args or (), kwargs, **fields)
        return self.AsyncResult(str(job.pk))

    # These store the row in the caller's transaction too. Celery's own would store it after the commit.
    delay_on_commit, apply_async_on_commit = DjangoTask.delay, apply_async

    def map(self, *args):
        """Raise TypeError: Celery would call the body many times in one plain task."""
        raise TypeError(f"{self.name}: {NO_CANVAS}")

    starmap = chunks = map

    def check_options(self, options):
        """Raise TypeError for options of apply_async() that a job cannot have."""
        if refused := [name for name in options if options[name] and name not in OPTIONS]:
            reason = f"a job does not take {', '.join(refused)}: see Job.objects.enqueue()"
            raise TypeError(f"{reason} and enqueue_many(). {NO_CANVAS}")

    def AsyncResult(self, task_id, **kwargs):  # noqa: N802
        return self.app.AsyncResult(task_id, backend=JobBackend(self.app), **kwargs)

    def retry(self, args=None, kwargs=None, exc=None, *more, **options):
        """Works as Celery documents. The exception is stored in the Failure of this run."""
        caught = sys.exception()
        if self.job_run and (exc or caught):
            self.job_run.failure = describe(exc or caught, caught)
        return super().retry(args, kwargs, exc, *more, **options)

    def retry_later(self, args, kwargs, countdown, retries, queue=None, **options):
        """Remember the options of retry(). They are stored when the body and its transaction have ended."""
        countdown = min(countdown, MAX_COUNTDOWN)
        text = f"Try {retries} failed, the next one starts in {countdown:.0f} s"
        changes = {"retries": retries, "message": text, **({"queue": queue} if queue else {})}
        self.job_run.retry = {"delay": countdown, "args": args, "kwargs": kwargs, **changes}

    def replace(self, sig):
        raise NotImplementedError("a job cannot be replaced: enqueue the other task and return")

    def apply(self, args=None, kwargs=None, headers=None, throw=None, **options):
        """Run a job in eager mode, for send_one(). Raises TypeError for other calls, such as a group's."""
        if "job" not in (headers or {}):
            raise TypeError(
                f"{self.name}.apply() does not run a job: enqueue it, or call the task. {NO_CANVAS}"
            )
        return super().apply(args, kwargs, headers=headers, throw=False, **options)

    def update_state(self, *args, **kwargs):
        raise NotImplementedError(
            "a job has no update_state(): call self.report(done, total, message)"
        )

    # For bodies

    @property
    def cursor(self):
        """The last cursor that report() stored, in this run or an earlier one. None if there is none.

        Read it once, at the start of the body. It is None if the task was called directly. Raises
        RuntimeError in a thread that the body has started.
        """
        run = self.own_run()
        if run and not run.cursor:
            run.cursor = query_own_row(run, lambda: list(run.row.values_list("cursor", flat=True)))
        return run.cursor[0] if run else None

    def report(self, done, total=100, message="", *, cursor=None):
        """Show the progress, `done` of `total`, and a line of text. If the job is cancelled, end its body.

        With `cursor`, any JSON value except null, the next run can continue here: after a crash, a deploy
        or a retry, it reads the value from self.cursor. The cursor is stored when this method returns.
        Inside your own atomic() it is stored together with your changes, or not at all. Keep that block
        short, because nobody can cancel the job until the block ends. Raises TypeError or ValueError if the
        cursor is not JSON, RuntimeError in a thread that the body has started.

        If the worker is shutting down, a call with `cursor` ends the body once the cursor is committed.
        The job continues in another worker.
        """
        if run := self.own_run():
            if run.lost:
                raise JobLost
            percent = int(100 * done / total) if total else 100
            message = "" if message is None else printable(message)[:255]
            run.report = {"progress": max(0, min(percent, 100)), "message": message}
            if cursor is not None:
                json.dumps(cursor, allow_nan=False)  # raises if it is not JSON
                query_own_row(
                    run, run.row.update, cursor=cursor, sweep_at=lease_end(), **run.report
                )
                run.cursor = []  # forget the cached value: the body's transaction may roll back
                if not in_transaction():
                    run.written = run.report  # renew_leases() need not write it again
                if shutting_down[0]:
                    end_after_commit()

    def own_run(self):
        if self.request_stack.top is None and any(r.task is self for r in tuple(runs.values())):
            raise RuntimeError(
                "report() and cursor work only in the thread that runs the body: call them there"
            )
        return self.job_run

    # In a worker

    def __call__(self, *args, **kwargs):
        request = self.request
        if request.called_directly or self.job_run:  # self.job_run: the body calls its own task
            return super().__call__(*args, **kwargs)
        headers = request.headers or {}
        if "job" not in headers:  # an app that does not know that this task is a job has sent it
            fields = Job.objects.prepare(Now(), self, args, kwargs, None, None)
            wait_for(Job.objects.get_or_create, fields, pk=request.id)
        crashes = headers.get("crashes", 0)
        run = Run(request.id, headers.get("run"), self)
        # A suspect is a job that fails at its next crash, because it may be what kills the workers. A
        # process runs only one suspect at a time. A job without a crash is never a suspect.
        is_suspect = crashes and crashes + 1 >= settings.JOB_MAX_CRASHES
        if shutting_down[0] or (is_suspect and not run.become_suspect()):
            # With times_sent=0, the job waits for its next try, and this is an old message.
            row = Job.objects.filter(QUEUED, LockTimeout(), pk=request.id, times_sent__gt=0)
            store_outcome(row.requeue, settings.JOB_SWEEP_SECONDS)
            raise Ignore("must wait: its worker is shutting down, or runs another suspect")
        limit = request.time_limit or self.time_limit
        run.claim = partial(
            Job.objects.claim,
            id=request.id,
            run_token=run.token,
            worker=request.hostname,
            retries=request.retries,
            crashes=crashes,
            times_sent=headers.get("times_sent", 1),
            limit=timedelta(seconds=limit),
            lease=timedelta(seconds=min(settings.JOB_LEASE_SECONDS, limit)),
        )
        try:
            if not store_outcome(run.claim):
                raise ignore_run(self)
            request.job_run = run
            with run, connection.execute_wrapper(end_interrupted_query):
                return self.run_job(run, args, kwargs)
        finally:
            run.ended = True

    def run_job(self, run, args, kwargs):
        in_block = connection.in_atomic_block  # a test's atomic(), in eager mode: leave it open
        try:
            try:
                run.in_body = True
                result = self.run(*args, **kwargs)
            finally:
                run.in_body = False  # write_and_renew() must not claim the job again
                was_open = not in_block and roll_back_open_transaction()
            if was_open:
                raise TransactionManagementError("The task left a transaction open")
        except Retry as retry:
            if retry.is_eager:  # then Celery's retry() has not called apply_async()
                self.apply_async(retry.sig.args, retry.sig.kwargs, **retry.sig.options)
            if run.retry:
                requeue(run)
            else:
                fail(run, "Retry was raised by hand: call self.retry() to queue the job again")
            raise
        except Ignore:  # raised by the body: the job succeeds without a result
            result = None
        except JobLost:
            raise ignore_run(self) from None
        except WorkerStopping:
            run.store(run.row_with_lock_timeout.requeue)
            raise Ignore("continues in another worker") from None
        except BaseException as error:
            if pool.is_terminated(error):
                if pool.is_shutdown():
                    run.store(run.row_with_lock_timeout.requeue)  # for another worker
                raise  # otherwise the main process counts a crash
            if isinstance(error, SystemExit):
                fail(run, f"The task called sys.exit({error.code!r})")
                # Not SystemExit, which would end the child process or the thread.
                raise RuntimeError("sys.exit() in a task") from error
            fail(run, OVER_TIME_LIMIT if isinstance(error, pool.time_limit_errors) else None)
            raise
        if run.retry:  # with throw=False
            requeue(run)
            raise Ignore("queued again")
        succeed(run, result)
        return result


def ignore_run(task):
    """Return the exception that ends a run whose job is cancelled or belongs to another run.

    If the job is cancelled, Flower gets an event.
    """
    id, app = task.request.id, task.app
    if wait_for(Job.objects.filter(pk=id, state="cancelled").exists):
        logger.info("job %s %s is cancelled", task.name, id)
        if app.conf.worker_send_task_events:
            try:
                task.send_event("task-revoked", terminated=True, signum=None, expired=False)
            except Exception as error:  # each transport has its own exceptions
                logger.warning("Flower will not see that job %s is cancelled: %r", id, error)
    return Ignore("a duplicate message, or its job is cancelled or belongs to another run")


def succeed(run, result):
    try:
        with suppress(SoftTimeLimitExceeded):  # the limit is for the body, which has ended
            json.dumps(result, allow_nan=False)
        changes = {"result": result, "message": run.report.get("message", "")}
        written = run.store(Job.objects.succeed, id=run.job_id, run_token=run.token, **changes)
    except Exception as error:
        fail(run, f"Its result cannot be stored: {error}")
        raise
    if not written:
        raise ignore_run(run.task)


def fail(run, reason=None):
    """Store that the job failed, for this reason or with the text of the exception being handled."""
    error = sys.exception()
    failure = describe(error)
    if isinstance(error, JobError):
        reason = reason or str(error)
    if reason:
        reason = failure["error"] = printable(reason)
    failed = {
        **run.report,
        "error": failure["error"],
        "public_error": reason or "",
        "failure": failure,
    }
    run.store(run.row_with_lock_timeout.finish, "failed", **failed)


def requeue(run):
    try:
        changes = run.retry
        changes["args"], changes["kwargs"], _ = as_json(changes["args"], changes["kwargs"])
        run.store(run.row_with_lock_timeout.requeue, failure=run.failure, **changes)
    except Exception as error:  # for example, arguments that are not JSON
        fail(run, f"Its next try cannot be stored: {error}")
        raise


def run_coroutine(task, body):
    """Run the coroutine of a body in an event loop, which has a thread of its own.

    A function that the coroutine passes to sync_to_async() runs in the thread of this call, on its
    database connection. An exception that ends this call, such as that of a time limit, cancels the
    coroutine.
    """
    request, running = task.request, []
    task.cursor  # noqa: B018  read now, because a coroutine cannot query the database

    async def run():
        running.extend([asyncio.get_running_loop(), asyncio.current_task()])
        task.request_stack.push(request)  # each thread has its own stack
        try:
            return await body
        finally:
            task.request_stack.pop()

    try:
        return async_to_sync(run)()
    except BaseException:
        with suppress(RuntimeError, ValueError):  # the coroutine has ended, or did not start
            loop, current = running
            loop.call_soon_threadsafe(current.cancel)
        raise


def end_after_commit():
    """End the body as soon as its transaction, if any, is committed.

    Not if it has called on_commit() after that: Django would forget these functions. Not in a
    transaction without atomic(), where on_commit() is not allowed. Then a later report() tries again.
    """
    hooks = connection.run_on_commit

    def end():
        if not hooks:
            raise WorkerStopping

    with suppress(TransactionManagementError):
        transaction.on_commit(end)


def query_own_row(run, query, *args, **kwargs):
    """Run a query on this run's row. Raises JobLost if the job was cancelled or belongs to another run.

    If the database has lost the claim in a crash, the job is claimed again and the query repeated.

    Inside a transaction of the body, the query is tried only once, because an error ends the transaction.
    """
    if in_transaction():
        answer = query(*args, **kwargs)
    elif not (answer := wait_for(query, *args, **kwargs)) and run.in_body and wait_for(run.claim):
        answer = wait_for(query, *args, **kwargs)
    if not answer:
        raise JobLost
    return answer


def describe(error, caught=None):
    """Return the fields of a Failure. The traceback is that of `caught`, or else of `error`."""
    try:
        text = "".join(format_exception_only(error)).strip()
        frames = format_exception(caught or error, limit=-20)
    except Exception:  # it cannot be formatted, or it is not an exception
        text, frames = type(error).__name__, []
    traceback = printable("".join(frame[:500] for frame in frames)[-4000:])
    name = f"{type(error).__module__}.{type(error).__qualname__}"[:255]
    return {"error": printable(text), "exception": name, "traceback": traceback}


def printable(text):
    """Return at most 10,000 characters that PostgreSQL accepts: without NUL, with ? for surrogates."""
    return str(text)[:10_000].replace("\0", "").encode(errors="replace").decode()
