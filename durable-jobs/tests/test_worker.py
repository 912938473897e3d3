"""The main process of a worker: killed children, revokes, plain tasks."""

import os
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM, SIGUSR1
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from celery import current_app as app
from celery import shared_task
from celery.app.task import Context
from celery.utils.imports import symbol_by_name
from celery.worker import state as worker_state
from celery.worker.control import Panel
from django.db import connection
from helpers import (
    act,
    add,
    claim,
    claim_and_lapse,
    lapse,
    of_job,
    receive,
    requeue,
    seconds_until_due,
)
from kombu.asynchronous import Hub
from settings import SOURCE

from durable_jobs import pools
from durable_jobs.enqueue import enqueue
from durable_jobs.messages import fields_in, is_job, message_of
from durable_jobs.models import Job
from durable_jobs.process import process
from durable_jobs.tasks import JobTask
from durable_jobs.worker import children, remote_control, runs, startup

pytestmark = pytest.mark.django_db


def in_this_thread(delay, function, args):
    return SimpleNamespace(start=lambda: function(*args))


@pytest.mark.django_db(transaction=True)  # it closes the connection
def test_the_job_of_a_killed_child_is_due_again_soon(monkeypatch, published):
    """But not if another run has claimed it since."""
    monkeypatch.setattr("threading.Timer", in_this_thread)
    job = enqueue(add, [1, 2])
    request = SimpleNamespace(request_dict=message_of(job).headers)
    children.assign_run_token(request)
    headers = request.request_dict
    row = Job.objects.filter(pk=job.pk)
    own_token = fields_in(headers)["run_token"]
    for token, state, crashes in (uuid.uuid4(), "running", 0), (own_token, "queued", 1):
        requeue(row)
        claim(job.pk, token)
        children.recover_later(str(job.pk), headers)
        job.refresh_from_db()
        assert (job.state, job.crashes) == (state, crashes)
    assert seconds_until_due(job) == pytest.approx(5, rel=0.3)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(("has_lapsed", "state"), [(False, "failed"), (True, "queued")])
def test_a_job_whose_child_celery_killed_at_its_time_limit_fails(
    monkeypatch, published, has_lapsed, state
):
    """At once, also before the deadline, which starts later.

    Not if nothing has renewed the lease. Then the database was down, and the function may have ended.
    """
    monkeypatch.setattr("threading.Timer", in_this_thread)
    job = enqueue(add, [1, 2])
    request = SimpleNamespace(request_dict=message_of(job).headers)
    children.assign_run_token(request)
    claim(job.pk, fields_in(request.request_dict)["run_token"])
    if has_lapsed:
        lapse(job)
    for _ in range(2):  # Celery calls on_timeout() and on_failure()
        children.recover_later(str(job.pk), request.request_dict, is_late=True)
    job.refresh_from_db()
    assert (job.state, job.crashes) == (state, has_lapsed)


def test_a_worker_looks_for_dead_children_twice_a_second(monkeypatch):
    """Celery does so every 5 s, and the job of a killed child would wait as long."""
    monkeypatch.setattr("threading.Thread", Mock())  # starts no thread of leases
    monkeypatch.setattr(process, "is_prefork", True)
    hub, pool, before = Hub(), Mock(), time.monotonic()
    children.watch_children(Mock(hub=hub, pool=pool))
    [call] = hub.timer.queue
    assert before + 0.4 <= call.eta <= time.monotonic() + 0.6
    hub.timer.clear()
    hub.timer.apply_entry(call.entry)
    pool.maintain_pool.assert_called_once_with()
    assert [again.entry for again in hub.timer.queue] == [call.entry]
    hub.close()


