"""The ledger: what a job's row promises, whatever happens to its message or its worker.

Nothing here needs a broker: in eager mode publish([job]) runs the job at once. A test that checks a
job between its publishing and its run uses the fixture `published`, a broker without workers.
"""

import itertools
import re
import signal
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from math import nan
from queue import SimpleQueue
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from celery import chain, exceptions, group, shared_task
from celery import current_app as app
from celery.app import routes
from celery.exceptions import Retry, SoftTimeLimitExceeded
from celery.worker.control import Panel
from django.apps import apps as django_apps
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import (
    DatabaseError,
    IntegrityError,
    InterfaceError,
    InternalError,
    OperationalError,
    connection,
    transaction,
)
from django.db.models import ProtectedError, RestrictedError
from django.db.models.functions import Now
from django.db.models.signals import pre_delete
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from kombu import Connection
from psycopg.errors import ProgramLimitExceeded, ReadOnlySqlTransaction

from jobs import (
    conf,
    database,
    events,
    lease,
    liveness,
    messages,
    pools,
    publish,
    queryset,
    runs,
    shutdown,
    sweep,
    updates,
    worker,
)
from jobs.beat import watch_ticks
from jobs.expressions import SetLocal, lease_end
from jobs.metrics import Collector
from jobs.models import Failure, Job, Sweep
from jobs.queryset import JobQuerySet
from jobs.tasks import JobTask

pytestmark = pytest.mark.django_db

IDLE = "idle_in_transaction_session_timeout"
CLAIM = {  # arguments of a claim by a job's first message
    "worker": "",
    "retries": 0,
    "crashes": 0,
    "times_sent": 1,
    "limit": timedelta(seconds=60),
    "lease": timedelta(seconds=30),
}


@shared_task(base=JobTask, time_limit=1)
def short(x):
    return x


@shared_task(base=JobTask, time_limit=580)
def limited():
    pass


@shared_task(base=JobTask, time_limit=580, soft_time_limit=540)
def limited_twice():
    pass


@shared_task(base=JobTask, bind=True)
def add(self, x, y):
    self.report(1, 2, "adding")
    return x + y


@shared_task(
    base=JobTask,
    bind=True,
    autoretry_for=(OSError,),
    retry_backoff=10,
    retry_jitter=False,
    max_retries=2,
)
def flaky(self, failures):
    if self.request.retries < failures:
        raise OSError("away")


@shared_task(base=JobTask, bind=True)
def act(self):
    return act.body(self)


@shared_task
def plain():
    pass


def run(body):
    """Enqueue and run a job that calls body(task). Return the job as it is afterwards."""
    act.body = body
    return deliver(Job.objects.enqueue(act))


def deliver(job):
    publish.publish([job])
    job.refresh_from_db()
    return job


def start(job, limit=60):
    """Claim the job for a worker that then disappears."""
    message = {"retries": job.retries, "crashes": job.crashes}
    assert claim(job.pk, limit=timedelta(seconds=limit), **message)
    lapse(job)


def claim(pk, run=None, **message):
    """Claim a job with a message that has these fields. Return what claim() returns."""
    return updates.claim(Job.objects, id=pk, run_token=run or uuid.uuid4(), **CLAIM | message)


def lapse(*jobs):
    """Make these jobs due for the sweep, in this order."""
    for place, job in enumerate(jobs):
        past = Now() - timedelta(seconds=1000 - place)
        Job.objects.filter(pk=job.pk).update(sweep_at=past)


def seconds_until_due(job):
    job.refresh_from_db()
    return (job.sweep_at - timezone.now()).total_seconds()


@pytest.fixture
def published(monkeypatch):
    """A broker without workers: a list of ids, one for each message in it.

    To lose a message, remove its id.
    """
    waiting = []

    def publish(job, producer, **options):
        waiting.append(str(job.pk))

    monkeypatch.setattr(messages, "send_one", publish)
    monkeypatch.setattr(sweep, "messages_in", lambda queue, broker: len(waiting))
    return waiting


# Enqueueing


def test_a_job_runs_when_its_transaction_commits(commit):
    with commit():
        job = Job.objects.enqueue(add, [1], {"y": 2})
        assert job.state == "queued"
    job.refresh_from_db()
    assert (job.state, job.result) == ("succeeded", 3)


def test_a_rollback_leaves_neither_row_nor_message(commit, published):
    with commit(), pytest.raises(ZeroDivisionError), transaction.atomic():
        Job.objects.enqueue(add, [1, 2])
        raise ZeroDivisionError
    assert not Job.objects.exists()
    assert published == []


@pytest.mark.parametrize(
    "task, args",
    [(add, [1]), (add, [1, 2, 3]), (add, [1, object()]), (add, [1, nan]), (plain, []), (len, [])],
    ids=["too few arguments", "too many", "not JSON", "NaN", "a task that is no job", "no task"],
)
def test_a_job_that_cannot_run_is_refused_when_it_is_enqueued(task, args):
    with pytest.raises(TypeError):
        Job.objects.enqueue(task, args)
    assert not Job.objects.exists()


@pytest.mark.parametrize("args, kwargs", [(12, {}), ("12", {}), ({1: 2}, {}), ([], [1, 2])])
def test_arguments_must_be_a_list_and_a_dictionary(args, kwargs):
    with pytest.raises(TypeError, match="args must be a list"):
        Job.objects.enqueue(add, args, kwargs)
    assert not Job.objects.exists()


def test_a_task_may_have_a_shorter_time_limit_than_the_settings(commit):
    with commit():
        job = Job.objects.enqueue(short, [1])
    job.refresh_from_db()
    assert job.state == "succeeded"


@pytest.mark.parametrize("owned", [True, False])
def test_an_owner_uses_an_idempotency_key_once(user, owned):
    owner = user if owned else None
    Job.objects.enqueue(add, [1, 2], owner=owner, idempotency_key="key")
    with pytest.raises(IntegrityError), transaction.atomic():
        Job.objects.enqueue(add, [3, 4], owner=owner, idempotency_key="key")
    assert Job.objects.count() == 1


def test_two_owners_may_use_the_same_idempotency_key(user, admin_user):
    Job.objects.enqueue(add, [1, 2], owner=user, idempotency_key="key")
    Job.objects.enqueue(add, [1, 2], owner=admin_user, idempotency_key="key")


def test_a_unique_key_has_one_active_job(published):
    first = Job.objects.enqueue(add, [1, 2], unique="key")
    assert Job.objects.enqueue(short, [3], unique="key") == first
    start(first)
    assert Job.objects.enqueue(add, [1, 2], unique="key").state == "running"
    others = [Job.objects.enqueue(add, [1, 2], unique=unique) for unique in ("other", None, None)]
    assert Job.objects.count() == 1 + len(others)
    Job.objects.filter(pk=first.pk).cancel()
    assert Job.objects.enqueue(add, [1, 2], unique="key").state == "queued"


def call_concurrently(count, function):
    """Call a function in `count` threads at once, each with its own connection. Return a list."""
    barrier = threading.Barrier(count)

    def call(number):
        try:
            connection.ensure_connection()
            barrier.wait(20)
            return function()
        finally:
            connection.close()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("block", [nullcontext, transaction.atomic])
def test_concurrent_calls_with_a_unique_key_get_one_job(block):
    def enqueue():
        with block():
            job = Job.objects.enqueue(add, [1, 2], unique="key", countdown=60)
            return Job.objects.get(pk=job.pk).pk  # the transaction still works

    assert set(call_concurrently(20, enqueue)) == {Job.objects.get().pk}


@pytest.mark.django_db(transaction=True)
def test_concurrent_calls_with_a_unique_key_all_get_a_job_that_runs():
    """Some of the jobs end while other threads read them."""

    def enqueue():
        return [Job.objects.enqueue(add, [1, 2], unique="key").pk for _ in range(10)]

    jobs = {pk for pks in call_concurrently(20, enqueue) for pk in pks}
    assert set(Job.objects.values_list("pk", "state")) == {(pk, "succeeded") for pk in jobs}


def test_a_conflicting_job_that_ends_before_it_is_read_frees_its_unique_key(monkeypatch):
    other, get = Job.objects.enqueue(add, [1, 2], unique="key"), JobQuerySet.get
    # Called before each read, from the end of the list: first nothing, because the other job is not
    # committed yet; then the other job ends.
    steps = [lambda: Job.objects.all().cancel(), lambda: None]

    def fail_twice(self, **key):
        if steps:
            steps.pop()()
            raise Job.DoesNotExist
        return get(self, **key)

    monkeypatch.setattr(JobQuerySet, "get", fail_twice)
    job = Job.objects.enqueue(add, [1, 2], unique="key")
    assert set(Job.objects.values_list("pk", "state")) == {
        (other.pk, "cancelled"),
        (job.pk, "queued"),
    }


@pytest.mark.parametrize("conflict", ["idempotency_key", "pk"])
def test_a_unique_key_hides_no_other_conflict(conflict):
    first = Job.objects.enqueue(add, [1, 2], unique="first", idempotency_key="unique_key")
    fields = {**queryset.new_fields(Now(), add, [1, 2]), conflict: getattr(first, conflict)}
    with CaptureQueriesContext(connection) as captured:
        with pytest.raises(IntegrityError), transaction.atomic():
            queryset.insert(Job.objects, fields, "second")
    assert len([each for each in captured if each["sql"].startswith("INSERT")]) == 1


def test_a_unique_key_is_found_outside_of_a_users_jobs(user, admin_user):
    first = Job.objects.enqueue(add, [1, 2], owner=user, unique="key")
    assert admin_user.job_set.enqueue(add, [1, 2], owner=admin_user, unique="key") == first


def test_a_job_of_the_jobs_of_a_user_is_the_users(user):
    user.job_set.enqueue(add, [1, 2])
    user.job_set.enqueue(add, [1, 2], unique="key")
    user.job_set.enqueue_many(add, [[1, 2]])
    assert [job.owner for job in Job.objects.all()] == [user] * 3


@pytest.mark.parametrize("option", ["unique", "idempotency_key", "queue"])
@pytest.mark.parametrize("text", ["x" * 256, 7, "\0"])
def test_a_text_that_does_not_fit_into_its_column_is_refused(option, text):
    """Else PostgreSQL's error would end the caller's transaction."""
    with pytest.raises(ValueError, match="1 to 255 characters|the database cannot store"):
        Job.objects.enqueue(add, [1, 2], **{option: text})


def test_a_unique_key_must_not_be_empty():
    with pytest.raises(ValueError, match="unique= must be a string of 1 to 255 characters"):
        Job.objects.enqueue(add, [1, 2], unique="")


@pytest.mark.django_db(transaction=True)
def test_a_worker_that_freezes_while_it_renews_a_lease_locks_no_job_for_long(monkeypatch):
    if connection.vendor != "postgresql":
        pytest.skip("SQLite locks the whole file: set DATABASE_URL=postgres://…")
    monkeypatch.setattr(updates, "IDLE_TIMEOUT", SetLocal(name=IDLE, value="100ms"))
    job = Job.objects.enqueue(add, [1, 2], countdown=60)
    run = runs.Run(job.pk)
    assert claim(job.pk, run.token)
    frozen, resumed = threading.Event(), threading.Event()

    def freeze():
        frozen.set()
        resumed.wait()
        return Now()

    def renew(function, argument):
        with suppress(DatabaseError):
            function(argument)
        connection.close()

    monkeypatch.setattr(lease, "lease_end", freeze)
    mine = Job.objects.filter(pk=job.pk)
    for renewal in (lease.write_and_renew, [run]), (lease.renew_for_children, mine):
        frozen.clear(), resumed.clear()
        thread = threading.Thread(target=renew, args=renewal)
        thread.start()
        assert frozen.wait(60)
        for _ in range(300):
            with transaction.atomic():
                if free := list(mine.select_for_update(skip_locked=True)):
                    break
            time.sleep(0.1)
        resumed.set()
        thread.join()
        assert free == [job]


