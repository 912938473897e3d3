"""One run of a job: it claims the row, calls the function, keeps what that reports, and writes how it ended."""

import json
import logging
import sys
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from functools import partial
from traceback import format_exception, format_exception_only

from celery import signals
from celery.exceptions import Ignore, Retry, SoftTimeLimitExceeded
from django.db import ProgrammingError, connection, transaction
from django.db.transaction import TransactionManagementError

from durable_jobs import admission, batches, conf, transitions
from durable_jobs.database import (
    end_interrupted_query,
    in_transaction,
    roll_back_open_transaction,
    timeouts,
    wait_for,
    wait_past_soft_limit,
)
from durable_jobs.exceptions import OVER_TIME_LIMIT, JobError, JobLost, WorkerStopping
from durable_jobs.messages import fields_in
from durable_jobs.models import Batch, Job
from durable_jobs.pools import pool, shutting_down
from durable_jobs.process import child_has_crashed, process
from durable_jobs.publish import publish
from durable_jobs.states import UNFINISHED
from durable_jobs.validation import MAX_RESULT_BYTES, as_json, check_size, printable, to_json
from durable_jobs.worker.steps import run_step

logger = logging.getLogger(__name__)

UNREAD = object()  # a value that must be read from the database


class Run:
    """One run of a job. It owns the job as long as `Job.run_token` is its token.

    Use it as a context manager: the lease is renewed inside the block. `request` is Celery's, with the header of the
    job: see messages.message_of().
    """

    def __init__(self, task, request):
        self.task, self.request, self.job_id = task, request, request.id
        header = fields_in(vars(request))  # Sentry replaces request.headers
        # The worker's main process has chosen it: see children.py.
        self.token = header.get("run_token") or uuid.uuid4()
        self.batch_id, self.limit_key = header.get("batch"), header.get("limit_key")
        self.crashes, self.results_of = header["crashes"], header.get("results_of")
        self.has_written = False  # whether write() has changed the row
        self.admitted = []  # the job that has its slot now
        self.next_jobs = []  # the plans of enqueue_next()
        self.report = {}  # the latest progress and message
        self.stored_report = self.report  # what is in the row
        self.cursor = self.batch = UNREAD
        self.step_names = frozenset()  # of the steps of this run
        # A second more: in the row, the time limit begins with the claim, which is later than this.
        self.late_at = time.monotonic() + task.time_limit + 1
        self.plan_renewal()
        self.retry = None  # after retry(): arguments of transitions.retry()
        # Why it is retried: the fields of a Failure.
        self.failure = {"error": "The task called retry()", "exception": "celery.exceptions.Retry"}
        self.public_error = ""  # the same, for the owner
        self.is_started = self.is_called = self.lost = self.ended = False

    @property
    def row(self):
        return jobs_of([self]).filter(UNFINISHED)

    def __enter__(self):
        with process.lock:
            process.runs[self.token] = self

    def __exit__(self, *exc_info):
        with process.lock:
            del process.runs[self.token]
        # Unless this run has handed its slot over, the slot may be free now. `admitted` may be left from a try that
        # was rolled back.
        if self.limit_key and not (self.has_written and self.admitted):
            pool.query(admission.after_run, self)

    def claim(self):
        """Claim the job. Returns 0 if it may not start: see transitions.claim()."""
        return admission.claim(
            self.limit_key,
            id=self.job_id,
            run_token=self.token,
            worker=self.request.hostname,
            retries=self.request.retries,
            crashes=self.crashes,
            time_limit=timedelta(seconds=self.task.time_limit),
            lease=timedelta(seconds=conf.LEASE_SECONDS),
        )

    def put_back_if_paused(self):
        """After a claim that has failed, put the job back if it is paused. Returns whether it was."""
        row = Job.objects.filter(*timeouts(), pk=self.job_id)
        is_paused = wait_past_soft_limit(transitions.put_back, row)
        if is_paused and self.limit_key:  # it has lost its slot
            pool.query(admission.admit, [self.limit_key])
        return bool(is_paused)

    def become_suspect(self):
        """Become the suspect of this process, unless there is one. Returns whether it did.

        The job of a suspect fails if its process dies. A process has only one suspect, so that its
        death makes at most one job fail.
        """
        with process.lock:
            suspect = process.suspect
            if suspect is None or suspect.lost or suspect.ended:
                process.suspect = self
            return process.suspect is self

    # What the function does

    def needs_write(self):
        """Return whether to renew its lease or to write a report. A cancelled job with a limit keeps its lease."""
        if self.lost and not self.limit_key:
            return False
        is_due, is_new = time.monotonic() > self.renew_at, self.report != self.stored_report
        return is_due or (is_new and not self.lost)

    def plan_renewal(self):
        """Renew the lease when a third of it has passed, and soon after the deadline: see transitions.renewed()."""
        now = time.monotonic()
        times = [now + conf.LEASE_SECONDS / 3, self.late_at]
        self.renew_at = min(at for at in times if at > now)

    def call(self, call, args, kwargs):
        """Call the function, and write how it ended. Returns its result, or raises what Celery expects."""
        self.is_started = True
        with connection.execute_wrapper(end_interrupted_query):
            return self.call_and_write(call, args, kwargs)

    def call_and_write(self, call, args, kwargs):
        try:
            result = self.call_alone(call, args, kwargs)
        except Retry:
            if self.retry:
                self.try_again()
            else:
                self.fail("Retry was raised directly: call self.retry()")
            raise
        except Ignore:  # raised by the function: the job succeeds without a result
            result = None
        except JobLost:
            raise self.ignored() from None
        except WorkerStopping:
            self.release()
            raise Ignore("will continue in another worker") from None
        except BaseException as error:
            if pool.is_terminated(error):
                if not child_has_crashed():
                    self.release()
                raise  # after a crash, the main process recovers the job
            if isinstance(error, SystemExit):
                self.fail(f"The task called sys.exit({error.code!r})")
                # Not SystemExit, which would end the child process or the thread.
                raise RuntimeError("sys.exit() in a task") from error
            self.fail(OVER_TIME_LIMIT if isinstance(error, pool.time_limit_errors) else "")
            raise
        if self.retry:  # with throw=False
            self.try_again()
            raise Ignore("queued again")
        self.succeed(result)
        return result

    def call_alone(self, call, args, kwargs):
        """Return the function's result. Raises TransactionManagementError if it left a transaction open."""
        in_block = connection.in_atomic_block  # of a test: leave it open
        try:
            if self.results_of:
                args = [wait_for(batches.results_of, self.results_of), *args]
            result = call(*args, **kwargs)
        finally:
            was_open = not in_block and roll_back_open_transaction()
        if was_open:
            raise TransactionManagementError("The task left a transaction open")
        return result

    def read_cursor(self):
        if self.cursor is UNREAD:
            [self.cursor] = self.query_or_lose(list, self.row.values_list("cursor", flat=True))
        return self.cursor

    def read_batch(self):
        if self.batch is UNREAD:
            rows = Batch.objects.filter(pk=self.batch_id).defer("on_success", "on_finish")
            self.batch = self.query_or_lose(rows.first) if self.batch_id else None
        return self.batch

    def write_report(self, done, total, message, cursor):
        if self.lost:
            raise JobLost
        percent = int(100 * done / total) if total else 100
        message = "" if message is None else printable(message)[:255]
        self.report = {"progress": max(0, min(percent, 100)), "message": message}
        if cursor is not None:
            self.write_cursor(cursor)
            end_if_stopping()

    def step(self, name, function, args, kwargs):
        result = run_step(self, name, function, args, kwargs)
        end_if_stopping()
        return result

    def write_cursor(self, cursor):
        to_json(cursor)  # raises if it cannot be stored: PostgreSQL's error would end a transaction
        self.store(cursor=cursor)
        self.cursor = UNREAD  # the function's transaction may roll back

    def store(self, **changes):
        """Store these changes with the report, and renew the lease."""
        self.query_or_lose(transitions.report, self.row, **changes, **self.report)
        if not in_transaction():
            self.stored_report = self.report  # renew_leases() need not write it again

    def fails_with(self, error, caught):
        """Remember why it is retried."""
        self.failure, self.public_error = describe(error, caught), for_owner(error)

    def query_or_lose(self, query, *args, **kwargs):
        """Run a query on the row of the job or its batch.

        Raises JobLost if it finds none: the job was cancelled or belongs to another run.

        Inside a transaction of the function, the query is tried only once, because an error ends the
        transaction.
        """
        answer = query(*args, **kwargs) if in_transaction() else wait_for(query, *args, **kwargs)
        if not answer:
            raise JobLost
        return answer

    # How it ends

    def succeed(self, result):
        """Write the result. Raises an error if it cannot be stored, and Ignore if the job is lost."""
        end = {"result": result, "message": self.report.get("message", "")}
        try:
            with suppress(SoftTimeLimitExceeded):  # the limit is for the function, which has ended
                text = json.dumps(result, allow_nan=False)
                check_size("it has", text, MAX_RESULT_BYTES, "store a file, and return its name")
            key = {"id": self.job_id, "run_token": self.token, "next_jobs": self.next_jobs}
            written = self.write(batches.succeed, **key, **end)
        except Exception as error:
            cause = "Its result can't be stored"
            if isinstance(error, ProgrammingError):  # no such table, or no right to it
                cause = "The task changed its connection's search_path or role"
            self.fail(cause, f": {error}")
            raise
        if not written:
            raise self.ignored()
        self.end_batch()

    def fail(self, public_error="", detail=""):
        """Write that the job failed with the exception being handled, and this text for its owner.

        Only staff read the `detail` that follows it.
        """
        error = sys.exception()
        failure = describe(error)
        if public_error := printable(public_error) or for_owner(error):
            failure["error"] = public_error + printable(detail)
        texts = {"error": failure["error"], "public_error": public_error}
        self.change(transitions.fail, failure, **self.report, **texts)
        self.end_batch()

    def try_again(self):
        """Queue the job as retry() said. Raises an error if its new arguments cannot be stored."""
        try:
            changes = {**self.report, **self.retry, "public_error": self.public_error}
            changes["args"], changes["kwargs"] = as_json(changes["args"], changes["kwargs"])
            self.change(transitions.retry, self.failure, **changes)
        except Exception as error:  # for example, arguments that are not JSON
            self.fail("Its retry can't be stored", f": {error}")
            raise

    def end_batch(self):
        if self.batch_id:
            pool.query(batches.try_to_end, self.batch_id)

    def release(self):
        """Release the job: queue it for another worker."""
        self.change(transitions.release)

    def change(self, transition, *args, **changes):
        """Call write() with a function of transitions.py, for the row of this run. If the row is locked, try again."""
        write = partial(self.write, transition, self.row.filter(*timeouts()), *args, **changes)
        try:
            write()
        except ProgrammingError:  # see succeed(). Now there is a new connection.
            write()

    def write(self, update, *args, **kwargs):
        """Call update(…), which writes how the function ended. With a limit, hand the slot over, too.

        Returns 0 if the run has lost its job.
        """
        if self.limit_key:
            update = partial(self.hand_over, update)
        written = wait_past_soft_limit(update, *args, **kwargs)
        self.has_written = bool(written)
        publish(self.admitted)
        return written

    @transaction.atomic
    def hand_over(self, update, *args, **kwargs):
        """Call update(…), and let the next job with the same limit have the slot, in one transaction."""
        # If nothing is written, the run has lost its job, or an earlier try was committed and its answer was lost. Then
        # self.admitted is what that try has admitted: its message must still be sent.
        if written := update(*args, **kwargs):
            self.admitted = admission.hand_over(self.limit_key)
        return written

    def ignored(self):
        """Return the exception that ends a run whose job is cancelled or belongs to another run.

        If the job is cancelled, Flower gets an event and, if its function has run, the project a signal.
        """
        task, id = self.task, self.job_id
        if wait_for(Job.objects.filter(pk=id, state="cancelled").exists):
            logger.info("job %s %s is cancelled", task.name, id)
            if task.app.conf.worker_send_task_events:
                with suppress(Exception):  # each transport has its own
                    task.send_event("task-revoked", terminated=True, signum=None, expired=False)
            if self.is_started:
                sent = {"terminated": True, "signum": None, "expired": False}
                signals.task_revoked.send(sender=task, request=task.request, **sent)
        return Ignore("a duplicate message, or its job is cancelled or belongs to another run")


