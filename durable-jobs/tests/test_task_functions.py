"""Task functions: however one ends, its job gets one outcome, and its worker survives."""

import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress

import psycopg
import pytest
from celery import shared_task, signals
from celery.exceptions import Retry, SoftTimeLimitExceeded
from django.db import (
    Error,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    connection,
    transaction,
)
from helpers import act, add, deliver, errors, run
from psycopg.errors import ProgramLimitExceeded, ReadOnlySqlTransaction

from durable_jobs import database, pools, transitions
from durable_jobs.enqueue import enqueue
from durable_jobs.exceptions import JobError
from durable_jobs.models import Job
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask, time_limit=1)
def short(x):
    return x


def test_a_result_is_stored():
    job = deliver(enqueue(add, [1, 2]))
    assert (job.state, job.result, job.error) == ("succeeded", 3, "")
    assert (job.progress, job.message) == (100, "adding")
    assert job.created_at <= job.started_at <= job.finished_at


def test_a_job_task_that_is_called_runs_as_a_plain_task():
    assert add(1, 2) == 3
    act.function = lambda task: [task.report(1, 2, cursor=7), task.cursor]
    assert act() == [None, None]
    assert not Job.objects.exists()


@pytest.mark.parametrize("error, level", [(JobError, "INFO"), (ValueError, "ERROR")])
def test_a_refusal_is_not_logged_as_an_error(error, level, caplog):
    """Sentry, too, ignores exceptions that the task's attribute `throws` names."""
    caplog.set_level("INFO", "celery.app.trace")

    def function(task):
        raise error("no")

    assert run(function).state == "failed"
    logs = [each for each in caplog.records if each.name == "celery.app.trace"]
    assert [each.levelname for each in logs] == [level]


@pytest.mark.parametrize("text, stored", [("bad", "bad"), ("b\0ad", "bad"), ("b\ud800d", "b?d")])
def test_an_error_is_stored_without_characters_that_a_database_refuses(text, stored, caplog):
    caplog.set_level("CRITICAL", "celery.app.trace")  # pytest-xdist can't send \ud800

    def function(task):
        task.report(30, message=text)
        raise ValueError(text)

    job = run(function)
    assert (job.state, job.error) == ("failed", f"ValueError: {stored}")
    assert (job.progress, job.message) == (30, stored)
    traceback = job.failures.get().traceback
    assert traceback.endswith(f"raise ValueError(text)\nValueError: {stored}\n")


@pytest.mark.parametrize("result", [object(), float("nan"), {"a": {1}}, "x" * 1_000_000], ids=type)
def test_a_result_that_cannot_be_stored_fails_the_job(result):
    job = run(lambda task: result)
    assert job.state == "failed"
    assert job.error.startswith("Its result can't be stored: ")
    assert job.public_error == "Its result can't be stored"  # a database's error names tables


def test_a_task_function_that_calls_sys_exit_fails_and_its_worker_survives():
    job = run(lambda task: sys.exit("bye"))
    assert (job.state, job.error) == ("failed", "The task called sys.exit('bye')")


def nested():
    result = []
    for _ in range(100_000):
        result = [result]
    return result


class ErrorWithoutText(Exception):
    def __str__(self):
        raise ValueError

    __repr__ = __str__


def raise_error_without_text():
    raise ErrorWithoutText


def raise_unprintable_error():
    raise SyntaxError("bad", ("file", 1, 2, 3))


def raise_retry():
    raise Retry


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (nested, "Its result can't be stored: "),
        (raise_error_without_text, "ErrorWithoutText"),
        (raise_unprintable_error, "SyntaxError"),
        (raise_retry, "Retry was raised directly"),
    ],
)
def test_a_task_function_with_an_unusual_end_fails_once(function, error):
    job = run(lambda task: function())
    assert (job.state, job.crashes) == ("failed", 0)
    assert error in job.error
    assert errors(job) == [job.error]


def fall(depth):
    if not depth:
        raise ValueError("long" * 10_000)
    fall(depth - 1)


def chain_errors(depth):
    try:
        fall(depth) if depth < 9_900 else chain_errors(depth - 1)
    except ValueError as error:
        raise ValueError("long" * 10_000) from error