def test_a_job_with_a_countdown_is_not_published_before_it_is_due(commit, published):
    with commit():
        job = Job.objects.enqueue(add, [1, 2], countdown=60)
    sweep.send_due()
    assert published == []
    assert seconds_until_due(job) == pytest.approx(60, abs=5)
    lapse(job)
    sweep.send_due()
    assert published == [str(job.pk)]


def test_a_job_stays_queued_and_due_while_the_broker_is_down(broker_down):
    job = Job.objects.enqueue(add, [1, 2])
    assert not publish.publish([job])
    assert seconds_until_due(job) <= 0
    assert (job.state, job.times_sent) == ("queued", 0)


def test_publishing_pauses_after_the_broker_was_found_down(broker_down, monkeypatch):
    first, second = Job.objects.enqueue(add, [1, 2]), Job.objects.enqueue(add, [3, 4])
    publish.publish([first])
    publish.publish([second])
    assert broker_down == [str(first.pk)]
    assert seconds_until_due(second) <= 0
    publish.publish_again_at.clear()
    publish.publish([second])
    assert broker_down == [str(first.pk), str(second.pk)]


def test_a_message_that_the_broker_refuses_delays_no_other(monkeypatch):
    """The connection works, so the next message is sent at once."""
    monkeypatch.setattr(messages, "send_one", Mock(side_effect=[ValueError("too large"), None]))
    refused, other = Job.objects.enqueue(add, [1, 2]), Job.objects.enqueue(add, [3, 4])
    publish.publish([refused])
    publish.publish([other])
    assert seconds_until_due(refused) <= 0 < seconds_until_due(other)


def test_an_unavailable_queue_does_not_stop_publishing_to_others(broker_down):
    jobs = [Job.objects.enqueue(add, [1, 2], queue=queue) for queue in ["cpu", "cpu", "io"]]
    for job in jobs:
        publish.publish([job])
    assert broker_down == [str(jobs[0].pk), str(jobs[2].pk)]


def test_an_unavailable_queue_does_not_delay_jobs_of_others_that_run_again(commit, published):
    jobs = [Job.objects.enqueue(add, [1, 2], queue=queue) for queue in ("down", "up")]
    Job.objects.all().cancel()
    publish.publish_again_at["down"] = time.monotonic() + 60
    with commit():
        again = Job.objects.filter(pk__in=[job.pk for job in jobs]).run_again()
    del publish.publish_again_at["down"]
    assert published == [str(job.pk) for job in again if job.queue == "up"]


def test_a_job_with_an_unknown_task_stays_queued_and_delays_no_other():
    job, other = Job.objects.enqueue(add, [1, 2]), Job.objects.enqueue(add, [1, 2])
    job.task = "to.be.deployed"
    assert deliver(job).state == "queued"
    assert deliver(other).state == "succeeded"


def test_enqueue_many_stores_and_sends_all_jobs_together(commit, published, user):
    with CaptureQueriesContext(connection) as captured, commit():
        jobs = Job.objects.enqueue_many(add, [[1, 2], [3, 4], [5, 6]], owner=user, queue="cpu")
        assert published == []
    assert len([query for query in captured if query["sql"].startswith("INSERT")]) == 1
    assert [(job.args, job.owner, job.queue) for job in Job.objects.order_by("created_at")] == [
        ([number, number + 1], user, "cpu") for number in (1, 3, 5)
    ]
    assert len({job.created_at for job in jobs}) == 3  # pages are ordered by it
    assert published == [str(job.pk) for job in jobs]
    assert all(seconds_until_due(job) == pytest.approx(30, abs=5) for job in jobs)


def test_enqueue_many_runs_all_jobs(commit):
    with commit():
        Job.objects.enqueue_many(add, ([number, 1] for number in range(3)))
    assert [job.result for job in Job.objects.order_by("created_at")] == [1, 2, 3]


def test_enqueue_many_stores_all_jobs_or_none(commit, published):
    with commit(), pytest.raises(TypeError):
        Job.objects.enqueue_many(add, [[1, 2], [3]])
    with commit(), pytest.raises(ZeroDivisionError), transaction.atomic():
        Job.objects.enqueue_many(add, [[1, 2], [3, 4]])
        raise ZeroDivisionError
    assert not Job.objects.exists()
    assert published == []


def test_many_jobs_wait_for_the_broker_or_for_their_countdown(commit, broker_down, monkeypatch):
    monkeypatch.setattr(queryset, "BATCH_SIZE", 2)
    with commit():
        late = Job.objects.enqueue_many(add, [[1, 2]] * 3, countdown=60)
        jobs = Job.objects.enqueue_many(add, [[1, 2]] * 5)
    assert broker_down == [str(jobs[0].pk)]
    assert all(seconds_until_due(job) <= 0 and not job.times_sent for job in jobs)
    assert all(seconds_until_due(job) == pytest.approx(60, abs=5) for job in late)


def test_a_header_of_a_message_is_not_taken_for_a_run():
    """Celery makes each header an attribute of the request."""
    job = Job.objects.enqueue(add, [1, 2])
    headers = {"job": True, "crashes": 0, "times_sent": 1, "run": str(uuid.uuid4())}
    request = {"id": str(job.pk), "hostname": "test", "called_directly": False, **headers}
    add.push_request(headers=headers, **request)
    try:
        add(*job.args)
    finally:
        add.pop_request()
    job.refresh_from_db()
    assert (job.state, job.result) == ("succeeded", 3)


def test_enqueue_many_accepts_an_empty_list(commit):
    with commit():
        assert Job.objects.enqueue_many(add, []) == []


def test_a_job_is_sent_as_a_celery_message():
    app.conf.task_always_eager = False
    job = Job.objects.enqueue(add, [1], {"y": 2}, queue="cpu")
    job.retries = 3
    with app.connection_for_write("memory://") as broker:
        messages.send_one(job, app.amqp.Producer(broker, auto_declare=False))
        message = app.amqp.queues["cpu"](broker.default_channel).get()
    assert message.payload[:2] == [[1], {"y": 2}]
    kept = {name: message.headers[name] for name in ("id", "task", "retries", "job", "crashes")}
    assert kept == {"id": str(job.pk), "task": add.name, "retries": 3, "job": True, "crashes": 0}


# Running


def test_a_result_is_stored():
    job = deliver(Job.objects.enqueue(add, [1, 2]))
    assert (job.state, job.result, job.error) == ("succeeded", 3, "")
    assert (job.progress, job.message) == (100, "adding")
    assert job.created_at <= job.started_at <= job.finished_at


@pytest.mark.parametrize("text, stored", [("bad", "bad"), ("b\0ad", "bad"), ("b\ud800d", "b?d")])
def test_an_error_is_stored_without_characters_that_a_database_refuses(text, stored):
    def body(task):
        task.report(30, message=text)
        raise ValueError(text)

    job = run(body)
    assert (job.state, job.error) == ("failed", f"ValueError: {stored}")
    assert (job.progress, job.message) == (30, stored)
    traceback = job.failures.get().traceback
    assert traceback.endswith(f"raise ValueError(text)\nValueError: {stored}\n")


@pytest.mark.parametrize("result", [object(), float("nan"), {"a": {1}}])
def test_a_result_that_is_not_json_fails_the_job(result):
    job = run(lambda task: result)
    assert job.state == "failed"
    assert job.error.startswith("Its result cannot be stored: ")


def test_a_body_that_calls_sys_exit_fails_and_its_worker_survives():
    job = run(lambda task: sys.exit("bye"))
    assert (job.state, job.error) == ("failed", "The task called sys.exit('bye')")


def test_a_body_over_its_soft_time_limit_fails():
    def body(task):
        raise SoftTimeLimitExceeded

    job = run(body)
    assert (job.state, job.error) == ("failed", "Over its time limit")


@shared_task(base=JobTask, bind=True, autoretry_for=(SoftTimeLimitExceeded,), max_retries=1)
def sleep_in_a_query(self, in_block):
    block = transaction.atomic() if in_block else nullcontext()
    with block, connection.cursor() as cursor:
        cursor.execute("UPDATE jobs_job SET message = 'in the query'")
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
    job = deliver(Job.objects.enqueue(sleep_in_a_query, [in_block]))
    assert (job.state, job.error) == ("failed", "Over its time limit")
    assert (job.retries, job.crashes, len(errors(job))) == (1, 0, 2)


def test_a_time_limit_brings_a_soft_one_of_nine_tenths():
    """A soft limit of the task's own wins, even if it equals the one of the settings."""
    tasks = [short, limited, limited_twice, add]
    assert [task.soft_time_limit for task in tasks] == [0.9, 522, 540, 540]


@pytest.mark.parametrize("done, total, percent", [(1, 3, 33), (4, 3, 100), (-1, 3, 0), (0, 0, 100)])
def test_a_report_is_stored_while_the_body_runs(done, total, percent):
    def body(task):
        task.report(done, total, "x" * 300)
        lease.write_and_renew([task._current_run])  # as the thread of leases does, twice a second
        job = Job.objects.get()
        return [job.state, job.progress, len(job.message)]

    assert run(body).result == ["running", percent, 255]


def test_a_renewal_keeps_the_progress_of_a_resumed_job():
    """A renewal has no progress to write until the body reports some."""
    job = Job.objects.enqueue(add, [1, 2])
    Job.objects.update(cursor=7, progress=50)
    resumed = runs.Run(job.pk)
    claim(job.pk, resumed.token)
    Job.objects.update(message="Half of it", sweep_at=Now())
    lease.write_and_renew([resumed])
    job.refresh_from_db()
    assert (job.progress, job.message) == (50, "Half of it")
    assert seconds_until_due(job) == pytest.approx(30, abs=5)


def test_a_new_run_resets_the_progress():
    job = Job.objects.enqueue(add, [1, 2])
    Job.objects.update(progress=50, message="half done")
    start(job)
    job.refresh_from_db()
    assert (job.progress, job.message) == (0, "")


def test_a_run_continues_at_the_cursor_of_the_last_run():
    seen = []

    def body(task):
        seen.append((task.cursor, Job.objects.get().progress))
        task.report(1, 2, "half done", cursor={"page": 5})
        task.report(1, 1)  # without a cursor, so it is not in the database yet
        job = Job.objects.get()
        seen.append((task.cursor, job.cursor, job.progress, job.message))
        updates.requeue(Job.objects.all(), crashes=job.crashes + 1)  # as after a crash

    job = run(body)
    stopped = ({"page": 5}, {"page": 5}, 50, "half done")
    assert seen == [(None, 0), stopped]
    assert deliver(job).state == "queued"
    assert seen[2:] == [({"page": 5}, 50), stopped]


@pytest.mark.parametrize("cursor", [nan, "\0", {"key": "\ud800"}], ids=ascii)
def test_a_cursor_that_cannot_be_stored_fails_the_job(cursor):
    job = run(lambda task: task.report(1, 2, cursor=cursor))
    assert (job.state, job.error[:10], job.cursor) == ("failed", "ValueError", None)


def test_a_retry_with_an_option_that_a_job_cannot_have_fails_the_job():
    job = run(lambda task: task.retry(expires=60))
    assert (job.state, job.retries) == ("failed", 0)
    assert "TypeError: a job does not take expires" in job.error


@pytest.mark.parametrize(
    ("state", "cursor"), [("failed", 7), ("cancelled", 7), ("succeeded", None)]
)
def test_run_again_keeps_the_cursor_unless_the_job_succeeded(published, state, cursor):
    job = Job.objects.enqueue(add, [1, 2])
    updates.finish(Job.objects.all(), state, cursor=7, progress=70)
    job.refresh_from_db()
    again = job.run_again()
    again.refresh_from_db()
    assert (again.cursor, again.progress) == (cursor, 70 if cursor else 0)


