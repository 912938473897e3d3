"""What a Django project gets: database connections that work, and results and schedules in its database."""

import asyncio
import threading
import uuid
from pathlib import Path
from unittest.mock import patch

import pytest
from celery import Celery, Task, states
from servers import LIMIT
from workers import sum_of_chord

django = pytest.importorskip("django")
pytest.importorskip("django_celery_beat")
pytest.importorskip("django_celery_results")

APPS = "django.contrib.contenttypes", "django_celery_beat", "django_celery_results"


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A Django with SQLite in this process."""
    from django.conf import settings
    from django.core.management import call_command

    name = tmp_path_factory.mktemp("database") / "sqlite"
    options = {"ENGINE": "django.db.backends.sqlite3", "NAME": name, "OPTIONS": {"timeout": LIMIT}}
    settings.configure(INSTALLED_APPS=APPS, DATABASES={"default": options}, USE_TZ=True)
    django.setup()
    call_command("migrate", verbosity=0)
    from django.db import connection

    yield connection
    connection.close()


@pytest.fixture
def app(database):
    app = Celery(broker="memory://", backend="django-db", set_as_current=False)
    app.conf.update(worker_consumer="celery_steady.consumer:Consumer", result_extended=True)
    return app


def test_a_worker_replaces_the_backend(app):
    from celery_steady import results
    from celery_steady.django_celery_results import DatabaseBackend

    results.prepare(app, None)
    assert type(app.backend) is DatabaseBackend


@pytest.mark.parametrize(
    ("name", "may_end"),
    [("InterfaceError", True), ("InternalError", True), ("OperationalError", True)]
    + [("DataError", False), ("IntegrityError", False)],
)
def test_an_error_of_a_database_that_restarts_is_repeated(app, name, may_end):
    """django-celery-results knows one of the three."""
    from django.db import utils
    from django_celery_results.backends import database

    from celery_steady.django_celery_results import DatabaseBackend

    error = getattr(utils, name)()
    assert DatabaseBackend(app).exception_safe_to_retry(error) is may_end
    stock = database.DatabaseBackend(app).exception_safe_to_retry(error)
    assert bool(stock) is (name == "InterfaceError")


def test_no_error_is_repeated_within_a_transaction(app):
    from django.db import transaction
    from django.db.utils import OperationalError

    from celery_steady.django_celery_results import DatabaseBackend

    with transaction.atomic():
        assert not DatabaseBackend(app).exception_safe_to_retry(OperationalError())


def test_the_state_retry_does_not_replace_a_result(app):
    from celery_steady.django_celery_results import DatabaseBackend

    backend = DatabaseBackend(app)
    for state in states.READY_STATES:
        backend.store_result(f"id-{state}", None, state)
        backend.store_result(f"id-{state}", None, "RETRY")
        assert backend.get_state(f"id-{state}") == state


@pytest.mark.parametrize("before", [None, "STARTED"])
def test_a_result_that_is_stored_meanwhile_stays(app, before):
    """The state RETRY was looked up, and is not stored yet: the result waits, and replaces it."""
    from django.db import connections

    from celery_steady.django_celery_results import DatabaseBackend

    backend, id = DatabaseBackend(app), str(uuid.uuid4())
    if before:
        backend.store_result(id, None, before)
    started, threads = threading.Event(), []

    def store():
        started.set()
        backend.store_result(id, 5, "SUCCESS")
        connections.close_all()

    def look(execute, sql, *args):
        found = execute(sql, *args)
        if '"status" IN' in sql:
            threads.append(threading.Thread(target=store))
            threads[0].start()
            started.wait()
            threads[0].join(0.5)  # long enough for a result that doesn't wait
            assert threads[0].is_alive()
        return found

    with connections["default"].execute_wrapper(look):
        backend.store_result(id, None, "RETRY")
    threads[0].join()
    assert backend.get_state(id) == "SUCCESS"


@pytest.mark.parametrize("ignored", [False, True])
def test_a_chord_gets_the_results_of_its_members(app, ignored):
    assert sum_of_chord(app, ignored) == 6


@pytest.fixture
def prepare_worker():
    from celery import signals

    from celery_steady import django

    yield django.prepare_worker
    for signal in signals.task_prerun, signals.heartbeat_sent:
        signal.disconnect(django.check_connections)


@pytest.mark.parametrize("name", ["task_prerun", "heartbeat_sent"])
def test_a_lost_connection_is_replaced(database, prepare_worker, name):
    """Before a task, and in the main process, which calls link_error for a child that was lost."""
    from celery import signals

    prepare_worker()
    database.ensure_connection()
    lost = database.connection
    database.errors_occurred = True
    with patch.object(database, "is_usable", return_value=False):
        getattr(signals, name).send(None)
    assert database.connection is not lost


def test_a_connection_in_a_transaction_is_kept(database):
    from django.db import transaction

    from celery_steady.django import check_connections

    with transaction.atomic():
        kept = database.connection
        database.errors_occurred = True
        with patch.object(database, "is_usable", return_value=False):
            check_connections()
        assert database.connection is kept
        database.errors_occurred = False


@pytest.mark.parametrize(("seconds", "lengthened"), [(1, 30), ("1", 30), (100, 100), (None, None)])
def test_a_worker_waits_longer_to_connect_to_its_database(
    database, prepare_worker, seconds, lengthened
):
    options = {"connect_timeout": seconds} if seconds else {}
    with patch.dict(database.settings_dict, OPTIONS=options):
        prepare_worker()
    assert options.get("connect_timeout") == lengthened


def test_only_a_project_of_django_is_prepared(monkeypatch):
    from celery_steady.django import is_used

    monkeypatch.delenv("DJANGO_SETTINGS_MODULE", raising=False)
    assert not is_used()
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "")
    assert not is_used()
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "settings")
    assert is_used()


def test_beat_reads_the_schedules_of_the_database(app):
    from django_celery_beat.models import IntervalSchedule, PeriodicTask

    from celery_steady.django_celery_beat import DatabaseScheduler

    hourly = IntervalSchedule.objects.create(every=1, period="hours")
    PeriodicTask.objects.create(name="each hour", task="task", interval=hourly)
    scheduler = DatabaseScheduler(app, lazy=True)
    assert "each hour" in scheduler.schedule
    assert app.conf.broker_connection_max_retries is None


def test_each_turn_of_beats_loop_touches_its_schedule_file(app, tmp_path):
    file = tmp_path / "schedule"
    app.conf.beat_scheduler = "celery_steady.django_celery_beat:DatabaseScheduler"
    beat = app.Beat(schedule=str(file))
    service = beat.Service(app, schedule_filename=beat.schedule, scheduler_cls=beat.scheduler_cls)
    assert not file.exists()
    for _ in range(2):
        service.scheduler.tick()
        file.unlink()
    service.scheduler._heap = None  # the next turn makes a new one
    with patch.object(service.scheduler, "populate_heap", side_effect=SystemExit):
        pytest.raises(SystemExit, service.scheduler.tick)
    assert not file.exists()


@pytest.fixture
def tasks(database, monkeypatch):
    """The tasks of the current app, which checks look at: those of Celery, and one for each test."""
    app = Celery(broker="amqp://", backend="disabled", set_as_current=True)
    app.conf.update(task_create_missing_queues=False, task_time_limit=600, task_acks_late=True)
    yield app
    app.close()


def nothing():
    """The function of a task."""


def found(check):
    from celery_steady import checks

    return [(each.id, each.msg.split()[0]) for each in getattr(checks, check)(None)]


def test_a_task_whose_queue_does_not_exist_is_found(tasks):
    assert found("check_queues") == []
    tasks.task(name="lost", queue="nowhere")(nothing)
    assert found("check_queues") == [("celery_steady.E001", "The")]


async def coroutine():
    """The function of a task that a class of the project may run."""


def generator():
    yield


def test_a_task_that_would_not_run_is_found(tasks):
    """It's no error, as others may run it: a class of tasks here, or a pool."""

    class Runs(Task):
        def __call__(self, *args, **kwargs):
            return asyncio.run(self.run(*args, **kwargs))

    assert found("check_functions") == []
    tasks.task(name="runs", base=Runs)(coroutine)
    assert found("check_functions") == []
    for function in coroutine, generator:
        tasks.task(name=f"no {function.__name__}")(function)
    assert [id for id, _ in found("check_functions")] == ["celery_steady.W008"] * 2