@pytest.mark.django_db(transaction=True)  # it closes the connection
def test_the_main_process_renews_only_the_runs_of_its_children(monkeypatch, published):
    """Not the run of another worker that took over while this one was frozen."""
    jobs = [enqueue(add, [1, 2]) for _ in range(2)]
    claim_and_lapse(jobs[0])
    claim_and_lapse(jobs[1])
    runs = [Job.objects.get(pk=jobs[0].pk).run_token, uuid.uuid4()]
    requests = [
        SimpleNamespace(id=str(job.pk), request_dict=of_job(run_token=run))
        for job, run in zip(jobs, runs, strict=True)
    ]
    monkeypatch.setattr(children.state, "active_requests", requests)
    monkeypatch.setattr("time.sleep", Mock(side_effect=[None, SystemExit]))
    with pytest.raises(SystemExit):
        children.renew_leases_of_children()
    assert [seconds_until_due(job) > 0 for job in jobs] == [True, False]


def test_a_run_has_the_token_that_the_main_process_chose():
    token = uuid.uuid4()
    act.function = lambda task: str(Job.objects.get().run_token)
    job = enqueue(act)
    receive(act, {"id": str(job.pk), **of_job(run_token=token)})
    assert Job.objects.get().result == str(token)


@pytest.mark.parametrize("error", [SystemExit, RuntimeError])
def test_a_job_that_its_worker_stopped_is_queued_whatever_its_clean_up_raises(monkeypatch, error):
    monkeypatch.setattr(runs, "pool", pools.Threads())
    monkeypatch.setattr(pools, "terminate_handler_fired", lambda: True)
    monkeypatch.setattr(runs, "child_has_crashed", lambda: False)
    act.function = Mock(side_effect=error)
    job = enqueue(act)
    with suppress(SystemExit):
        receive(act, {"id": str(job.pk), **of_job()})
    job.refresh_from_db()
    assert (job.state, job.crashes) == ("queued", 0)


def test_celery_does_not_resend_a_job_that_killed_its_child(monkeypatch):
    """The job would be enqueued a second time, because the row already counts crashes."""
    monkeypatch.setitem(app.conf, "task_retry_on_worker_lost", True)

    @app.task(base=JobTask, name="killer")
    def killer():
        pass

    assert killer.retry_on_worker_lost is False
    app.tasks.unregister("killer")


@shared_task
def plain():
    pass


@pytest.mark.parametrize(
    ("task", "signal", "sent"),
    [(add, None, SIGKILL), (add, "SIGTERM", SIGKILL), (add, "SIGUSR1", SIGUSR1)]
    + [(plain, None, SIGTERM), (plain, "SIGTERM", SIGTERM)],
)
def test_a_child_with_a_job_that_is_terminated_is_not_told_of_a_shutdown(
    monkeypatch, task, signal, sent
):
    """The child of a plain task gets the signal that it would get without jobs."""
    message = Mock(
        headers={"id": "id", "task": task.name}, body="[[], {}, {}]", payload=[[], {}, {}]
    )
    kind = children.JobRequest if is_job(task) else symbol_by_name(task.Request)
    request = kind(message, app=app)
    request.time_start, request.worker_pid = 1, 7
    monkeypatch.setitem(worker_state.requests, "id", request)
    pool = Mock()
    Panel.data["revoke"](Mock(app=app, consumer=Mock(pool=pool)), "id", True, signal)
    pool.terminate_job.assert_called_once_with(7, sent)


@pytest.mark.django_db(transaction=True)  # it closes the connection
def test_revoke_and_terminate_cancel_the_job(monkeypatch, published):
    job, other = enqueue(add, [1, 2]), enqueue(add, [1, 2])
    monkeypatch.setitem(Panel.data, "revoke", lambda state, task_id, **kwargs: "revoked")
    monkeypatch.setitem(Panel.data, "terminate", None)
    monkeypatch.setattr("threading.Timer", in_this_thread)
    remote_control.cancel_revoked_jobs()
    assert Panel.data["revoke"](None, [str(job.pk), "no job"]) == "revoked"
    assert list(Job.objects.filter(state="cancelled")) == [job]
    assert Panel.data["terminate"](None, "SIGTERM", str(other.pk)) == "revoked"
    assert Job.objects.filter(state="cancelled").count() == 2


@pytest.mark.parametrize("header", [None, True, "of a plain task"])
def test_a_plain_task_with_a_header_of_this_name_is_no_job(header):
    assert fields_in(of_job()) and fields_in({"durable_job": header}) is None