def test_a_job_that_uses_no_cursor_makes_no_query_for_it():
    act.body = lambda task: task.report(1, 2)
    job = Job.objects.enqueue(act)
    with CaptureQueriesContext(connection) as captured:
        publish.publish([job])
    assert not [query for query in captured if query["sql"].startswith("SELECT")]


@pytest.mark.django_db(transaction=True)
def test_a_cursor_is_written_once():
    """But twice inside a transaction, because that may be rolled back."""

    def body(task):
        task.report(1, 3, cursor=1)
        first = task._current_run.needs_write()
        with transaction.atomic():
            task.report(2, 3, cursor=2)
        return [first, task._current_run.needs_write()]

    assert run(body).result == [False, True]


def test_a_report_without_a_text_shows_none():
    def body(task):
        task.report(1, 2, None)
        lease.write_and_renew([task._current_run])

    assert run(body).message == ""


CURSOR_USES = [lambda task: task.report(1, cursor=1), lambda task: task.cursor]


@pytest.mark.parametrize("use_cursor", CURSOR_USES, ids=["report", "cursor"])
@pytest.mark.parametrize("end_run", [lambda: Job.objects.all().cancel(), lambda: replace_run()])
def test_a_use_of_the_cursor_ends_a_body_that_lost_its_job(use_cursor, end_run):
    steps = []

    def body(task):
        end_run()
        steps.append("before")
        use_cursor(task)
        steps.append("after")

    job = run(body)
    assert (steps, job.cursor) == (["before"], None)


@pytest.fixture
def update_errors(monkeypatch):
    """A list of errors. Each UPDATE of jobs raises the last one and removes it."""
    update, errors = JobQuerySet.update, []

    def fail(self, **changes):
        if errors:
            raise errors.pop()
        return update(self, **changes)

    monkeypatch.setattr(JobQuerySet, "update", fail)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return errors


@pytest.mark.django_db(transaction=True)  # it opens a new connection
@pytest.mark.parametrize(
    ("error", "state"), [(OperationalError, "succeeded"), (SoftTimeLimitExceeded, "failed")]
)
def test_a_cursor_waits_for_an_unavailable_database(update_errors, error, state):
    """But not longer than the time limit of the body."""

    def body(task):
        update_errors.append(error)
        task.report(1, 2, cursor=7)

    job = run(body)
    assert (job.state, job.cursor) == (state, 7 if state == "succeeded" else None)


@pytest.mark.django_db(transaction=True)
def test_a_cursor_is_stored_in_the_transaction_of_the_body(update_errors):
    def body(task):
        for error in ZeroDivisionError, OperationalError:
            with suppress(error), transaction.atomic():
                Job.objects.create(task="effect", queue="", sweep_at=Now())
                update_errors.append(error)
                task.report(1, 2, cursor=7)
        with suppress(ZeroDivisionError), transaction.atomic():
            task.report(1, 2, cursor=8)
            raise ZeroDivisionError
        return task.cursor

    assert run(body).state == "succeeded"
    [job] = Job.objects.all()
    assert (job.result, job.cursor) == (None, None)


# The shutdown of a worker


@pytest.fixture
def shut_down():
    """A function that begins the shutdown of this worker."""
    yield partial(shutdown.shutting_down.__setitem__, 0, True)
    shutdown.shutting_down[0] = False


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("in_block", [False, True], ids=["autocommit", "atomic"])
def test_a_shutdown_ends_a_body_when_its_cursor_is_committed(shut_down, in_block):
    steps = []

    def body(task):
        shut_down()
        task.report(1, 3)  # without a cursor, its work would be repeated
        with transaction.atomic() if in_block else nullcontext():
            transaction.on_commit(lambda: steps.append("on_commit"))
            task.report(2, 3, cursor=7)
            steps.append("in the block")
        steps.append("after")

    job = run(body)
    assert steps == (["in the block", "on_commit"] if in_block else ["on_commit"])
    assert (job.state, job.cursor, job.retries, job.crashes) == ("queued", 7, 0, 0)
    assert not errors(job)


@pytest.mark.django_db(transaction=True)
def test_a_shutdown_forgets_no_function_of_on_commit(shut_down):
    """A body that passes one after its report continues until its next report."""
    steps = []

    def body(task):
        shut_down()
        with transaction.atomic():
            task.report(1, 3, cursor=7)
            transaction.on_commit(lambda: steps.append("on_commit"))
        steps.append("continues")
        task.report(2, 3, cursor=8)
        steps.append("after")

    job = run(body)
    assert steps == ["on_commit", "continues"]
    assert (job.state, job.cursor) == ("queued", 8)


@pytest.mark.django_db(transaction=True)
def test_a_shutdown_repeats_nothing_of_a_transaction_that_rolls_back(shut_down):
    def body(task):
        shut_down()
        with suppress(ZeroDivisionError), transaction.atomic():
            task.report(1, 2, cursor=7)
            raise ZeroDivisionError
        return "continued"

    job = run(body)
    assert (job.state, job.result, job.cursor) == ("succeeded", "continued", None)


def test_a_worker_that_shuts_down_starts_no_body(shut_down):
    shut_down()
    job = run(lambda task: pytest.fail("started"))
    assert (job.state, job.crashes, job.started_at) == ("queued", 0, None)
    assert seconds_until_due(job) == pytest.approx(5, abs=4)


def test_an_old_message_in_a_shutdown_does_not_shorten_a_pause(shut_down):
    shut_down()
    job = Job.objects.enqueue(add, [1, 2], countdown=3600)
    assert seconds_until_due(deliver(job)) > 3000


# Messages that come too late


def test_a_message_from_before_a_crash_does_nothing(published):
    """It would skip the pause after the crash."""
    job = Job.objects.enqueue(add, [1, 2])
    start(job)
    sweep.recover_lapsed()
    assert not claim(job.pk)
    assert claim(job.pk, crashes=1)


def test_a_second_copy_of_a_message_does_nothing():
    runs = []
    job = run(runs.append)
    deliver(job)
    assert len(runs) == 1


def test_a_copy_of_a_message_that_arrives_during_the_run_does_nothing():
    runs = []

    def body(task):
        runs.append(task)
        publish.publish([Job.objects.get()])

    assert run(body).state == "succeeded"
    assert len(runs) == 1


def test_a_message_from_before_a_retry_does_nothing():
    job = Job.objects.enqueue(add, [1, 2])
    Job.objects.update(retries=1)
    assert deliver(job).state == "queued"
    assert deliver(job).state == "succeeded"  # its message is from after the retry


def test_each_retry_waits_longer_than_the_one_before(monkeypatch):
    requeue, delays = updates.requeue, []

    def spy(self, delay=0, **changes):
        delays.append(delay)
        return requeue(self, delay, **changes)

    monkeypatch.setattr(updates, "requeue", spy)
    job = deliver(Job.objects.enqueue(flaky, [2]))
    assert (job.state, job.retries, job.crashes) == ("succeeded", 2, 0)
    assert delays == [10, 20]


@pytest.mark.parametrize("options", [{"args": [object()]}, {"kwargs": {"x": {1}}}], ids=str)
def test_a_retry_that_cannot_be_stored_fails_the_job(options):
    job = run(lambda task: task.retry(**options))
    assert (job.state, job.crashes) == ("failed", 0)
    assert job.error.startswith("Its next try cannot be stored: ")


def test_a_retry_waits_at_most_ten_years():
    job = run(lambda task: task.request.retries or task.retry(countdown=1e12))
    wait = (job.due_at - timezone.now()).total_seconds()
    assert wait == pytest.approx(queryset.MAX_COUNTDOWN, abs=60)


@pytest.mark.parametrize("options", [{"countdown": 1.7e12}, {"queue": "cpu", "countdown": 1e9}])
def test_a_countdown_of_more_than_ten_years_is_refused(options):
    with pytest.raises(ValueError, match="it is in seconds"):
        Job.objects.enqueue(add, [1, 2], **options)


def test_arguments_that_are_too_large_are_refused(settings):
    settings.JOB_MAX_BYTES = 100
    Job.objects.enqueue(add, ["x" * 80, 1])
    with pytest.raises(ValueError, match=r"112 bytes, but JOB_MAX_BYTES is 100"):
        Job.objects.enqueue(add, ["x" * 99, 1])


UNSTORABLE = ["\0", "a\\\0", "\ud83d", "\ude00a", "\ud83d\ud83d\ude00", "\ud83d\\\ude00"]


@pytest.mark.parametrize("text", UNSTORABLE, ids=ascii)
@pytest.mark.parametrize("field", ["args", "kwargs", "label", "unique", "idempotency_key"])
def test_a_text_that_postgresql_cannot_store_is_refused_at_once(text, field):
    values = {"args": [text, 1], "kwargs": {"y": {text: 1}}}
    call = {"args": [1, 2], field: values.get(field, text)}
    with CaptureQueriesContext(connection) as captured:
        with pytest.raises((TypeError, ValueError), match=r"cannot store the character \\u"):
            Job.objects.enqueue(add, **call)
    assert not captured.captured_queries
    if field == "label":
        with pytest.raises(ValueError, match="cannot store"):
            Job.objects.enqueue_many(add, [[1, 2]], label=text)


@pytest.mark.parametrize("text", ["é😀", "\\u0000", "\\\\ud800", "\x01\x7f"], ids=ascii)
def test_any_other_text_is_stored(text):
    texts = {"unique": text, "label": text, "idempotency_key": text}
    job = Job.objects.enqueue(add, [text, {text: 1}], **texts)
    job.refresh_from_db()
    assert job.args == [text, {text: 1}]
    assert [job.unique_key, job.label, job.idempotency_key] == [text] * 3


def test_a_router_with_a_replica_stops_no_job(replica, published, user):
    """Jobs are neither written to a replica nor read from it: it lags behind."""
    with transaction.atomic():  # of which the replica sees nothing
        job = Job.objects.enqueue(add, [1, 2], owner=user)
        run = uuid.uuid4()
        assert claim(job.pk, run)
        job.refresh_from_db()
        assert job.state == "running"
        failure = Failure(started_at=Now(), job_id=job.pk)
        assert failure.job == job
        assert updates.succeed(Job.objects, id=job.pk, run_token=run, result=3, message="")
        [again] = Job.objects.all().run_again()
        assert (again.owner_id, again.follows) == (user.pk, job.pk)
        assert again.cancel()
        again.refresh_from_db()
        assert Job.objects.filter(pk=again.pk).run_again() == [again]


def test_a_stored_job_is_not_saved_as_a_whole(published):
    """Its row may have changed since it was read."""
    job = Job.objects.enqueue(add, [1, 2])
    assert claim(job.pk)
    with pytest.raises(TypeError, match=r"use save\(update_fields=\[...\]\)"):
        job.save()
    job.label = "Sum"
    job.save(update_fields=["label"])
    job.refresh_from_db()
    assert (job.state, job.label) == ("running", "Sum")


def test_a_user_with_active_jobs_is_not_deleted(published, user, admin_user):
    jobs = [Job.objects.enqueue(add, [1, 2], owner=user) for _ in range(2)]
    other = Job.objects.enqueue(add, [1, 2], owner=admin_user)
    start(jobs[0])
    Failure.objects.create(job=jobs[0], started_at=Now())
    with pytest.raises(RestrictedError, match="active jobs: cancel them first") as found:
        user.delete()
    assert found.value.restricted_objects == set(jobs)
    Job.objects.filter(owner=user).cancel()
    user.delete()
    assert list(Job.objects.all()) == [other]


