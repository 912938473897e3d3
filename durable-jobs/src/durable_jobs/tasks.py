"""JobTask: what delay(), retry() and report() do with a job's row, and how a worker runs a body."""

import asyncio
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import wraps
from inspect import getattr_static, iscoroutinefunction
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async
from celery.contrib.django.task import DjangoTask
from celery.exceptions import Ignore, Retry
from django.db import connection
from django.db.transaction import TransactionManagementError

from . import batches, conf, limits, tracing, turns, updates
from .celery import NO_CANVAS, check_options
from .database import (
    end_interrupted_query,
    roll_back_open_transaction,
    wait_for,
    wait_past_soft_limit,
)
from .expressions import LOCK_TIMEOUT, QUEUED
from .lease import start_thread
from .models import Batch, Job
from .pools import pool, shutting_down
from .queryset import MAX_COUNTDOWN, insert, new_fields, seconds_until
from .results import JobResult, job_backend
from .runs import OVER_TIME_LIMIT, JobError, JobLost, Run, describe, for_owner, runs
from .shutdown import WorkerStopping, child_has_crashed, end_after_commit
from .values import printable

__all__ = ["JobCall", "JobError", "JobTask"]


@dataclass(frozen=True)
class JobCall:
    """A task and the options of its next jobs. Made by JobTask.using()."""

    _task: "JobTask"
    _options: dict

    def enqueue(self, *args, **kwargs) -> Job:
        """Enqueue a job with these arguments. Returns the Job: see Job.objects.enqueue()."""
        return Job.objects.enqueue(self._task, args, kwargs, **self._options)

    aenqueue = sync_to_async(enqueue)