@pytest.mark.parametrize("function", [fall, chain_errors])
def test_a_long_error_and_traceback_are_shortened(function):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        job = run(lambda task: function(10_000))
    finally:
        sys.setrecursionlimit(limit)
    failure = job.failures.get()
    assert failure.error == ("ValueError: " + "long" * 1000)[:1000]
    assert 'raise ValueError("long" * 10_000)' in failure.traceback
    assert len(failure.traceback) <= 4000


@pytest.mark.parametrize("call", [lambda task: task.cursor, lambda task: task.report(1)])
def test_a_report_in_a_thread_of_the_task_function_is_refused(call):
    """It would be lost without an error."""

    def function(task):
        with ThreadPoolExecutor() as threads:
            return threads.submit(call, task).result()

    assert run(function).error.startswith(
        "RuntimeError: report(), step(), enqueue_next() and cursor"
    )
    with ThreadPoolExecutor() as threads:
        assert threads.submit(call, act).result() is None  # no job runs


# Time limits


def test_a_task_may_have_a_shorter_time_limit_than_the_settings(commit):
    with commit():
        job = enqueue(short, [1])
    job.refresh_from_db()
    assert job.state == "succeeded"


def test_a_task_function_over_its_soft_time_limit_fails():
    def function(task):
        raise SoftTimeLimitExceeded

    job = run(function)
    assert (job.state, job.error) == ("failed", "Exceeded its time limit")


@shared_task(base=JobTask, bind=True, autoretry_for=(SoftTimeLimitExceeded,), max_retries=1)
def sleep_in_a_query(self, in_block):
    block = transaction.atomic() if in_block else nullcontext()
    with block, connection.cursor() as cursor:
        cursor.execute("UPDATE durable_jobs_job SET message = 'in the query'")
        if pools.IS_GEVENT:
            pools.gevent.Timeout.start_new(0.3, SoftTimeLimitExceeded)
        else:
            threading.Timer(0.3, signal.raise_signal, [signal.SIGUSR1]).start()
        cursor.execute("SELECT pg_sleep(600)")


@pytest.fixture
def soft_limit():
    """Raise SoftTimeLimitExceeded at the signal of a soft time limit, as in a prefork child."""

    def end(*args):
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGUSR1, end)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("in_block", [False, True], ids=["autocommit", "atomic"])
def test_a_soft_time_limit_during_a_query_retries_or_fails_a_job(soft_limit, in_block):
    """It is cancelled: its lock on the job's row would keep out the outcome."""
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL has a query that waits: set DATABASE_URL=postgres://…")
    job = deliver(enqueue(sleep_in_a_query, [in_block]))
    assert (job.state, job.error) == ("failed", "Exceeded its time limit")
    assert (job.retries, job.crashes, len(errors(job))) == (1, 0, 2)


# The database


def leave_autocommit_off(task):
    transaction.set_autocommit(False)
    Job.objects.filter(pk=task.request.id).update(message="lost")


def leave_a_block(task):
    transaction.atomic().__enter__()
    Job.objects.filter(pk=task.request.id).update(message="lost")


def leave_a_begin(task):
    connection.cursor().execute("BEGIN")
    Job.objects.filter(pk=task.request.id).update(message="lost")


def leave_an_error(task):
    leave_a_begin(task)
    with suppress(Error):
        connection.cursor().execute("no SQL")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "leave", [leave_autocommit_off, leave_a_block, leave_a_begin, leave_an_error]
)
def test_a_task_function_that_leaves_a_transaction_open_fails_no_later_job(leave):
    job = run(leave)
    if (
        connection.vendor == "postgresql" or leave is not leave_autocommit_off
    ):  # SQLite would commit it
        assert (job.state, job.message) == ("failed", "")
        assert job.error.endswith("The task left a transaction open")
    assert not database.in_transaction()
    assert run(lambda task: None).state == "succeeded"


def give_up_rights():
    connection.cursor().execute("SET SESSION AUTHORIZATION pg_monitor")