@pytest.mark.parametrize("call", [lambda task: task.cursor, lambda task: task.report(1)])
def test_a_report_in_a_thread_of_the_body_is_refused(call):
    """It would be lost without an error."""

    def body(task):
        with ThreadPoolExecutor() as threads:
            return threads.submit(call, task).result()

    assert run(body).error.startswith("RuntimeError: report(), then() and cursor")
    with ThreadPoolExecutor() as threads:
        assert threads.submit(call, act).result() is None  # no job runs


def test_a_job_fails_after_its_last_retry():
    job = deliver(Job.objects.enqueue(flaky, [9]))
    assert (job.state, job.retries, job.error) == ("failed", 2, "OSError: away")


def test_each_failed_run_is_kept_with_its_traceback():
    job = deliver(Job.objects.enqueue(flaky, [2]))
    assert job.state == "succeeded"
    assert errors(job) == ["OSError: away"] * 2
    job = deliver(Job.objects.enqueue(flaky, [9]))
    assert errors(job) == ["OSError: away"] * 3
    failures = list(job.failures.all())
    assert all('raise OSError("away")' in failure.traceback for failure in failures)
    assert {failure.exception for failure in failures} == {"builtins.OSError"}
    assert {failure.worker for failure in failures} == {job.worker} != {""}
    times = [time for failure in failures for time in (failure.started_at, failure.ended_at)]
    assert times == sorted(times)
    assert times[-2] == job.started_at and times[-1] - job.finished_at < timedelta(seconds=1)


def errors(job):
    return [failure.error for failure in job.failures.all()]


def divide(task, **options):
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        raise task.retry(**options) from None


def divide_and_continue(task):
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        task.retry(throw=False)


@pytest.mark.parametrize(
    ("body", "error", "raised"),
    [
        (divide, "ZeroDivisionError: division by zero", "1 / 0"),
        (lambda task: divide(task, exc=ValueError("no")), "ValueError: no", "1 / 0"),
        (divide_and_continue, "ZeroDivisionError: division by zero", "1 / 0"),
        (lambda task: task.retry(exc=ValueError("no")), "ValueError: no", "ValueError: no"),
        (lambda task: task.retry(exc=OSError("no"), throw=False), "OSError: no", "OSError: no"),
        (lambda task: task.retry(), "The task requested another try", ""),
    ],
)
@pytest.mark.parametrize("is_eager", [True, False])  # as in a project's tests, as in a worker
def test_a_failure_has_the_error_that_led_to_the_retry(body, error, raised, is_eager):
    def retry(task):
        task.request.is_eager = is_eager
        if not task.request.retries:
            body(task)

    job = run(retry)
    assert (job.retries, errors(job)) == (1, [error])
    assert raised in job.failures.get().traceback


def test_only_the_latest_twenty_failures_are_kept():
    job = Job.objects.enqueue(add, [1, 2])
    for number in range(23):
        Job.objects.update(started_at=timezone.now())
        assert updates.requeue(Job.objects.all(), failure={"error": str(number)}) == 1
    assert errors(job) == [str(number) for number in range(3, 23)]


def fall(depth):
    if not depth:
        raise ValueError("long" * 10_000)
    fall(depth - 1)


def chain_errors(depth):
    try:
        fall(depth) if depth < 9_900 else chain_errors(depth - 1)
    except ValueError as error:
        raise ValueError("long" * 10_000) from error


@pytest.mark.parametrize("body", [fall, chain_errors])
def test_a_long_error_and_traceback_are_shortened(body):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        job = run(lambda task: body(10_000))
    finally:
        sys.setrecursionlimit(limit)
    failure = job.failures.get()
    assert failure.error == ("ValueError: " + "long" * 1000)[:1000]
    assert 'raise ValueError("long" * 10_000)' in failure.traceback
    assert len(failure.traceback) <= 4000


def test_a_job_that_succeeds_at_once_needs_two_statements():
    job = Job.objects.enqueue(add, [1, 2])
    with CaptureQueriesContext(connection) as captured:
        publish.publish([job])
    assert len(captured) == 2
    job.refresh_from_db()
    assert job.state == "succeeded" and not job.failures.exists()


@pytest.mark.django_db(transaction=True)  # it opens a new connection
def test_a_result_waits_for_an_unavailable_database(monkeypatch):
    read_only = InternalError()
    read_only.__cause__ = ReadOnlySqlTransaction()
    finish, errors = updates.finish, [OperationalError, InterfaceError, read_only]

    def away(self, *args, **kwargs):
        if errors:
            raise errors.pop()
        return finish(self, *args, **kwargs)

    monkeypatch.setattr(updates, "finish", away)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run(lambda task: "done").result == "done"


def test_a_job_task_that_is_called_runs_as_a_plain_task():
    assert add(1, 2) == 3
    act.body = lambda task: [task.report(1, 2, cursor=7), task.cursor]
    assert act() == [None, None]
    assert not Job.objects.exists()


def test_delay_enqueues_a_job():
    result = add.delay(1, y=2)
    [job] = Job.objects.all()
    assert (result.id, job.args, job.kwargs, job.owner) == (str(job.pk), [1], {"y": 2}, None)
    app.conf.task_always_eager = False  # in eager mode, reading the state runs the job
    assert result.state == "PENDING"
    app.conf.task_always_eager = True
    deliver(job)
    assert (result.state, add.AsyncResult(result.id).result) == ("SUCCESS", 3)
    assert [add.AsyncResult(pk).state for pk in ("another", uuid.uuid4())] == ["PENDING"] * 2


def test_apply_async_accepts_options_that_a_job_supports():
    pk, eta = uuid.uuid4(), timezone.now() + timedelta(hours=1)
    add.apply_async([1, 2], task_id=str(pk), queue="cpu", countdown=60)
    add.s(1, 2).apply_async(eta=eta)
    first, second = Job.objects.order_by("sweep_at")
    assert (first.pk, first.queue, first.times_sent, second.times_sent) == (pk, "cpu", 0, 0)
    assert abs(second.sweep_at - eta) < timedelta(seconds=5)


@pytest.mark.parametrize(
    "send",
    [
        lambda: add.apply_async([1, 2], expires=5),
        lambda: add.apply_async([1, 2], link=add.s(3)),
        lambda: add.apply_async([1, 2], priority=5),
        lambda: add.apply_async([1, 2], time_limit=5),
        lambda: group(add.s(1, 2), add.s(3, 4)).apply_async(expires=5),
        lambda: chain(add.s(1, 2), add.s(3)).apply_async(priority=5),
    ],
)
def test_apply_async_refuses_options_that_a_job_does_not_support(send):
    app.conf.task_always_eager = False
    with pytest.raises(TypeError, match="a job does not take .+: see Job.objects.enqueue"):
        send()
    assert not Job.objects.exists()


@pytest.mark.filterwarnings("ignore::celery.exceptions.CDeprecationWarning")
@pytest.mark.parametrize("option", ["before_start", "exchange", "expires", "routing_key"])
def test_a_task_with_an_attribute_that_jobs_do_not_support_is_refused(option):
    class Task(JobTask):
        name = "bad"

    setattr(Task, option, "5")
    with pytest.raises(TypeError, match=f"bad: a job cannot have {option}"):
        Task.bind(app)


def test_a_job_goes_to_the_queue_that_its_decorator_names(monkeypatch):
    monkeypatch.setattr(add, "queue", "mail", raising=False)
    assert Job.objects.enqueue(add, [1, 2]).queue == "mail"
    assert Job.objects.enqueue(add, [1, 2], queue="cpu").queue == "cpu"


@pytest.mark.parametrize(
    ("state", "error", "expected"),
    [
        ("failed", "ValueError: no", ("FAILURE", "TaskError('ValueError: no')")),
        ("cancelled", "", ("REVOKED", "TaskRevokedError('')")),
    ],
)
def test_an_async_result_says_how_a_job_ended(state, error, expected):
    result = add.delay(1, 2)
    updates.finish(Job.objects.all(), state, error=error)
    assert (result.state, repr(result.result)) == expected


# Bodies with an unusual end


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
    ("body", "error"),
    [
        (nested, "Its result cannot be stored: "),
        (raise_error_without_text, "ErrorWithoutText"),
        (raise_unprintable_error, "SyntaxError"),
        (raise_retry, "Retry was raised by hand"),
    ],
)
def test_a_body_with_an_unusual_end_fails_once(body, error):
    job = run(lambda task: body())
    assert (job.state, job.crashes) == ("failed", 0)
    assert error in job.error
    assert errors(job) == [job.error]


def leave_autocommit_off(task):
    transaction.set_autocommit(False)
    Job.objects.filter(pk=task.request.id).update(message="lost")


def leave_a_block(task):
    transaction.atomic().__enter__()
    Job.objects.filter(pk=task.request.id).update(message="lost")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("leave", [leave_autocommit_off, leave_a_block])
def test_a_body_that_leaves_a_transaction_open_fails_no_later_job(leave):
    job = run(leave)
    if connection.vendor == "postgresql" or leave is leave_a_block:  # SQLite would commit it
        assert (job.state, job.message) == ("failed", "")
    assert not connection.in_atomic_block
    assert run(lambda task: None).state == "succeeded"


@pytest.mark.django_db(transaction=True)
def test_a_body_that_survives_a_lost_connection_succeeds():
    if connection.vendor == "sqlite":
        pytest.skip("only a connection to PostgreSQL can be lost: set DATABASE_URL=postgres://…")
    assert run(lambda task: connection.connection.close()).state == "succeeded"


def test_delay_on_commit_enqueues_a_job(commit):
    with commit():
        add.delay_on_commit(1, 2)
    assert Job.objects.get().result == 3


def test_a_claim_whose_answer_was_lost_can_be_repeated():
    job, run = Job.objects.enqueue(add, [1, 2]), uuid.uuid4()
    claims = [claim(job.pk, token) for token in (run, run, uuid.uuid4())]
    assert claims == [1, 1, 0]


def test_a_process_runs_one_suspect_at_a_time():
    first, second, third = (runs.Run(uuid.uuid4()) for _ in range(3))
    assert first.become_suspect() and not second.become_suspect()
    first.lost = True
    assert second.become_suspect() and not third.become_suspect()
    second.ended = True
    assert third.become_suspect()
    third.ended = True


def test_a_value_that_is_too_large_for_the_database_is_not_retried_for_ever():
    too_large = OperationalError()
    too_large.__cause__ = ProgramLimitExceeded()
    assert not database.may_succeed_later(too_large)
    assert database.may_succeed_later(OperationalError())


# Cancelled jobs and replaced runs


def test_a_cancelled_job_never_starts():
    job = Job.objects.enqueue(add, [1, 2])
    assert Job.objects.all().cancel() == 1
    assert (deliver(job).state, job.result) == ("cancelled", None)


def run_while_open(change, function):
    """Call change() in a transaction that ends when function(), in another one, waits for it.

    Return what function() returns.
    """
    pids = SimpleQueue()

    def call():
        connection.ensure_connection()
        pids.put(connection.connection.info.backend_pid)
        try:
            return function()
        finally:
            connection.close()

    with ThreadPoolExecutor() as threads:
        with transaction.atomic(), connection.cursor() as cursor:
            change()
            called, waits = threads.submit(call), None
            pid = pids.get(timeout=60)
            while not (waits or called.done()):
                time.sleep(0.01)
                cursor.execute("SELECT pg_blocking_pids(%s) <> '{}'", [pid])
                [waits] = cursor.fetchone()
        return called.result(60)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("by", ["owner__username", "failures__error", "state", "pk"])