class JobTask(DjangoTask):
    """The base class of tasks that are jobs: @shared_task(base=JobTask, bind=True).

    delay(), apply_async() and everything that calls them enqueue a job. If an app that is not a
    durable_jobs.celery.Celery sends it by name, a worker stores the job. A task that is called directly runs as a
    plain function. After a crash the body runs again, so it must be safe to repeat.
    """

    abstract = True
    _is_job = True  # checked by Job.objects.enqueue()
    acks_late = False  # the row survives a crash, so acknowledge the message at once
    retry_on_worker_lost = False  # the row counts crashes
    ignore_result = True  # the row has the result
    owner_may_run_again = False  # a job that failed or was cancelled, through the API
    limit: str | None = None  # the key of its limit, such as "tenant:{tenant_id}": see limits.py

    @property
    def _current_run(self):
        run = getattr(self.request, "run", None)
        return run if isinstance(run, Run) else None  # Celery puts a header "run" there, too

    @classmethod
    def bind(cls, app):
        """Give a task with its own time limit nine tenths of it as soft limit, not that of the settings.

        It happens here, because super().bind() fills in the limits of the settings.
        """
        if cls.time_limit and not cls.soft_time_limit:
            cls.soft_time_limit = cls.time_limit * 0.9
        return super().bind(app)

    @classmethod
    def on_bound(cls, app):
        """Raise TypeError for options that a job cannot have, and prepare the time limits.

        A soft time limit above the hard one is lowered.
        """
        for name in ("before_start", "exchange", "expires", "routing_key"):
            if getattr(cls, name, None) != getattr(DjangoTask, name, None):
                raise TypeError(f"{cls.name}: a job cannot have {name}")
        if cls.time_limit and cls.soft_time_limit and cls.soft_time_limit > cls.time_limit:
            cls.soft_time_limit = cls.time_limit * 0.9
        limits.check_template(cls)
        if iscoroutinefunction(cls.run):
            body = getattr_static(cls, "run")  # not yet bound to an instance

            @wraps(cls.run)  # retry() reads its signature
            def run(self, *args, **kwargs):
                return run_coroutine(self, body.__get__(self, cls)(*args, **kwargs))

            cls.run = run  # autoretry_for wraps it next, and would not see an error of a coroutine

    # For callers: Celery's methods

    def apply_async(
        self,
        args=(),
        kwargs=None,
        task_id=None,
        *,
        countdown=None,
        eta=None,
        owner=None,
        label="",
        unique=None,
        idempotency_key=None,
        **options,
    ):
        """Enqueue a job. Returns its AsyncResult.

        `owner`, `label`, `unique` and `idempotency_key` are those of Job.objects.enqueue(). Raises TypeError
        for options that a job cannot have, such as `link` or `expires`.
        """
        times = {"countdown": countdown, "eta": eta}
        if self._current_run and task_id == self.request.id:  # Celery's retry() calls this
            return self._retry_later(args, kwargs, seconds_until(**times), **options)
        check_options(options)
        texts = {"label": label, "queue": options.get("queue")}
        fields = new_fields(self, args or (), kwargs, owner, **texts, **times)
        fields |= {"idempotency_key": idempotency_key, **({"pk": task_id} if task_id else {})}
        return self.AsyncResult(str(insert(Job.objects, fields, unique).pk))

    def using(
        self,
        *,
        owner: Any = None,
        label: str = "",
        queue: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        unique: str | None = None,
        idempotency_key: str | None = None,
    ) -> JobCall:
        """Return the task with options of Job.objects.enqueue(): task.using(owner=user).enqueue(10)."""
        options = {"owner": owner, "label": label, "queue": queue, "countdown": countdown}
        options |= {"eta": eta, "unique": unique, "idempotency_key": idempotency_key}
        return JobCall(self, options)

    def enqueue(self, *args, **kwargs) -> Job:
        """Enqueue a job with these arguments, and no options. Returns the Job."""
        return Job.objects.enqueue(self, args, kwargs)

    aenqueue = sync_to_async(enqueue)

    # These store the row in the caller's transaction too. Celery's own would store it after the commit.
    delay_on_commit = DjangoTask.delay  # which calls self.apply_async()
    apply_async_on_commit = apply_async

    def map(self, *args):
        """Raise TypeError: Celery would call the body many times in one plain task."""
        raise TypeError(f"{self.name}: {NO_CANVAS}")

    starmap = chunks = map

    def AsyncResult(self, task_id, **kwargs):  # noqa: N802
        return JobResult(task_id, backend=job_backend(self.app), app=self.app, **kwargs)

    def retry(
        self,
        args: list | tuple | None = None,
        kwargs: dict | None = None,
        exc: BaseException | None = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options,
    ) -> Retry:
        """Works as Celery documents. The exception is stored in the Failure of this run.

        Until the next try, the owner reads the text of exc=JobError("The address service is down"). Raises
        TypeError for options that a job cannot have.
        """
        check_options(options)
        caught = sys.exception()
        if self._current_run and (exc or caught):
            self._current_run.failure = describe(exc or caught, caught)
            self._current_run.public_error = for_owner(exc or caught)
        retry = super().retry(args, kwargs, exc, False, eta, countdown, max_retries, **options)
        if retry.is_eager:  # then Celery has not called apply_async()
            self.apply_async(retry.sig.args, retry.sig.kwargs, **retry.sig.options)
        if throw:
            raise retry
        return retry

    def _retry_later(self, args, kwargs, countdown, retries, queue=None, **options):
        """Remember the options of retry(). They are stored when the body and its transaction have ended."""
        countdown = min(countdown, MAX_COUNTDOWN)
        changes = {"retries": retries, **({"queue": queue} if queue else {})}
        self._current_run.retry = {"delay": countdown, "args": args, "kwargs": kwargs, **changes}

    def replace(self, sig):
        raise NotImplementedError("a job cannot be replaced: enqueue the other task and return")

    def apply(self, args=None, kwargs=None, headers=None, throw=None, **options):
        """Run a job in eager mode, for send_one(). Raises TypeError for other calls, such as a group's.

        It never raises the body's exception, whatever `throw` says: the row has it.
        """
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
    def cursor(self) -> Any:
        """The last cursor that report() stored, in this run or an earlier one. None if there is none.

        Read it once, at the start of the body. It is None if the task was called directly. Raises
        RuntimeError in a thread that the body has started.
        """
        run = self._own_run()
        return run.read_cursor() if run else None

    def report(
        self, done: float, total: float = 100, message: str | None = "", *, cursor: Any = None
    ) -> None:
        """Show the progress, `done` of `total`, and a line of text. If the job is cancelled, end its body.

        With `cursor`, any JSON value except null, the next run can continue here: after a crash, a deploy
        or a retry, it reads the value from self.cursor. The cursor is stored when this method returns.
        Inside your own atomic() it is stored together with your changes, or not at all. Keep that block
        short, because nobody can cancel the job until the block ends. Raises TypeError or ValueError if the
        cursor is not JSON, RuntimeError in a thread that the body has started.

        If the worker is shutting down, a call with `cursor` ends the body once the cursor is committed.
        The job continues in another worker.
        """
        if run := self._own_run():
            if run.lost:
                raise JobLost
            percent = int(100 * done / total) if total else 100
            message = "" if message is None else printable(message)[:255]
            run.report = {"progress": max(0, min(percent, 100)), "message": message}
            if cursor is not None:
                run.write_cursor(cursor)
                if shutting_down[0]:
                    end_after_commit()

    @property
    def batch(self) -> Batch | None:
        """The batch that this job belongs to, or None. self.batch.enqueue() adds another job to it."""
        run = self._own_run()
        return run.read_batch() if run else None

    def then(
        self,
        task: Any,
        args: list | tuple = (),
        kwargs: dict | None = None,
        *,
        label: str = "",
        queue: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
    ) -> None:
        """Enqueue a job in the transaction that stores the success of this one: exactly one row.

        However often the body runs, only what the last run names is stored. The new job has the same owner,
        and belongs to the same batch. If the task was called directly, the job is enqueued at once. Raises
        the errors of Job.objects.enqueue().
        """
        options = {"label": label, "queue": queue, "countdown": countdown, "eta": eta}
        if run := self._own_run():
            run.next_steps.append([batches.step(task, args, kwargs, **options)])
        else:
            Job.objects.enqueue(task, args, kwargs, **options)

    def _own_run(self):
        if self.request_stack.top is None and any(r.task is self for r in tuple(runs.values())):
            raise RuntimeError(
                "report(), then() and cursor work only in the thread that runs the body: call them there"
            )
        return self._current_run

    # In a worker

    def __call__(self, *args, **kwargs):
        request = self.request
        if request.called_directly or self._current_run:  # the body calls its own task
            return super().__call__(*args, **kwargs)
        headers = request.headers or {}
        if "job" not in headers:  # an app that does not know that this task is a job has sent it
            fields = new_fields(self, args, kwargs) | tracing.current(self.name)
            job, _ = wait_for(Job.objects.get_or_create, fields, pk=request.id)
            headers = {**headers, "limit": job.limit_key}
            if job.held_by:
                pool.query(turns.grant, [job.held_by])
        crashes, limit = headers.get("crashes", 0), request.time_limit or self.time_limit
        run = Run(
            request.id,
            headers.get("run_token"),
            self,
            headers.get("batch"),
            # In eager mode, grant() lets the next job go: here it would run inside of this one.
            None if request.is_eager else headers.get("limit"),
            worker=request.hostname,
            retries=request.retries,
            crashes=crashes,
            times_sent=headers.get("times_sent", 1),
            limit=timedelta(seconds=limit),
            lease=timedelta(seconds=min(conf.LEASE_SECONDS, limit)),
        )
        start_thread()
        is_suspect = crashes and crashes + 1 >= conf.MAX_CRASHES
        if shutting_down[0] or (is_suspect and not run.become_suspect()):
            # Skip a job with times_sent=0: it was queued again after this message was sent.
            row = Job.objects.filter(QUEUED, LOCK_TIMEOUT, pk=request.id, times_sent__gt=0)
            wait_past_soft_limit(updates.requeue, row, conf.SWEEP_SECONDS)
            raise Ignore("must wait: its worker is shutting down, or runs another suspect")
        try:
            if not wait_past_soft_limit(run.claim):
                if run.hold_if_paused():
                    raise Ignore("its queue or its task is paused")
                if not wait_past_soft_limit(run.claim):  # a pause may have ended in between
                    raise run.ignored()
            request.run = run
            with run, connection.execute_wrapper(end_interrupted_query):
                return self._execute(run, args, kwargs)
        finally:
            run.ended = True

    def _execute(self, run, args, kwargs):
        """Run the body, and write how it ended. Returns its result, or raises what Celery expects."""
        try:
            result = self._run_body(run, args, kwargs)
        except Retry:
            if run.retry:
                run.try_again()
            else:
                run.fail("Retry was raised by hand: call self.retry() to queue the job again")
            raise
        except Ignore:  # raised by the body: the job succeeds without a result
            result = None
        except JobLost:
            raise run.ignored() from None
        except WorkerStopping:
            run.hand_back()
            raise Ignore("continues in another worker") from None
        except BaseException as error:
            if pool.is_terminated(error):
                if not child_has_crashed():
                    run.hand_back()
                raise  # after a crash, the main process recovers the job
            if isinstance(error, SystemExit):
                run.fail(f"The task called sys.exit({error.code!r})")
                # Not SystemExit, which would end the child process or the thread.
                raise RuntimeError("sys.exit() in a task") from error
            run.fail(OVER_TIME_LIMIT if isinstance(error, pool.time_limit_errors) else "")
            raise
        if run.retry:  # with throw=False
            run.try_again()
            raise Ignore("queued again")
        run.succeed(result)
        return result

    def _run_body(self, run, args, kwargs):
        """Return the body's result. Raises TransactionManagementError if it left a transaction open."""
        in_block = connection.in_atomic_block  # a test's atomic(), in eager mode: leave it open
        try:
            run.in_body = True
            result = self.run(*batches.fill(args), **kwargs)
        finally:
            run.in_body = False  # write_and_renew() must not claim the job again
            was_open = not in_block and roll_back_open_transaction()
        if was_open:
            raise TransactionManagementError("The task left a transaction open")
        return result


def run_coroutine(task, body):
    """Run the coroutine of a body in an event loop, which has a thread of its own.

    A function that the coroutine passes to sync_to_async() runs in the thread of this call, on its
    database connection. An exception that ends this call, such as that of a time limit, cancels the
    coroutine.
    """
    request, loop, current = task.request, None, None
    if own := task._own_run():
        # Now, because a coroutine cannot query the database.
        own.read_cursor()
        if own.batch_id:
            own.read_batch()

    async def with_request():
        nonlocal loop, current
        loop, current = asyncio.get_running_loop(), asyncio.current_task()
        task.request_stack.push(request)  # each thread has its own stack
        try:
            return await body
        finally:
            task.request_stack.pop()

    try:
        return async_to_sync(with_request)()
    except BaseException:
        with suppress(RuntimeError):  # the loop has ended
            if loop:
                loop.call_soon_threadsafe(current.cancel)
        raise