def end_if_stopping():
    """If this worker shuts down, end the function as soon as its transaction, if any, is committed.

    If the function has called on_commit() after this, an exception would make Django forget that callback: a later
    report() tries again. The same after set_autocommit(False), where on_commit() is not allowed.
    """
    hooks = connection.run_on_commit  # Django takes each from this list before it calls it

    def end():
        if not hooks:
            raise WorkerStopping

    if shutting_down.value:
        with suppress(TransactionManagementError):
            transaction.on_commit(end)


def jobs_of(some_runs):
    """Return the rows that have the tokens of these runs, also of cancelled jobs with a limit."""
    tokens = [run.token for run in some_runs]
    return Job.objects.filter(pk__in=[run.job_id for run in some_runs], run_token__in=tokens)


def for_owner(error):
    """Return the text of this exception that the owner of the job may read."""
    return printable(str(error)) if isinstance(error, JobError) else ""


def describe(error, caught=None):
    """Return the fields of a Failure. The traceback is that of `caught`, or else of `error`."""
    try:
        text = for_owner(error) or "".join(format_exception_only(error)).strip()
        frames = format_exception(caught or error, limit=-20)
    except Exception:  # it cannot be formatted, or it is not an exception
        text, frames = type(error).__name__, []
    traceback = printable("".join(frame[:500] for frame in frames)[-4000:])
    name = f"{type(error).__module__}.{type(error).__qualname__}"[:255]
    return {"error": printable(text), "exception": name, "traceback": traceback}