def test_a_job_that_changes_while_cancel_waits_is_not_cancelled(published, user, by):
    """With a join, PostgreSQL checks no condition of an UPDATE again when it has waited."""
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has one transaction at a time: set DATABASE_URL=postgres://…")
    job, run = Job.objects.enqueue(add, [1, 2], owner=user), uuid.uuid4()
    Failure.objects.create(job=job, started_at=Now(), error="user")
    if by == "state":
        change, state = partial(claim, job.pk, run), "running"
    else:
        assert claim(job.pk, run)
        end = {"id": job.pk, "run_token": run, "result": 3, "message": ""}
        change, state = partial(updates.succeed, Job.objects, **end), "succeeded"
    condition = {by: {"pk": job.pk, "state": "queued"}.get(by, "user")}
    assert run_while_open(change, Job.objects.filter(**condition).cancel) == 0
    job.refresh_from_db()
    assert job.state == state


def test_a_job_that_a_join_repeats_is_cancelled_and_run_again_once(published):
    job = Job.objects.enqueue(add, [1, 2])
    for _ in range(2):
        Failure.objects.create(job=job, started_at=Now(), error="away")
    jobs = Job.objects.filter(failures__error="away")
    assert jobs.cancel() == 1
    assert len(jobs.run_again()) == 1


def test_jobs_with_one_unique_key_run_again_as_one(published):
    for _ in range(3):
        Job.objects.enqueue(add, [1, 2], unique="key")
        Job.objects.all().cancel()
    [again] = Job.objects.all().run_again()
    assert again.state == "queued"


def test_a_job_that_has_ended_cannot_be_cancelled():
    job = deliver(Job.objects.enqueue(add, [1, 2]))
    assert Job.objects.all().cancel() == 0
    job.refresh_from_db()
    assert job.state == "succeeded"


def replace_run():
    updates.requeue(Job.objects.all())
    claim(Job.objects.get().pk)


@pytest.mark.parametrize(
    "end_run, state", [(lambda: Job.objects.all().cancel(), "cancelled"), (replace_run, "running")]
)
def test_the_result_of_a_run_that_lost_its_job_is_dropped(end_run, state):
    def body(task):
        end_run()
        return "too late"

    job = run(body)
    assert (job.state, job.result) == (state, None)


@pytest.mark.parametrize("end_run", [lambda: Job.objects.all().cancel(), replace_run])
def test_the_next_report_ends_a_body_that_lost_its_job(end_run):
    steps = []

    def body(task):
        task.report(1, 3)
        end_run()
        lease.write_and_renew([task._current_run])
        steps.append("before")
        task.report(2, 3)
        steps.append("after")

    job = run(body)
    assert steps == ["before"]
    assert job.progress == 0


def test_the_renewal_of_leases_finds_lost_runs():
    job = Job.objects.enqueue(add, [1, 2])
    mine, other = runs.Run(job.pk), runs.Run(job.pk)
    claim(job.pk, mine.token)
    lease.write_and_renew([mine, other])
    assert (mine.lost, other.lost) == (False, True)


def test_a_claim_that_a_database_crash_has_lost_is_repeated():
    """Unless another run has claimed the job, or the body has ended or handed back its job."""
    forgotten, overtaken, ended = (Job.objects.enqueue(add, [1, 2]) for _ in range(3))
    three = [runs.Run(job.pk) for job in (forgotten, overtaken, ended)]
    for run in three:
        run.claim, run.in_body = partial(claim, run.job_id, run.token), run is not three[2]
    claim(overtaken.pk)
    lease.write_and_renew(three)
    assert [run.lost for run in three] == [False, True, True]
    assert [run.overtaken for run in three] == [False, True, False]
    assert Job.objects.get(run_token=three[0].token) == forgotten


@pytest.mark.parametrize("end, state", [(None, "succeeded"), (ValueError, "failed")], ids=str)
def test_an_outcome_is_stored_although_a_database_crash_has_lost_the_claim(end, state):
    seen = []

    def body(task):
        seen.append(task._current_run.in_body)
        Job.objects.update(state="queued", run_token=None, started_at=None)
        if end:
            raise end

    assert run(body).state == state
    assert seen == [True]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("handed_back", [False, True])
@pytest.mark.parametrize("use_cursor", CURSOR_USES, ids=["report", "cursor"])
def test_a_body_whose_claim_a_database_crash_has_lost_continues(use_cursor, handed_back):
    """Unless its worker has handed the job back: then it belongs to the next run."""

    def body(task):
        Job.objects.update(state="queued", run_token=None, started_at=None)
        task._current_run.in_body = not handed_back
        use_cursor(task)
        return Job.objects.get().state

    job = run(body)
    expected = ("queued", None) if handed_back else ("succeeded", "running")
    assert (job.state, job.result) == expected


def test_a_run_does_not_repeat_its_claim_after_its_body_has_ended(monkeypatch):
    ended = []
    monkeypatch.setattr(runs.Run, "succeed", lambda run, result: ended.append(run.in_body))
    run(lambda task: None)
    assert ended == [False]


def test_a_worker_that_hands_back_its_jobs_claims_none_of_them_again(monkeypatch):
    """Not even a job whose row it has just locked itself, to renew the lease."""
    skip_locked, locked = updates.skip_locked, [Job.objects.none()]
    monkeypatch.setattr(updates, "skip_locked", lambda rows: (locked or [skip_locked(rows)]).pop())
    run = runs.Run(Job.objects.enqueue(add, [1, 2]).pk)
    run.in_body = True
    claim(run.job_id, run.token)
    monkeypatch.setattr("time.sleep", Mock())
    monkeypatch.setattr("os._exit", Mock())
    with run:
        shutdown.requeue_and_exit()
    assert Job.objects.get().state == "queued"
    assert not run.in_body


def test_a_claim_does_not_wait_for_the_disk():
    """A second later, the run checks that its claim was not lost."""
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL has synchronous_commit: set DATABASE_URL=postgres://…")
    job, began = Job.objects.enqueue(add, [1, 2]), time.monotonic()
    with transaction.atomic(), connection.cursor() as cursor:
        assert claim(job.pk)
        cursor.execute("SHOW synchronous_commit")
        assert cursor.fetchall() == [("off",)]
    assert runs.Run(job.pk).renew_at == pytest.approx(began + 1, abs=0.5)


def test_messages_sent_together_declare_each_queue_once(monkeypatch):
    app.conf.task_always_eager = False
    sent, producer = [], Mock(batch=Mock(side_effect=nullcontext))
    monkeypatch.setattr(app, "producer_or_acquire", lambda: nullcontext(producer))
    monkeypatch.setattr(app.amqp, "send_task_message", lambda *args, **more: sent.append(more))
    jobs = [Job(task=add.name, queue=queue) for queue in ("a", "b", "a")]
    messages.send(jobs)
    messages.send(jobs[:1])
    assert [message["declare"] for message in sent] == [None, None, [], None]
    assert producer.batch.call_count == 1


def test_a_job_is_sent_by_a_process_that_does_not_know_its_task(monkeypatch):
    """In a deploy, Beat may run older code than the workers."""
    app.conf.task_always_eager = False
    sent = []
    monkeypatch.setattr(app.amqp, "send_task_message", lambda *args, **more: sent.append(args[1]))
    messages.send([Job(task="to.be.deployed", queue="a"), Job(task=add.name, queue="a")])
    assert sent == ["to.be.deployed", add.name]


def test_flower_shows_the_beginning_of_large_arguments(monkeypatch):
    app.conf.task_always_eager = False
    sent = []
    monkeypatch.setattr(app.amqp, "send_task_message", lambda *args, **more: sent.append(args[2]))
    messages.send([Job(task=add.name, args=["x" * 5000], kwargs={"y": "z" * 5000}, queue="a")])
    [message] = sent
    assert [len(message.headers[name]) for name in ("argsrepr", "kwargsrepr")] == [1000, 1000]


def start_batches(dispatcher):
    """Make a worker send its events in batches.

    Returns the boot step, the consumer, the function that sends a batch, and the list of what is
    published.
    """
    published, consumer = [], SimpleNamespace(event_dispatcher=dispatcher, timer=Mock())
    dispatcher.producer = Mock(publish=lambda event, **options: published.append(event))
    dispatcher.on_send_buffered = lambda: published.append("at once")
    step = events.BatchedEvents(consumer)
    step.start(consumer)
    [[_, flush]] = [call.args for call in consumer.timer.call_repeatedly.call_args_list]
    return step, consumer, flush, published


def test_a_worker_sends_its_task_events_in_batches():
    """Flower receives the same events, but many of them in one message."""
    _, _, flush, published = start_batches(app.events.Dispatcher(Connection("memory://")))
    dispatcher = flush.__self__
    for number in range(30):
        dispatcher.send("task-succeeded", uuid=number)
    assert not published
    dispatcher.send("worker-heartbeat")
    flush()
    heartbeat, batch = published
    assert heartbeat["type"] == "worker-heartbeat"
    assert [event["uuid"] for event in batch] == list(range(30))


def test_events_survive_a_lost_connection_and_a_shutdown():
    dispatcher = app.events.Dispatcher(Connection("memory://"))
    step, consumer, _, published = start_batches(dispatcher)
    dispatcher.send("task-succeeded", uuid=1)
    step.stop(consumer)
    assert [event["uuid"] for event in published[0]] == [1]
    consumer.timer.call_repeatedly.return_value.cancel.assert_called_once_with()

    dispatcher.producer.publish = Mock(side_effect=ConnectionError)
    dispatcher.send("task-succeeded", uuid=2)
    step.stop(consumer)
    following = app.events.Dispatcher(Connection("memory://"))
    _, _, flush, published = start_batches(following)
    following.extend_buffer(dispatcher)  # as Celery does
    flush()
    assert [event["uuid"] for event in published[0]] == [2]


def test_a_worker_without_events_has_no_batches():
    consumer = SimpleNamespace(event_dispatcher=None, timer=Mock())
    step = events.BatchedEvents(consumer)
    step.start(consumer)
    step.stop(consumer)
    assert not consumer.timer.mock_calls


def in_this_thread(delay, function):
    return SimpleNamespace(start=function)


@pytest.mark.parametrize(
    ("signal", "sent"), [(None, "SIGKILL"), ("SIGTERM", "SIGKILL"), ("SIGUSR1", "SIGUSR1")]
)
def test_a_child_that_is_terminated_is_not_told_of_a_shutdown(monkeypatch, signal, sent):
    revoke = Mock()
    monkeypatch.setitem(Panel.data, "revoke", revoke)
    monkeypatch.setitem(Panel.data, "terminate", None)
    monkeypatch.setattr(worker, "in_thread", Mock())
    worker.cancel_revoked_jobs()
    Panel.data["revoke"](None, "id", terminate=True, signal=signal)
    revoke.assert_called_once_with(None, "id", terminate=True, signal=sent)


@pytest.mark.django_db(transaction=True)  # it closes the connection
def test_revoke_and_terminate_cancel_the_job(monkeypatch, published):
    job, other = Job.objects.enqueue(add, [1, 2]), Job.objects.enqueue(add, [1, 2])
    monkeypatch.setitem(Panel.data, "revoke", lambda state, task_id, **kwargs: "revoked")
    monkeypatch.setitem(Panel.data, "terminate", None)
    monkeypatch.setattr("threading.Timer", in_this_thread)
    worker.cancel_revoked_jobs()
    assert Panel.data["revoke"](None, [str(job.pk), "no job"]) == "revoked"
    assert list(Job.objects.filter(state="cancelled")) == [job]
    assert Panel.data["terminate"](None, "SIGTERM", str(other.pk)) == "revoked"
    assert Job.objects.filter(state="cancelled").count() == 2


# The sweep


def test_a_job_waits_longer_after_each_crash_and_fails_after_the_third(caplog):
    job = Job.objects.enqueue(add, [1, 2])
    for crashes, delay in (1, 5), (2, 10):
        start(job)
        sweep.recover_lapsed()
        assert seconds_until_due(job) == pytest.approx(delay, rel=0.3)
        assert (job.state, job.crashes, job.times_sent) == ("queued", crashes, 0)
    start(job)
    sweep.recover_lapsed()
    job.refresh_from_db()
    assert (job.state, job.error) == ("failed", "Its worker died 3 times")
    assert job.public_error == job.error  # the text that its owner reads
    assert f"job {job.pk} failed: Its worker died 3 times" in caplog.text
    assert errors(job) == ["Its worker died"] * 3