@pytest.mark.django_db(transaction=True)  # it closes the connection
@pytest.mark.parametrize("headers, spared", [({}, False), (of_job(), True)])
def test_a_plain_task_starts_with_a_connection_that_works(headers, spared):
    """A job needs no such check: its first query is its claim, which is tried again."""
    connection.ensure_connection()
    task = SimpleNamespace(request=Context(headers))
    startup.check_connections(task)
    assert connection.health_check_done is spared
    connection.close_at = 0  # CONN_MAX_AGE is over
    startup.check_connections(task)
    assert bool(connection.connection) is spared


WORKER = """
import os, sys, settings, threading
import django; django.setup()
from celery import signals
from celery.worker.consumer import Consumer
from celery_steady.tasks import SteadyRequest
from django.db import connection
from helpers import add, of_job, plain
from durable_jobs.pools import shutting_down
from durable_jobs.worker import execution, shutdown
from durable_jobs.worker.children import JobRequest
settings.app.conf.worker_soft_shutdown_timeout = int(sys.argv[2])
Consumer.start = lambda consumer: None
ended = []
shutdown.requeue_and_exit = lambda *args: ended.append(args)
def start():
    global worker, consumer
    worker = settings.app.Worker(pool=sys.argv[1], concurrency=1, hostname="one@here")
    consumer = worker.consumer
    consumer.update_strategies()
    consumer.start()
thread = threading.Thread(target=start)
thread.start(), thread.join()
consumer.announce_shutdown()
assert consumer.is_stopping and not shutting_down.value  # as in a test with a worker of its own
start()
path = f"{type(consumer).__module__}:{type(consumer).__qualname__}"
assert path == "durable_jobs.worker.consumer:Consumer"
assert all(issubclass(task.Request, SteadyRequest) for task in (add, plain))
assert [issubclass(task.Request, JobRequest) for task in (add, plain)] == [True, False]
def are_traced():
    return [getattr(task.__trace__, "func", None) is execution.trace for task in (add, plain)]
assert are_traced() == [True, False]
assert all(hasattr(task.run, "_replaces_errors") for task in (add, plain))
connection.ensure_connection()
add.push_request(**of_job())
signals.task_prerun.send(add, task=add)
assert connection.connection and connection.health_check_done
plain.push_request()
signals.task_prerun.send(plain, task=plain)
assert connection.connection and not connection.health_check_done
signals.worker_shutting_down.send("other@here", sig="", how="", exitcode=0)
assert not shutting_down.value
worker.exitcode = 3
consumer.announce_shutdown()  # as Consumer.stop() does after an error
for _ in range(100):
    if ended or sys.argv[1] == "prefork":
        break
    threading.Event().wait(0.05)
assert shutting_down.value and ended == ([] if sys.argv[1] == "prefork" else [(consumer, 3)]), ended
os._exit(0)
"""


@pytest.mark.parametrize("timeout", [0, 20])
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_has_the_consumer_of_jobs(pool, timeout):
    """Its jobs raise what they like, and are released at its end, even without a soft shutdown."""
    command = [sys.executable, "-c", WORKER, pool, str(timeout)]
    variables = {**os.environ, "PYTHONPATH": str(SOURCE), "DJANGO_SETTINGS_MODULE": "settings"}
    subprocess.run(command, cwd=Path(__file__).parent, env=variables, check=True, timeout=60)


CHILD = """
import settings
from celery.concurrency.prefork import process_initializer
settings.app.conf.imports = ["helpers"]
process_initializer(settings.app, "one@here")
from helpers import add, plain
from durable_jobs.worker import execution
traced = [getattr(task.__trace__, "func", None) is execution.trace for task in (add, plain)]
assert traced == [True, False]
"""


def test_a_child_that_is_a_new_interpreter_claims_jobs():
    """As on macOS, where billiard forks none."""
    command, variables = [sys.executable, "-c", CHILD], {"FORKED_BY_MULTIPROCESSING": "1"}
    variables |= {**os.environ, "PYTHONPATH": str(SOURCE), "DJANGO_SETTINGS_MODULE": "settings"}
    subprocess.run(command, cwd=Path(__file__).parent, env=variables, check=True, timeout=60)