def raise_without_tables():
    connection.cursor().execute("SET search_path TO nowhere")
    raise JobError("no")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda: connection.cursor().execute("SET search_path TO nowhere"), "search_path or role"),
        (give_up_rights, "search_path or role"),
        (raise_without_tables, "no"),
    ],
)
def test_a_task_function_that_changes_its_connection_fails_with_the_cause(function, error):
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has neither roles nor a search_path: set DATABASE_URL=postgres://…")
    job = run(lambda task: function() and None)
    assert (job.state, job.crashes) == ("failed", 0)
    assert error in job.public_error
    assert run(lambda task: None).state == "succeeded"


@pytest.mark.django_db(transaction=True)
def test_a_task_function_that_survives_a_lost_connection_succeeds():
    if connection.vendor == "sqlite":
        pytest.skip("only a connection to PostgreSQL can be lost: set DATABASE_URL=postgres://…")
    assert run(lambda task: connection.connection.close()).state == "succeeded"


@pytest.mark.django_db(transaction=True)  # it opens a new connection
def test_a_result_waits_for_an_unavailable_database(monkeypatch):
    read_only = InternalError()
    read_only.__cause__ = ReadOnlySqlTransaction()
    succeed, errors = transitions.succeed, [OperationalError, InterfaceError, read_only]

    def away(**values):
        if errors:
            raise errors.pop()
        return succeed(**values)

    monkeypatch.setattr(transitions, "succeed", away)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run(lambda task: "done").result == "done" and not errors


# SQLSTATEs of errors after which the same query may succeed
TEMPORARY = "25006 25P03 26000 42P05 0A000 40001 40P01 55P03 57P01 57P02 57P03 08006 53300".split()
ENDS = {"claim": None, "succeed": None, "fail": OSError, "retry": None}


@pytest.mark.django_db(transaction=True)  # it opens a new connection
@pytest.mark.parametrize("state", TEMPORARY)
@pytest.mark.parametrize("end", ENDS)
def test_a_temporary_error_of_postgresql_does_not_end_a_job(monkeypatch, state, end):
    """psycopg's class of each error says which one Django raises: often no OperationalError."""
    cause = psycopg.errors.lookup(state)()
    kinds = IntegrityError, NotSupportedError, ProgrammingError, InternalError, OperationalError
    error = next(kind for kind in kinds if isinstance(cause, getattr(psycopg, kind.__name__)))()
    error.__cause__, errors = cause, [True]

    def refuse(execute, sql, params, many, context):
        is_claim = '"worker" = ' in sql
        if errors and '"run_token" = ' in sql and is_claim == (end == "claim"):
            errors.pop()
            raise error
        return execute(sql, params, many, context)

    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def function(task):
        if end == "retry":
            task.retry(countdown=60, throw=False)  # the test's worker runs no other try
        if ENDS[end]:
            raise ENDS[end]
        return "done"

    with connection.execute_wrapper(refuse):
        job = run(function)
    assert not errors
    assert job.state == {"fail": "failed", "retry": "queued"}.get(end, "succeeded")


def test_a_value_that_is_too_large_for_the_database_is_not_retried_for_ever():
    too_large = OperationalError()
    too_large.__cause__ = ProgramLimitExceeded()
    assert not database.may_succeed_later(too_large)
    assert database.may_succeed_later(OperationalError())


@shared_task(base=JobTask, throws=(KeyError,))
def raise_error(name):
    raise {"JobError": JobError, "KeyError": KeyError, "OSError": OSError}[name]("no")


@pytest.mark.parametrize(
    ("name", "is_reported"), [("JobError", 0), ("KeyError", 0), ("OSError", 1)]
)
def test_an_expected_end_of_a_job_is_no_error_for_its_listeners(name, is_reported, caplog):
    """Celery's log, and a listener such as Sentry's, which passes on what `throws` names."""
    reported = []

    def report(sender, exception, **kwargs):
        if not isinstance(exception, sender.throws):
            reported.append(exception)

    with caplog.at_level("INFO"):
        signals.task_failure.connect(report)
        job = deliver(enqueue(raise_error, [name]))
        signals.task_failure.disconnect(report)
    assert job.state == "failed" and len(reported) == is_reported
    assert any(record.levelname == "ERROR" for record in caplog.records) == is_reported