def test_a_job_past_its_deadline_fails():
    job = Job.objects.enqueue(add, [1, 2])
    start(job, limit=-1)
    sweep.recover_lapsed()
    job.refresh_from_db()
    assert (job.state, job.error, job.crashes) == ("failed", "Over its time limit", 0)
    assert job.public_error == job.error
    assert errors(job) == ["Over its time limit"]


def test_a_running_job_with_a_lease_is_not_recovered():
    job = Job.objects.enqueue(add, [1, 2])
    start(job)
    Job.objects.update(sweep_at=lease_end())
    sweep.recover_lapsed()
    assert seconds_until_due(job) == pytest.approx(30, abs=5)
    assert job.state == "running"


def test_a_lease_ends_no_later_than_the_deadline():
    job = Job.objects.enqueue(add, [1, 2])
    start(job, limit=10)
    Job.objects.update(sweep_at=lease_end())
    assert seconds_until_due(job) == pytest.approx(10, abs=5)


def enqueue_and_publish(count):
    jobs = [Job.objects.enqueue(add, [1, 2]) for _ in range(count)]
    for job in jobs:
        publish.publish([job])
    return jobs


def test_one_job_is_sent_again_although_the_broker_has_the_whole_backlog(published):
    jobs = enqueue_and_publish(3)
    lapse(*jobs)
    sweep.send_due()  # in case the broker's messages belong to plain tasks
    assert published[3:] == [str(jobs[0].pk)]


def test_lost_messages_are_published_again_oldest_first(published):
    jobs = enqueue_and_publish(4)
    lapse(*jobs)
    del published[:2]
    sweep.send_due()
    assert published[2:] == [str(job.pk) for job in jobs[:2]]


def test_a_job_that_was_never_sent_is_sent_whatever_the_broker_has(published):
    enqueue_and_publish(3)
    unsent = Job.objects.enqueue(add, [1, 2], countdown=1)
    lapse(unsent)
    sweep.send_due()
    assert published[3:] == [str(unsent.pk)]


def test_the_pause_before_a_lost_message_is_sent_again_doubles(published, settings):
    settings.JOB_RESEND_SECONDS = 10
    [job] = enqueue_and_publish(1)
    for wait in 20, 40, 80:
        published.clear()
        lapse(job)
        sweep.send_due()
        assert published == [str(job.pk)]
        assert seconds_until_due(job) == pytest.approx(wait, abs=5)


def test_two_concurrent_sweeps_send_each_job_once(monkeypatch):
    jobs = [Job.objects.enqueue(add, [1, 2], countdown=1) for _ in range(3)]
    lapse(*jobs)
    sent = []

    def publish(job, producer, **options):
        sent.append(str(job.pk))
        if len(sent) == 1:
            sweep.send_due()  # the second sweep, when the first one has read all three jobs

    monkeypatch.setattr(messages, "send_one", publish)
    monkeypatch.setattr(sweep, "messages_in", lambda queue, broker: 0)
    sweep.send_due()
    assert sorted(sent) == sorted(str(job.pk) for job in jobs)


@pytest.mark.parametrize(
    # Nothing is recovered in the first half of a lease, nor in half a lease after 30 s.
    ("lease", "stands_still", "expected"),
    [(30, 0, [20, 30, 50, 60]), (30, 45, [20, 50, 60]), (10, 0, [10, 20, 30, 40, 50, 60])],
    ids=["database_away", "machine_stands_still", "short_lease"],
)
def test_the_sweep_lets_workers_renew_leases_first(
    monkeypatch, settings, lease, stands_still, expected
):
    settings.JOB_LEASE_SECONDS = lease
    recovered, resent, clock = [], [], itertools.count(0, 10)  # seconds
    now = [next(clock)]

    def wall_clock():
        return 1e9 + now[0] + stands_still * (now[0] >= 30)

    def sleep(seconds):
        now[0] = next(clock)
        if now[0] > 60:
            raise SystemExit

    def recover():
        recovered.append(now[0])
        if now[0] == 30:
            raise OperationalError("the database is away")

    clocks = {"monotonic": lambda: now[0], "time": wall_clock, "sleep": sleep}
    monkeypatch.setattr(sweep, "time", SimpleNamespace(**clocks))
    monkeypatch.setattr(sweep, "recover_lapsed", recover)
    monkeypatch.setattr(sweep, "connection", database := Mock())
    monkeypatch.setattr(sweep, "send_due", lambda resend: resent.append(now[0]) if resend else None)
    with pytest.raises(SystemExit):
        sweep.sweep_forever(tick_delay=lambda: 0, error_count=lambda: 0)
    assert recovered == resent == expected
    assert database.close.called == (30 in expected)  # then the database was unavailable


def test_a_sweep_that_finds_the_broker_down_stops_and_changes_nothing(broker_down, monkeypatch):
    monkeypatch.setattr(sweep, "messages_in", lambda queue, broker: 0)
    jobs = [Job.objects.enqueue(add, [1, 2], countdown=1) for _ in range(3)]
    lapse(*jobs)
    sweep.send_due()
    assert len(broker_down) == 3  # all three, the first one alone, and a message without a job
    assert all(seconds_until_due(job) <= 0 for job in jobs)
    assert not Job.objects.exclude(times_sent=0)


def test_a_job_that_the_broker_refuses_delays_no_other(monkeypatch):
    """For example because it is too large, or because its queue does not exist."""
    sent = []

    def send_one(job, producer, **options):
        if job.args == [0, 0]:
            raise ValueError("too large")
        sent.append(str(job.pk))

    monkeypatch.setattr(messages, "send_one", send_one)
    monkeypatch.setattr(sweep, "messages_in", lambda queue, broker: 0)
    monkeypatch.setattr(publish, "PUBLISH_PAUSE", 0)
    refused = [Job.objects.enqueue(add, [0, 0], queue=queue, countdown=1) for queue in "ab"]
    others = [Job.objects.enqueue(add, [1, 2], queue=queue, countdown=1) for queue in "abc"]
    lapse(*refused, *others)
    for _ in range(6):
        sweep.send_due()
    ids = {str(job.pk) for job in others}
    assert sorted(pk for pk in sent if pk in ids) == sorted(ids)
    assert all(seconds_until_due(job) > 0 for job in refused)


@pytest.mark.parametrize(("waiting", "state"), [(3, "failed"), (10, "queued")])
def test_a_job_that_is_refused_five_times_fails_unless_its_queue_is_full(
    monkeypatch, waiting, state
):
    def send_one(job, producer, **options):
        if job.args == [0, 0]:
            raise ValueError("too large")

    monkeypatch.setattr(messages, "send_one", send_one)
    monkeypatch.setattr(sweep, "messages_in", lambda queue, broker: waiting)
    sweep.queues["celery"].most_messages = 10
    job = Job.objects.enqueue(add, [0, 0], countdown=1)
    for _ in range(sweep.REFUSALS):
        lapse(job)
        sweep.send_due()
    job.refresh_from_db()
    assert job.state == state
    assert state == "queued" or job.error == (
        "The broker refused it 5 times: ValueError('too large')"
    )


def test_the_sweep_resends_twice_as_many_after_it_found_a_lost_message(published):
    """Messages of plain tasks hide how many messages of jobs are missing."""
    enqueue_and_publish(12)
    resent = []
    # Which message then starts each job: its first one, or the one that was sent again.
    for message in 2, 2, 1, None, 1:
        published[:] = ["plain"] * 40
        lapse(*Job.objects.filter(state="queued"))
        sweep.queues["celery"].probe_at = 0
        sweep.send_due()
        resent.append(len(published) - 40)
        for pk in published[40:]:
            if message:
                assert claim(pk, times_sent=message)
            else:
                Job.objects.get(pk=pk).cancel()  # no message has started it
    assert resent == [1, 2, 4, 1, 1]


def test_a_job_above_a_new_limit_fails_and_is_not_loaded(published, settings):
    """To load it could end Beat."""
    large, small = [Job.objects.enqueue(add, ["x" * size, 1], countdown=1) for size in (99, 9)]
    lapse(large, small)
    settings.JOB_MAX_BYTES = 50
    with CaptureQueriesContext(connection) as captured:
        sweep.send_due()
    assert published == [str(small.pk)]
    assert "x" * 99 not in str(captured.captured_queries)
    large.refresh_from_db()
    assert (large.state, large.error) == (
        "failed",
        "The arguments have 108 bytes, but JOB_MAX_BYTES is 50: pass an id",
    )


def test_large_arguments_are_loaded_one_job_at_a_time(published, monkeypatch):
    monkeypatch.setattr(sweep, "BYTES_IN_MEMORY", 50)
    sent = []
    monkeypatch.setattr(sweep, "send", lambda jobs: sent.append([job.args[0] for job in jobs]))
    for text in "x" * 50, "y" * 50:
        lapse(Job.objects.enqueue(add, [text, 1], countdown=1))
    with CaptureQueriesContext(connection) as queries:
        sweep.send_due()
    assert sent == [["x" * 50], ["y" * 50]]
    assert not any('"result"' in query["sql"] for query in queries)


@pytest.mark.django_db(transaction=True)  # the test needs real commits
def test_an_error_of_publishing_is_not_raised_to_the_caller(monkeypatch):
    """A caller that sees an error enqueues again, and then has each job twice."""
    monkeypatch.setattr(queryset, "publish", lambda jobs: 1 / 0)
    with transaction.atomic():
        Job.objects.enqueue_many(add, [[1, 2]] * 3)
    assert Job.objects.count() == 3


def test_a_failed_publish_does_not_change_a_job_that_waits_for_its_retry(broker_down):
    """Publishing may report an error although the broker has taken the message."""
    job = Job.objects.enqueue(add, [1, 2])
    updates.requeue(runs.Run(job.pk).row)
    Job.objects.filter(pk=job.pk).update(times_sent=0, sweep_at=Now() + timedelta(seconds=600))
    assert not publish.publish([job])
    assert seconds_until_due(job) > 500


def test_the_sweep_updates_100_rows_with_one_statement(published, monkeypatch):
    """It keeps at most 100 jobs in memory at once."""
    in_memory = []
    monkeypatch.setattr(sweep, "send", lambda jobs: in_memory.append(len(jobs)))
    Job.objects.enqueue_many(add, [[1, 2]] * 250, countdown=1)
    Job.objects.update(sweep_at=Now() - timedelta(seconds=1))
    with CaptureQueriesContext(connection) as captured:
        sweep.send_due()
    assert len([query for query in captured if query["sql"].startswith("UPDATE")]) == 3
    assert in_memory == [100, 100, 50]
    assert set(Job.objects.values_list("times_sent", flat=True)) == {1}


BULK_UPDATES = {
    "to send": lambda jobs: sweep.send_due(),
    "to recover": lambda jobs: sweep.recover_lapsed(),
    "to renew": lambda jobs: lease.write_and_renew([runs.Run(job.pk) for job in jobs]),
    "to renew for children": lease.renew_for_children,
}


@pytest.mark.parametrize("update", BULK_UPDATES.values(), ids=BULK_UPDATES)
def test_an_update_of_many_jobs_skips_locked_rows(published, update):
    """A wait for one row would delay all others."""
    if not connection.features.has_select_for_update_skip_locked:
        pytest.skip("only PostgreSQL locks rows: set DATABASE_URL=postgres://…")
    lapse(Job.objects.enqueue(add, [1, 2], countdown=1))
    start(Job.objects.enqueue(add, [1, 2]))
    with CaptureQueriesContext(connection) as captured:
        update(Job.objects.all())
    locks = [query["sql"] for query in captured if "FOR UPDATE" in query["sql"]]
    assert locks and all("SKIP LOCKED" in sql for sql in locks)


