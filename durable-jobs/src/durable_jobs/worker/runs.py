"""One run of a job: it claims the row, keeps what its function reports, and writes how that ended."""

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
from celery.exceptions import Ignore, SoftTimeLimitExceeded
from django.db import ProgrammingError, transaction

from durable_jobs import admission, batches, conf, pauses, transitions
from durable_jobs.database import in_transaction, timeouts, wait_for, wait_past_soft_limit
from durable_jobs.exceptions import JobError, JobLost
from durable_jobs.models import Batch, Job
from durable_jobs.pools import pool
from durable_jobs.publish import publish
from durable_jobs.states import UNFINISHED
from durable_jobs.transitions import lease_end
from durable_jobs.validation import MAX_RESULT_BYTES, as_json, check_size, printable, to_json

logger = logging.getLogger(__name__)

OVER_TIME_LIMIT = "Exceeded its time limit"
UNREAD = object()  # a value that must be read from the database


class Process:
    """The runs of this process."""

    def __init__(self):
        self.runs = {}  # {token: Run} of those whose functions run
        self.suspect = None  # the Run whose job fails at its next crash: see become_suspect()
        self.lock = pool.Lock()
        self.renews_leases = False  # whether its thread has started
        self.is_prefork = False  # whether this worker has child processes

    def has_run_of(self, task):
        return any(run.task is task for run in tuple(self.runs.values()))


process = Process()


class Run:
    """One run of a job. It owns the job as long as `Job.run_token` is its token.

    Use it as a context manager: the lease is renewed inside the block. `request` is Celery's, and `header` what
    messages.fields_in() returns: see message_of().
    """

    def __init__(self, task, request, header):
        self.task, self.job_id = task, request.id
        # The worker's main process has chosen it: see children.py.
        self.token = header.get("run_token") or uuid.uuid4()
        self.batch_id, self.limit_key = header.get("batch"), header.get("limit_key")
        self.results_of = header.get("results_of")
        self.claim_fields = {
            "id": self.job_id,
            "run_token": self.token,
            "worker": request.hostname,
            "retries": request.retries,
            "crashes": header["crashes"],
            "time_limit": timedelta(seconds=task.time_limit),
            "lease": timedelta(seconds=conf.LEASE_SECONDS),
        }
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
        self.retry = None  # after retry(): arguments of transitions.requeue()
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
        return admission.claim(self.limit_key, **self.claim_fields)

    def put_back_if_paused(self):
        """After a claim that has failed, put the job back if it is paused. Returns whether it was."""
        row = Job.objects.filter(*timeouts(), pk=self.job_id)
        is_paused = wait_past_soft_limit(pauses.put_back, row)
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
        """Renew the lease when a third of it has passed, and soon after the deadline: see lease_end()."""
        now = time.monotonic()
        times = [now + conf.LEASE_SECONDS / 3, self.late_at]
        self.renew_at = min(at for at in times if at > now)

    def read_cursor(self):
        if self.cursor is UNREAD:
            [self.cursor] = self.query_or_lose(list, self.row.values_list("cursor", flat=True))
        return self.cursor

    def read_batch(self):
        if self.batch is UNREAD:
            rows = Batch.objects.filter(pk=self.batch_id).defer("on_success", "on_finish")
            self.batch = self.query_or_lose(rows.first) if self.batch_id else None
        return self.batch

    def write_cursor(self, cursor):
        to_json(cursor)  # raises if it cannot be stored: PostgreSQL's error would end a transaction
        self.store(cursor=cursor)
        self.cursor = UNREAD  # the function's transaction may roll back

    def store(self, **changes):
        """Store these changes with the report, and renew the lease."""
        changes |= {"sweep_at": lease_end(), **self.report}
        self.query_or_lose(self.row.update, **changes)
        if not in_transaction():
            self.stored_report = self.report  # renew_leases() need not write it again

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
        self.change(transitions.finish, "failed", failure=failure, **self.report, **texts)
        self.end_batch()

    def try_again(self):
        """Queue the job as retry() said. Raises an error if its new arguments cannot be stored."""
        try:
            changes = {**self.report, **self.retry, "public_error": self.public_error}
            changes["args"], changes["kwargs"] = as_json(changes["args"], changes["kwargs"])
            self.change(transitions.requeue, failure=self.failure, **changes)
        except Exception as error:  # for example, arguments that are not JSON
            self.fail("Its retry can't be stored", f": {error}")
            raise

    def end_batch(self):
        if self.batch_id:
            pool.query(batches.try_to_end, self.batch_id)

    def release(self):
        """Release the job: queue it for another worker."""
        self.change(transitions.requeue)

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
