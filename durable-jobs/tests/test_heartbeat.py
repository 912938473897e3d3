"""The heartbeat: what a worker writes about itself and how often, and how its row goes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from ctypes import c_bool
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from celery import shared_task
from celery.concurrency import get_implementation
from celery.worker import state
from django.db import Error, connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from helpers import ago, runs_on, scrape, start

from durable_jobs import statistics
from durable_jobs.beat import purge
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job, Worker
from durable_jobs.pools import pool
from durable_jobs.process import process
from durable_jobs.tasks import JobTask
from durable_jobs.worker import forks, heartbeat, shutdown


@shared_task(base=JobTask)
def greet():
    pass


def queue(name):
    return SimpleNamespace(name=name)


@pytest.fixture
def consumer(db, monkeypatch):
    """The consumer of a ready worker, whose thread has not started."""
    monkeypatch.setattr(heartbeat.heartbeat, "row_key", {})
    monkeypatch.setattr(heartbeat.heartbeat, "lock", threading.Lock())
    monkeypatch.setattr(heartbeat, "shutting_down", c_bool(False))
    monkeypatch.setattr("atexit.register", Mock())
    monkeypatch.setattr(heartbeat.pool, "start_thread", Mock())
    consumer = SimpleNamespace(
        hostname="one@host",
        pool=SimpleNamespace(num_processes=4),
        controller=SimpleNamespace(pool_cls=get_implementation("threads"), autoscaler=None),
        connection=object(),
        task_consumer=SimpleNamespace(queues=[queue("io"), queue("celery")]),
    )
    heartbeat.heartbeat.start(consumer)
    return consumer


@pytest.fixture
def beats(consumer, closes, monkeypatch):
    """A function that runs the thread for so many heartbeats, and returns its pauses."""

    class Done(BaseException):
        pass

    def beats(count):
        pauses = []

        def sleep(seconds):
            pauses.append(seconds)
            if len(pauses) == count:
                raise Done

        monkeypatch.setattr(pool, "sleep", sleep)
        with pytest.raises(Done):
            heartbeat.heartbeat.beat(consumer)
        return pauses

    return beats


@pytest.fixture
def closes(monkeypatch):
    """A list with an item for each time the thread closes its connection, which stays open."""
    closes = []
    opened = SimpleNamespace(vendor=connection.vendor, close=lambda: closes.append(1))
    monkeypatch.setattr(forks, "connection", opened)
    return closes


def row():
    return Worker.objects.get()


def write(consumer):
    heartbeat.heartbeat.write(consumer)


def test_the_row_says_what_a_worker_is(consumer, settings, monkeypatch):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"VERSION": Path("v" * 300)}
    monkeypatch.setattr(state, "active_requests", [object(), object()])
    write(consumer)
    shown = row()
    assert (shown.name, shown.pool, shown.slots, shown.busy) == ("one@host", "threads", 4, 2)
    assert (shown.queues, shown.version) == (["celery", "io"], "v" * 255)
    consumer.task_consumer.queues.pop()
    consumer.pool.num_processes = 5
    Worker.objects.update(seen_at=ago(60))
    write(consumer)
    assert (row().queues, row().slots, row().started_at) == (["io"], 5, shown.started_at)
    assert statistics.alive().exists()


def test_the_slots_of_autoscaling_are_its_maximum(consumer):
    consumer.controller.autoscaler = SimpleNamespace(max_concurrency=10)
    write(consumer)
    assert row().slots == 10


def test_a_worker_without_broker_or_that_ends_takes_from_no_queue(consumer):
    for owner, name, value in (
        (consumer, "connection", None),
        (consumer, "task_consumer", None),
        (heartbeat.shutting_down, "value", True),
    ):
        before = getattr(owner, name)
        setattr(owner, name, value)
        write(consumer)
        assert row().queues == []
        setattr(owner, name, before)
        write(consumer)
        assert row().queues == ["celery", "io"]


def test_a_worker_writes_at_once_then_one_statement_in_ten_seconds(consumer, beats):
    assert beats(1) == [10] and row()
    with CaptureQueriesContext(connection) as captured:
        heartbeat.heartbeat.write(consumer)
        heartbeat.heartbeat.write(consumer)
    assert len(captured) == 2, [query["sql"] for query in captured]
    assert beats(5) == [10] * 5


def test_the_thread_outlives_errors_and_closes_its_connection(consumer, beats, closes, caplog):
    write_row, errors = heartbeat.heartbeat.write, [Error("away"), AttributeError("no pool")]

    def fail_twice(*args):
        if errors:
            raise errors.pop(0)
        write_row(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat.heartbeat, "write", fail_twice)
        assert beats(3) == [10] * 3
    assert caplog.text.count("cannot write the heartbeat") == 2
    assert len(closes) == 3 and row()


def test_a_restarted_worker_takes_over_the_row_of_a_killed_one(consumer, caplog):
    old = timezone.now() - timedelta(hours=1)
    Worker.objects.create(
        name="one@host", pool="x", slots=9, busy=9, queues=[], version="", started_at=old
    )
    write(consumer)
    assert row().started_at > old and row().slots == 4
    assert not caplog.text


def test_two_workers_with_one_name_share_a_row(consumer, monkeypatch):
    write(consumer)
    first = dict(heartbeat.heartbeat.row_key)
    heartbeat.heartbeat.start(consumer)  # the other one
    consumer.pool.num_processes = 8
    write(consumer)
    assert row().slots == 8
    other = dict(heartbeat.heartbeat.row_key)
    monkeypatch.setattr(heartbeat.heartbeat, "row_key", first)
    heartbeat.heartbeat.forget()
    assert row().slots == 8  # it has deleted only its own
    monkeypatch.setattr(heartbeat.heartbeat, "lock", threading.Lock())
    write(consumer)
    monkeypatch.setattr(heartbeat.heartbeat, "row_key", other)
    write(consumer)
    assert row().started_at == other["started_at"]


def test_a_row_that_was_deleted_comes_back(consumer):
    write(consumer)
    Worker.objects.all().delete()
    write(consumer)
    assert row()


def test_a_worker_that_ends_deletes_its_row_and_writes_none_after_it(consumer, monkeypatch):
    write(consumer)
    heartbeat.atexit.register.assert_called_once_with(heartbeat.heartbeat.forget)
    heartbeat.heartbeat.forget()
    assert not Worker.objects.exists()
    monkeypatch.setattr(heartbeat.heartbeat, "write", late := Mock())
    threading.Thread(target=heartbeat.heartbeat.beat, args=[consumer], daemon=True).start()
    time.sleep(0.2)
    late.assert_not_called()


def test_a_process_without_a_heartbeat_forgets_nothing(db, monkeypatch):
    monkeypatch.setattr(heartbeat.heartbeat, "row_key", {})
    with CaptureQueriesContext(connection) as captured:
        heartbeat.heartbeat.forget()
    assert not captured and not heartbeat.heartbeat.lock.locked()


def test_a_worker_ends_without_the_database(consumer, caplog, monkeypatch):
    monkeypatch.setattr(heartbeat, "LOCK_SECONDS", 0.1)
    write(consumer)
    with heartbeat.heartbeat.lock:  # a heartbeat hangs
        heartbeat.heartbeat.forget()
    assert row()
    monkeypatch.setattr(Worker.objects, "filter", Mock(side_effect=Error("away")))
    heartbeat.heartbeat.forget()
    assert "could not delete this worker's row" in caplog.text


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("model", [Worker, Job])
def test_a_worker_ends_while_a_table_is_locked(consumer, published, model, monkeypatch):
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has no locks of tables: set DATABASE_URL=postgres://…")
    job = enqueue(greet)
    monkeypatch.setattr(process, "runs", {1: start(job)})
    monkeypatch.setattr(pool, "sleep", Mock())
    monkeypatch.setattr("os._exit", exits := Mock())

    def end():
        with suppress(Error), closing(connection):
            shutdown.requeue_and_exit(Mock(), 1)

    with ThreadPoolExecutor() as threads, transaction.atomic():
        connection.cursor().execute(f"LOCK TABLE {model._meta.db_table}")
        threads.submit(end).result(10)
    exits.assert_called_once_with(1)
    job.refresh_from_db()
    assert job.state == ("running" if model is Job else "queued")


def test_a_worker_that_leaves_without_celery_deletes_its_row(consumer, monkeypatch):
    write(consumer)
    monkeypatch.setattr(pool, "sleep", Mock())
    monkeypatch.setattr("os._exit", exits := Mock())
    shutdown.requeue_and_exit(Mock(), 1)
    exits.assert_called_once_with(1)
    assert not Worker.objects.exists()


def test_a_worker_is_stale_after_30_seconds_and_gone_after_an_hour(consumer, monkeypatch):
    write(consumer)
    monkeypatch.setattr(purge, "close_old_connections", Mock())
    for seconds, is_alive, is_there in (29, 1, 1), (31, 0, 1), (3590, 0, 1), (3610, 0, 0):
        Worker.objects.update(seen_at=ago(seconds))
        assert statistics.alive().count() == is_alive
        monkeypatch.setattr("time.sleep", Mock(side_effect=[None, StopIteration]))
        with pytest.raises(StopIteration):
            purge.clean_forever()
        assert Worker.objects.count() == is_there


def test_workers_are_read_from_the_database_that_they_write(replica):
    assert statistics.alive().db == "default"


def test_the_metrics_count_workers_and_slots(consumer, staff_api, monkeypatch):
    monkeypatch.setattr(state, "active_requests", [object()])
    write(consumer)
    fields = {"pool": "prefork", "version": "", "started_at": timezone.now()}
    queues = {"two@host": ["io", "new"], "without broker": [], "dead": ["cpu"]}
    for name, names in queues.items():
        Worker.objects.create(name=name, slots=2, busy=2, queues=names, **fields)
    Worker.objects.filter(name="dead").update(seen_at=ago(31))
    found = scrape(staff_api)
    for beat in "durable_jobs_sweep_age_seconds", "durable_jobs_beat_late_seconds":
        del found[beat]
    assert found == {
        "durable_jobs_workers": 3,
        "durable_jobs_slots celery": 4,
        "durable_jobs_busy_slots celery": 1,
        "durable_jobs_slots io": 6,
        "durable_jobs_busy_slots io": 3,
        "durable_jobs_slots new": 2,
        "durable_jobs_busy_slots new": 2,
    }
    shown = staff_api.get("/metrics").content.decode()
    assert (
        'durable_jobs_slots{queue="cpu"} 0.0' in shown
        and 'durable_jobs_busy_slots{queue="cpu"} 0.0' in shown
    )


def test_the_metrics_count_a_job_without_a_live_worker_as_stalled(staff_api):
    for seconds in 10, -1, -1:
        Job.objects.filter(pk=enqueue(greet).pk).update(**runs_on(seconds))
    found = scrape(staff_api)
    assert (found["durable_jobs_running celery"], found["durable_jobs_stalled celery"]) == (1, 2)