def test_a_task_with_only_one_time_limit_of_its_own_is_found(tasks):
    tasks.task(name="long", time_limit=800)(nothing)
    assert found("check_time_limits") == []  # there is no soft one to keep
    tasks.conf.task_soft_time_limit = 540
    tasks.task(name="longer", time_limit=800)(nothing)
    tasks.task(name="both", time_limit=800, soft_time_limit=700)(nothing)
    assert ("celery_steady.W002", "longer") in found("check_time_limits")
    assert "both" not in str(found("check_time_limits"))


def test_a_task_that_rabbitmq_delivers_twice_is_found(tasks):
    from django.test import override_settings

    assert found("check_consumer_timeout") == []
    tasks.task(name="slow", time_limit=900)(nothing)
    assert found("check_consumer_timeout") == [("celery_steady.W003", "slow")]
    with override_settings(RABBITMQ_CONSUMER_TIMEOUT=1801):
        assert found("check_consumer_timeout") == []
    for url, count in (["librabbitmq://a", "amqp://b"], 1), ("redis://", 0):
        tasks.conf.broker_url = url
        assert len(found("check_consumer_timeout")) == count


@pytest.mark.parametrize("query", ["", "?ssl_cert_reqs=none", "?ssl_cert_reqs=CERT_NONE"])
def test_tls_without_verification_of_certificates_is_found(tasks, query):
    tasks.conf.broker_url = "rediss://host?ssl_cert_reqs=required"
    assert found("check_redis") == []
    tasks.conf.broker_url = f"rediss://host{query}"
    assert found("check_redis") == [("celery_steady.W006", "The")]


@pytest.mark.parametrize("scheme", ["redis", "sentinel", "valkey"])
def test_a_redis_database_with_two_uses_is_found(tasks, scheme):
    from django.test import override_settings

    tasks.conf.broker_url = f"{scheme}://user:password@host:1/1;{scheme}://host:2/1"

    def with_cache(url):
        with override_settings(CACHES={"default": {"LOCATION": url}}):
            return found("check_redis")

    for other in "redis://host:1/10", Path("cache"), None, ["memcached:1"]:
        assert with_cache(other) == []
    assert with_cache("redis://:secret@host:1/1") == [("celery_steady.W007", "CELERY_BROKER_URL")]