def test_a_queue_that_fails_delays_no_other(published, monkeypatch):
    """For example because it exists with other arguments."""

    def messages_in(queue, broker):
        if queue == "bad":
            raise ValueError("inequivalent arg 'x-max-priority'")
        return 0

    monkeypatch.setattr(sweep, "messages_in", messages_in)
    bad, good = (Job.objects.enqueue(add, [1, 2], countdown=1, queue=q) for q in ("bad", "good"))
    lapse(bad, good)
    for _ in range(9):  # the sweep takes queues in random order
        sweep.send_due()
    assert published == [str(good.pk)]
    assert seconds_until_due(bad) <= 0


def test_a_queue_with_many_jobs_delays_no_other(published, monkeypatch):
    monkeypatch.setattr(sweep, "JOBS_IN_MEMORY", 10)
    many = Job.objects.enqueue_many(add, [[1, 2]] * 100, countdown=1, queue="many")
    few = [Job.objects.enqueue(add, [1, 2], countdown=1, queue=queue) for queue in "abcdef"]
    lapse(*many, *few)
    assert sweep.send_due() == 5
    assert len(published) == 106
    assert max(published.index(str(job.pk)) for job in few) < 10 + len(few)


def test_the_sweep_stops_sending_in_time_to_check_leases(published, monkeypatch):
    now = itertools.count(0, 2)  # seconds; a round may take 5
    monkeypatch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: next(now)))
    lapse(*(Job.objects.enqueue(add, [1, 2], countdown=1, queue=queue) for queue in "abcdef"))
    assert sweep.send_due() == 0
    assert 0 < len(published) < 6


@pytest.mark.parametrize(("countdown", "pause"), [(60, 5), (3, 3), (0.1, 0.5)])
def test_the_sweep_wakes_up_when_a_countdown_ends(published, countdown, pause):
    """And needs no extra query to know when. The others ask for pauses, places and held jobs."""
    Job.objects.enqueue(add, [1, 2])  # due for a check of its message in 30 s
    Job.objects.enqueue(add, [1, 2], countdown=countdown)
    with CaptureQueriesContext(connection) as captured:
        assert sweep.send_due() == pytest.approx(pause, abs=0.3)
    assert len(captured) == 3


def test_the_sweep_at_first_sends_only_jobs_that_were_never_sent(published):
    """It does so until workers have had time to repeat claims that a database crash has lost."""
    enqueue_and_publish(1)
    published.clear()
    new = Job.objects.enqueue(add, [1, 2], countdown=1)
    lapse(*Job.objects.all())
    sweep.send_due(resend=False)
    assert published == [str(new.pk)]
    sweep.send_due()
    assert len(published) == 2


def test_the_sweep_counts_the_messages_in_a_queue():
    broker = app.connection_for_write("memory://")
    assert messages.messages_in("new", broker) == 0
    queue = app.amqp.queues["new"]  # messages_in() has created its binding
    broker.Producer().publish("message", queue.routing_key, exchange=queue.exchange.name)
    assert messages.messages_in("new", broker) == 1


def seconds_waited(job):
    job.refresh_from_db()
    return (timezone.now() - job.due_at).total_seconds()


def test_sending_a_job_again_does_not_reset_its_waiting_time(published, monkeypatch):
    job = Job.objects.enqueue(add, [1, 2], countdown=60)
    assert seconds_waited(job) == pytest.approx(-60, abs=5)
    Job.objects.filter(pk=job.pk).update(due_at=Now() - timedelta(seconds=500))
    for _ in range(2):  # the second time because the message was lost
        lapse(job)
        sweep.send_due()
        published.clear()
        assert seconds_waited(job) == pytest.approx(500, abs=5)
    monkeypatch.setattr(sweep, "send", lambda jobs: 1 / 0)
    lapse(job)
    sweep.send_due()
    assert seconds_waited(job) == pytest.approx(500, abs=5)
    assert seconds_until_due(job) <= 0  # due again, because sending failed


def test_the_waiting_time_starts_again_after_a_crash_or_a_retry(settings):
    crashed, retried = (Job.objects.enqueue(add, [1, 2]) for _ in range(2))
    Job.objects.update(due_at=Now() - timedelta(seconds=500))
    start(crashed)
    start(retried)
    updates.requeue(Job.objects.filter(pk=retried.pk), 30)
    sweep.recover_lapsed()
    assert seconds_waited(crashed) == pytest.approx(-5, abs=3)
    assert seconds_waited(retried) == pytest.approx(-30, abs=3)


@pytest.mark.parametrize("error, rounds", [(None, 1), (OperationalError("away"), 0)], ids=str)
def test_a_round_of_the_sweep_stores_its_time(broker_down, monkeypatch, error, rounds):
    """Also without a broker, but not if the database fails during the round."""
    lapse(Job.objects.enqueue(add, [1, 2], countdown=1))
    monkeypatch.setattr(sweep, "messages_in", lambda queue, broker: 0)
    monkeypatch.setattr(sweep, "connection", Mock())
    if error:
        monkeypatch.setattr(sweep, "send_due", Mock(side_effect=error))
    monkeypatch.setattr(sweep, "touch_liveness_file", Mock(side_effect=[None, SystemExit]))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for _ in range(2):  # rounds, for example of two Beats
        with pytest.raises(SystemExit):
            sweep.sweep_forever(tick_delay=lambda: 0, error_count=lambda: 0)
        sweep.touch_liveness_file.side_effect = [None, SystemExit]
    assert Sweep.objects.filter(ended_at__lte=timezone.now()).count() == rounds
    assert error or broker_down


def test_old_final_jobs_are_deleted_with_their_idempotency_keys(settings, caplog):
    caplog.set_level("INFO")
    old = deliver(Job.objects.enqueue(add, [1, 2], idempotency_key="key"))
    new = deliver(Job.objects.enqueue(add, [1, 2]))
    active = Job.objects.enqueue(add, [1, 2])
    past = Now() - timedelta(days=settings.JOB_RETENTION_DAYS, seconds=1)
    Job.objects.update(created_at=past)
    Job.objects.filter(pk=old.pk).update(finished_at=past)
    Failure.objects.create(job=old, started_at=timezone.now())
    sweep.Purge(Job, "finished_at").delete_page()
    assert "deleted 1 jobs older than 30 days" in caplog.text
    assert set(Job.objects.all()) == {new, active}
    Job.objects.enqueue(add, [1, 2], idempotency_key="key")


def test_old_jobs_that_cannot_be_deleted_do_not_stop_the_purge(settings, caplog):
    jobs = [deliver(Job.objects.enqueue(add, [1, 2])) for _ in range(7)]
    past = Now() - timedelta(days=settings.JOB_RETENTION_DAYS, seconds=1)
    Job.objects.update(finished_at=past)

    def protect(instance, **kwargs):
        if instance in (jobs[2], jobs[5]):
            raise ProtectedError("an order refers to it", {instance})

    pre_delete.connect(protect, sender=Job)
    purge = sweep.Purge(Job, "finished_at", start_over_at=time.monotonic() + 60)
    try:
        purge.delete_page()
    finally:
        pre_delete.disconnect(protect, sender=Job)
    assert set(Job.objects.all()) == {jobs[2], jobs[5]}
    later = deliver(Job.objects.enqueue(add, [1, 2]))
    Job.objects.filter(pk=later.pk).update(finished_at=past + timedelta(milliseconds=500))
    purge.delete_page()  # it skips the two that could not be deleted
    assert set(Job.objects.all()) == {jobs[2], jobs[5]}
    assert caplog.text.count("an order refers to it") == 2
    purge.start_over_at = 0
    purge.delete_page()  # at the end, it starts over
    purge.delete_page()
    assert not Job.objects.exists()


def test_a_job_that_cannot_be_recovered_does_not_stop_others(monkeypatch, caplog):
    jobs = [Job.objects.enqueue(add, [1, 2]) for _ in range(5)]
    for job in jobs:
        start(job)
    requeue = updates.requeue

    def fail(self, *args, **kwargs):
        if self.filter(pk=jobs[3].pk).exists():
            raise IntegrityError("a trigger")
        return requeue(self, *args, **kwargs)

    monkeypatch.setattr(updates, "requeue", fail)
    sweep.recover_lapsed()
    assert list(Job.objects.filter(state="running")) == [jobs[3]]
    assert "a trigger" in caplog.text


@pytest.mark.parametrize("late, touched", [(-60, 1), (29, 1), (31, 0)])
def test_a_beat_that_hangs_does_not_touch_its_liveness_file(monkeypatch, late, touched):
    """Its sweep continues, and stores how late the schedule is."""
    monkeypatch.setattr(sweep, "touch_liveness_file", touch := Mock())
    monkeypatch.setattr("time.sleep", Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        sweep.sweep_forever(tick_delay=lambda: late, error_count=lambda: 0)
    assert touch.call_count == touched
    *_, age, behind = [family.samples[0].value for family in list(Collector().collect())[-3:-1]]
    assert (age, behind) == (pytest.approx(0, abs=3), pytest.approx(max(late, 0), abs=3))


def test_celery_does_not_resend_a_job_that_killed_its_child(monkeypatch):
    """The job would be enqueued a second time, because the row already counts crashes."""
    monkeypatch.setitem(app.conf, "task_retry_on_worker_lost", True)

    @app.task(base=JobTask, name="killer")
    def killer():
        pass

    assert killer.retry_on_worker_lost is False
    app.tasks.unregister("killer")


def test_beat_is_late_once_its_next_tick_is_overdue(monkeypatch):
    now = 100
    monkeypatch.setattr("jobs.beat.time", SimpleNamespace(monotonic=lambda: now))
    scheduler = Mock(tick=Mock(return_value=5))
    late = watch_ticks(SimpleNamespace(scheduler=scheduler))
    now = 140
    assert late() == 40  # no tick has begun
    assert scheduler.tick() == 5 and late() == -5
    now = 146
    assert late() == 1


def test_a_liveness_file_that_cannot_be_written_is_logged(monkeypatch, caplog):
    monkeypatch.setenv("LIVENESS_FILE", "/no/such/folder/alive")
    liveness.touch_liveness_file()
    assert "LIVENESS_FILE cannot be written" in caplog.text


@pytest.mark.parametrize("name", [*set(conf.DEFAULTS) - {"JOB_LIMITS"}, "CELERY_TASK_TIME_LIMIT"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_setting_that_would_lose_jobs_is_refused_at_the_start(monkeypatch, settings, name, value):
    setattr(settings, name, value)
    if name == "CELERY_TASK_TIME_LIMIT":
        monkeypatch.setitem(app.conf, "task_time_limit", value)
    with pytest.raises(ImproperlyConfigured, match=f"{name} is {value}: it must be more than 0"):
        django_apps.get_app_config("jobs").ready()


def test_a_job_of_a_task_that_the_worker_does_not_know_is_due_again_soon(monkeypatch, published):
    """The worker has older code, as in a rolling deploy."""
    monkeypatch.setattr("threading.Timer", in_this_thread)
    monkeypatch.setattr(connection, "close", Mock())
    [job, other] = enqueue_and_publish(2)
    worker.requeue_unknown(str(job.pk), SimpleNamespace(headers={"job": True}))
    worker.requeue_unknown(str(other.pk), SimpleNamespace(headers=None))
    assert seconds_until_due(job) == pytest.approx(5, abs=2)
    assert seconds_until_due(other) == pytest.approx(30, abs=2)


def test_a_job_of_a_task_that_no_worker_knows_comes_back_less_and_less_often(published):
    """Its task may have been removed from the code: then its messages must not keep Beat busy."""
    [job] = enqueue_and_publish(1)
    Job.objects.update(due_at=Now() - timedelta(hours=1))
    worker.requeue_later(Job.objects.filter(pk=job.pk))
    assert seconds_until_due(job) == pytest.approx(360, abs=2)


# Child processes


@pytest.mark.django_db(transaction=True)  # it closes the connection
def test_the_job_of_a_killed_child_is_due_again_soon(monkeypatch, published):
    """But not if another run has claimed it since."""
    monkeypatch.setattr("threading.Timer", in_this_thread)
    job, request = Job.objects.enqueue(add, [1, 2]), SimpleNamespace(request_dict={"job": True})
    worker.assign_run_token(request)
    headers = request.request_dict
    sender = SimpleNamespace(request=SimpleNamespace(headers=headers))
    row, error = Job.objects.filter(pk=job.pk), exceptions.WorkerLostError()
    for token, state, crashes in (uuid.uuid4(), "running", 0), (headers["run_token"], "queued", 1):
        updates.requeue(row)
        claim(job.pk, token)
        worker.recover_job_of_dead_child(sender, str(job.pk), error)
        job.refresh_from_db()
        assert (job.state, job.crashes) == (state, crashes)
    assert seconds_until_due(job) == pytest.approx(5, rel=0.3)


def test_a_worker_looks_for_dead_children_twice_a_second(monkeypatch):
    """Celery does so every 5 s, and the job of a killed child would wait as long."""
    monkeypatch.setattr("threading.Thread", Mock())  # starts no thread of leases
    consumer = Mock()
    consumer.controller.pool_cls = "prefork"
    worker.watch_children(consumer)
    consumer.hub.call_repeatedly.assert_called_once_with(0.5, consumer.pool.maintain_pool)


@pytest.mark.django_db(transaction=True)  # it closes the connection
def test_the_main_process_renews_only_the_runs_of_its_children(monkeypatch, published):
    """Not the run of another worker that took over while this one was frozen."""
    jobs = [Job.objects.enqueue(add, [1, 2]) for _ in range(2)]
    start(jobs[0])
    start(jobs[1])
    runs = [Job.objects.get(pk=jobs[0].pk).run_token, uuid.uuid4()]
    requests = [
        SimpleNamespace(id=str(job.pk), request_dict={"run_token": run})
        for job, run in zip(jobs, runs, strict=True)
    ]
    monkeypatch.setattr(worker.state, "active_requests", requests)
    monkeypatch.setattr("time.sleep", Mock(side_effect=[None, SystemExit]))
    with pytest.raises(SystemExit):
        worker.renew_leases_of_children()
    assert [seconds_until_due(job) > 0 for job in jobs] == [True, False]


def test_a_run_has_the_token_that_the_main_process_chose():
    token = uuid.uuid4()
    act.body = lambda task: str(Job.objects.get().run_token)
    job = Job.objects.enqueue(act)
    result = act.apply(task_id=str(job.pk), headers={"job": True, "run_token": token})
    assert result.get() == str(token)


@pytest.mark.parametrize(("at_work", "seconds"), [((), 10), ((object(),), 25 + 10)])
def test_a_worker_that_hangs_in_its_shutdown_exits(monkeypatch, at_work, seconds):
    """After 10 s without work, or 10 s after all bodies must have ended."""
    now, exits = [0], Mock()

    def sleep(seconds):
        now[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(shutdown, "time", clock)
    monkeypatch.setattr(shutdown, "state", SimpleNamespace(active_requests=at_work))
    monkeypatch.setattr("os._exit", exits)
    shutdown.end_if_stuck(25)
    exits.assert_called_once_with(1)
    assert now == [seconds]


# Constraints of the database


@pytest.mark.parametrize(
    "impossible",
    [
        {"state": "queued"},
        {"state": "queued", "sweep_at": Now(), "finished_at": Now()},
        {"state": "queued", "sweep_at": Now(), "run_token": uuid.UUID(int=1)},
        {"state": "running", "sweep_at": Now()},
        {"state": "running", "run_token": uuid.UUID(int=1)},
        {"state": "succeeded"},
        {"state": "failed", "finished_at": Now(), "sweep_at": Now()},
        {"state": "cancelled", "finished_at": Now(), "run_token": uuid.UUID(int=1)},
        {"state": "lost", "sweep_at": Now()},
    ],
    ids=str,
)
def test_the_database_refuses_impossible_jobs(impossible):
    with pytest.raises(IntegrityError):
        Job.objects.create(task="task", queue="queue", **impossible)


@pytest.mark.django_db(transaction=True)  # it closes the connection
@pytest.mark.parametrize("headers, spared", [({}, False), ({"job": True}, True)])
def test_a_plain_task_starts_with_a_connection_that_works(headers, spared):
    """A job needs no such check: its first query is its claim, which is tried again."""
    connection.ensure_connection()
    task = SimpleNamespace(request=SimpleNamespace(is_eager=False, headers=headers))
    worker.prepare_connection(task)
    assert connection.connection and connection.health_check_done is spared
    connection.close_at = 0  # CONN_MAX_AGE is over
    worker.prepare_connection(task)
    assert not connection.connection


def test_the_priority_of_a_route_reaches_the_broker(monkeypatch):
    app.conf.task_always_eager = False
    monkeypatch.setattr(app.amqp.router, "routes", routes.prepare({add.name: {"priority": 7}}))
    sent = []
    monkeypatch.setattr(app.amqp, "send_task_message", lambda *args, **more: sent.append(more))
    messages.send_one(Job.objects.enqueue(add, [1, 2], countdown=9), None)
    assert (sent[0]["priority"], sent[0]["queue"].name) == (7, "celery")


# Autovacuum and query plans


def test_autovacuum_starts_at_two_percent_of_dead_rows():
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL has autovacuum: set DATABASE_URL=postgres://…")
    with connection.cursor() as cursor:
        cursor.execute("SELECT reloptions FROM pg_class WHERE relname = 'jobs_job'")
        [[options]] = cursor.fetchall()
    assert "autovacuum_vacuum_scale_factor=0.02" in options


@pytest.fixture
def backlog():
    """Thousands of queued, running and final jobs, and statistics from a quiet hour before.

    All rows are in one transaction, so that no autovacuum sees them and updates the statistics.
    """
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL plans with statistics: set DATABASE_URL=postgres://…")
    now = timezone.now()
    final = {"state": "succeeded", "finished_at": now}
    waits = {"state": "queued", "sweep_at": now}
    runs = {"state": "running", "sweep_at": now, "run_token": uuid.UUID(int=1)}
    fields = {"task": add.name, "queue": "celery", "created_at": now}
    Job.objects.bulk_create(Job(**fields, **final) for _ in range(100))
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE jobs_job")
    for state in waits, runs, final:
        keys = [str(uuid.uuid4()) for _ in range(3000)]
        Job.objects.bulk_create(Job(**fields, **state, unique_key=key) for key in keys)


@pytest.fixture
def by_key(backlog):
    """A function that does an UPDATE, and fails unless PostgreSQL finds the rows by primary key."""

    def check(update, *args, **kwargs):
        with CaptureQueriesContext(connection) as captured:
            assert update(*args, **kwargs)
        [sql] = [query["sql"] for query in captured if query["sql"].startswith("UPDATE")]
        assert scanned(sql) - {"jobs_pause"} == {"jobs_job_pkey"}

    return check


def scanned(sql):
    """Return the indexes, or the table, that PostgreSQL reads for a statement."""
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN {sql}")
        plan = "\n".join(line for (line,) in cursor.fetchall())
    return set(re.findall(r"(?:Seq Scan|Index Scan) (?:using|on) (\w+)", plan))


def test_an_update_of_a_job_reads_no_backlog(by_key):
    jobs = [Job.objects.enqueue(add, [1, 2]) for _ in range(3)]
    first, *others = three = [runs.Run(job.pk) for job in jobs]
    for run in three:
        by_key(claim, run.job_id, run.token)
    by_key(runs.jobs_of(three).update, sweep_at=lease_end())
    by_key(first.row.update, cursor=7, sweep_at=lease_end())
    end = {"id": first.job_id, "run_token": first.token, "result": 7, "message": ""}
    by_key(updates.succeed, Job.objects, **end)
    by_key(updates.requeue, others[0].row)
    by_key(Job.objects.filter(pk=jobs[1].pk).cancel)
    by_key(updates.requeue, runs.jobs_of(others))


def test_the_job_of_a_unique_key_is_found_by_its_index(backlog):
    job = Job.objects.enqueue(add, [1, 2], unique="key")
    with CaptureQueriesContext(connection) as captured:
        assert Job.objects.enqueue(add, [1, 2], unique="key") == job
    assert [scanned(query["sql"]) for query in captured] == [{"job_unique_key"}]


@pytest.mark.django_db(transaction=True)  # VACUUM cannot run in a transaction
def test_a_scrape_scans_no_table():
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL plans with statistics: set DATABASE_URL=postgres://…")
    now = timezone.now()
    fields = {"task": add.name, "queue": "celery", "created_at": now}
    final = {"state": "succeeded", "finished_at": now - timedelta(hours=1)}
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE jobs_job CASCADE")  # and what other tests left in its indexes
        Job.objects.bulk_create(Job(**fields, **final) for _ in range(5000))
        Job.objects.bulk_create(Job(**fields, due_at=now, sweep_at=now) for _ in range(50))
        cursor.execute("VACUUM ANALYZE jobs_job")
        with CaptureQueriesContext(connection) as captured:
            list(Collector().collect())
        scans = ["Index Only Scan using job_active", "Index Only Scan using job_held"]
        scans += ["Index Scan using job_finished"]
        queries = [query for query in captured.captured_queries if "jobs_job" in query["sql"]]
        for query, scan in zip(queries, scans, strict=True):
            cursor.execute(f"EXPLAIN {query['sql']}")
            plan = "\n".join(line for (line,) in cursor.fetchall())
            assert scan in plan and plan.count("Scan") == 1, plan


# manage.py check --deploy


def test_correct_settings_pass_the_checks():
    found = {message.id for message in run_checks(include_deployment_checks=True)}
    assert not [each for each in found if each.startswith("jobs.")]


class OtherRouter:
    def db_for_write(self, model, **hints):
        return "other"


WRONG_DATABASES = {
    "alias='other'": lambda settings: setattr(settings, "DATABASE_ROUTERS", [OtherRouter()]),
    "vendor='mysql'": lambda settings: None,
    "use_tz=False": lambda settings: setattr(settings, "USE_TZ", False),
    "isolation=4": lambda settings: None,  # SERIALIZABLE
}


@pytest.mark.parametrize("wrong", WRONG_DATABASES)
def test_the_checks_refuse_a_database_in_which_jobs_would_be_lost(monkeypatch, settings, wrong):
    WRONG_DATABASES[wrong](settings)
    if "mysql" in wrong:
        monkeypatch.setattr(connection, "vendor", "mysql")
    if "isolation" in wrong:
        monkeypatch.setattr(connection, "vendor", "postgresql")
        monkeypatch.setitem(connection.settings_dict["OPTIONS"], "isolation_level", 4)
    [error] = [found for found in run_checks() if found.id == "jobs.E005"]
    assert "PostgreSQL or SQLite as the database 'default', and USE_TZ = True" in error.msg
    assert wrong in error.hint
    with pytest.raises(SystemCheckError, match="jobs.E005"):
        call_command("migrate", skip_checks=False)


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_the_checks_say_that_threads_have_no_time_limit(monkeypatch, pool):
    monkeypatch.setenv("CELERY_WORKER_POOL", pool)
    found = run_checks(include_deployment_checks=True)
    assert ("jobs.I001" in {message.id for message in found}) == (pool == "threads")
