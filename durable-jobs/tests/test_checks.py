"""Settings with which jobs would be lost stop the start, and the checks find the rest."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import celery
import pytest
from celery import current_app as app
from celery_steady.consumer import Consumer as SteadyConsumer
from django.apps import apps as django_apps
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connection
from django.db.models import CASCADE, SET_NULL
from helpers import add
from settings import SOURCE
from settings import app as app_of_tests

from durable_jobs import checks, conf, messages
from durable_jobs.celery import Celery
from durable_jobs.models import Job
from durable_jobs.tasks import job
from durable_jobs.worker.consumer import Consumer

pytestmark = pytest.mark.django_db
NUMBERS = {name for name, default in conf.DEFAULTS.items() if type(default) is int}


@pytest.mark.parametrize("name", [*sorted(NUMBERS), "CELERY_TASK_TIME_LIMIT"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_setting_that_would_lose_jobs_is_refused_at_the_start(monkeypatch, settings, name, value):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {name: value}
    if name == "CELERY_TASK_TIME_LIMIT":
        monkeypatch.setitem(app.conf, "task_time_limit", value)
    with pytest.raises(
        ImproperlyConfigured, match=rf"{name}.* must be a number greater than 0, not {value}"
    ):
        django_apps.get_app_config("durable_jobs").ready()


class OtherCelery(Celery):
    def send_task(self, *args, **options):
        return super().send_task(*args, **options)


@pytest.mark.parametrize(
    ("kind", "name", "error"),
    [
        (celery.Celery, "default", "No Celery app is loaded: import it in the __init__.py"),
        (celery.Celery, "shop", "The Celery app 'shop' must be a durable_jobs.celery.Celery"),
        (OtherCelery, "shop", "would not call your app's own send_task"),
    ],
)
def test_an_app_that_does_not_know_jobs_is_refused_at_the_start(kind, name, error):
    other = kind(name)  # the current app, whose time limit is None
    try:
        with pytest.raises(ImproperlyConfigured, match=error):
            django_apps.get_app_config("durable_jobs").ready()
    finally:
        app_of_tests.set_current()
        other.close()


@pytest.fixture(autouse=True)
def queue_of_plain_tasks(monkeypatch):
    """Plain tasks, of all files of tests, have a queue of their own."""
    for task in app.tasks.values():
        if not messages.is_job(task):
            monkeypatch.setattr(task, "queue", "cpu", raising=False)


def test_correct_settings_pass_the_checks():
    found = {message.id for message in run_checks(include_deployment_checks=True)}
    assert not [each for each in found if each.startswith("durable_jobs.")]


def test_a_foreign_key_that_deletes_its_rows_with_old_jobs_is_found(monkeypatch):
    def relation(on_delete, label):
        model = Mock(_meta=Mock(app_label=label))
        return Mock(on_delete=on_delete, related_model=model, field=f"{label}.Order.job")

    kinds = (CASCADE, "shop"), (SET_NULL, "other"), (CASCADE, "durable_jobs")
    relations = [relation(*kind) for kind in kinds]
    monkeypatch.setitem(vars(Job._meta), "related_objects", relations)
    [warning] = [found for found in run_checks() if found.id == "durable_jobs.W013"]
    assert warning.msg.startswith("shop.Order.job ")


class OtherRouter:
    def db_for_write(self, model, **hints):
        return "other"


WRONG_DATABASES = {
    "alias='other'": lambda settings: setattr(settings, "DATABASE_ROUTERS", [OtherRouter()]),
    "vendor='mysql'": lambda settings: None,
    "use_tz=False": lambda settings: setattr(settings, "USE_TZ", False),
    "isolation=4": lambda settings: None,  # SERIALIZABLE
    "driver='psycopg2'": lambda settings: None,
}


@pytest.mark.parametrize("wrong", WRONG_DATABASES)
def test_the_checks_refuse_a_database_in_which_jobs_would_be_lost(monkeypatch, settings, wrong):
    WRONG_DATABASES[wrong](settings)
    if "mysql" in wrong:
        monkeypatch.setattr(connection, "vendor", "mysql")
    if "isolation" in wrong:
        monkeypatch.setattr(connection, "vendor", "postgresql")
        monkeypatch.setitem(connection.settings_dict["OPTIONS"], "isolation_level", 4)
    if "driver" in wrong:
        monkeypatch.setattr(connection.Database, "__name__", "psycopg2")
    [error] = [found for found in run_checks() if found.id == "durable_jobs.E005"]
    assert (
        "PostgreSQL (psycopg 3) or SQLite as the database 'default', and USE_TZ = True" in error.msg
    )
    assert wrong in error.hint
    with pytest.raises(SystemCheckError, match="durable_jobs.E005"):
        call_command("migrate", skip_checks=False)


START = """
import sys, settings
settings.USE_TZ = False
settings.app.conf.worker_consumer = "celery.worker.consumer:Consumer"
from celery.__main__ import main
sys.argv = ["celery", "-A", "settings", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("process", ["worker --pool solo", "beat --schedule {folder}/schedule"])
def test_a_worker_and_beat_refuse_a_database_in_which_jobs_would_be_lost(process, tmp_path):
    command = [sys.executable, "-c", START, *process.format(folder=tmp_path).split()]
    variables = {**os.environ, "PYTHONPATH": str(SOURCE), "DJANGO_SETTINGS_MODULE": "settings"}
    options = {"cwd": Path(__file__).parent, "env": variables, "timeout": 40}
    run = subprocess.run(command, capture_output=True, text=True, **options)
    assert run.returncode == 1, run.stderr
    assert "durable_jobs.E005" in run.stderr
    assert ("durable_jobs.E008" in run.stderr) == process.startswith("worker")


@pytest.mark.parametrize(
    ("sender", "refused"),
    [
        (Mock(pool_cls="prefork", consumer_cls=None), True),
        (Mock(pool_cls="threads", consumer_cls=None), False),
        (object(), False),
    ],
    ids=["prefork", "threads", "beat"],
)
def test_only_a_prefork_worker_refuses_a_pool_of_connections(monkeypatch, sender, refused):
    monkeypatch.setattr(connection, "vendor", "postgresql")
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", {"pool": True})
    with pytest.raises(SystemExit, match="E007") if refused else nullcontext():
        checks.refuse_to_start(sender)


class OwnConsumer(Consumer):
    pass


@pytest.mark.parametrize(
    ("kind", "refused"),
    [("celery.worker.consumer:Consumer", True), (SteadyConsumer, True), (OwnConsumer, False)],
)
def test_a_consumer_that_would_not_release_jobs_is_refused(monkeypatch, kind, refused):
    monkeypatch.setitem(app.conf, "worker_consumer", kind)
    assert found_by_checks() == ({"durable_jobs.E008"} if refused else set())
    worker = Mock(pool_cls="threads", consumer_cls=kind)
    with pytest.raises(SystemExit, match="E008") if refused else nullcontext():
        checks.refuse_to_start(worker)


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_the_checks_say_that_threads_have_no_time_limit(monkeypatch, pool):
    monkeypatch.setenv("CELERY_WORKER_POOL", pool)
    found = run_checks(include_deployment_checks=True)
    assert ("durable_jobs.I001" in {message.id for message in found}) == (pool == "threads")


def found_by_checks():
    return {message.id for message in run_checks() if message.id.startswith("durable_jobs.")}


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_checks_refuse_a_connection_pool_that_children_would_inherit(monkeypatch, pool):
    monkeypatch.setenv("CELERY_WORKER_POOL", pool)
    monkeypatch.setattr(connection, "vendor", "postgresql")
    monkeypatch.setitem(connection.settings_dict["OPTIONS"], "pool", True)
    found = [found.id for found in run_checks() if found.id == "durable_jobs.E007"]
    assert found == ["durable_jobs.E007"] * (pool == "prefork")


@pytest.mark.parametrize("method", ["__call__", "apply_async"])
def test_the_checks_find_a_task_class_whose_methods_jobs_do_not_call(monkeypatch, method):
    kind = type("Own", (app.Task,), {method: lambda self: None})
    monkeypatch.setattr(app._get_current_object(), "Task", kind)
    assert found_by_checks() == {"durable_jobs.W011"}


def test_a_task_class_that_jobs_have_as_their_base_is_no_finding(monkeypatch):
    kind = type("Own", (app.Task,), {"__call__": lambda self: None})
    monkeypatch.setattr(app._get_current_object(), "Task", kind)

    @job(base=kind)
    def with_base(self):
        pass

    monkeypatch.setattr(checks, "job_names", lambda: [with_base.name])
    assert found_by_checks() == set()
    app.tasks.unregister(with_base.name)


def test_the_checks_find_a_queue_without_workers(monkeypatch):
    assert found_by_checks() == set()
    monkeypatch.setattr(add, "queue", "other", raising=False)
    assert found_by_checks() == {"durable_jobs.W005"}


def test_the_checks_find_a_job_whose_arguments_are_not_json(monkeypatch):
    monkeypatch.setattr(app.tasks["helpers.plain"], "serializer", "pickle")
    assert found_by_checks() == set()
    for name in checks.job_names()[:2]:
        monkeypatch.setattr(app.tasks[name], "serializer", "pickle")
    [found] = [found for found in run_checks() if found.id == "durable_jobs.W012"]
    assert all(name in found.msg for name in checks.job_names()[:2])


def test_the_checks_find_a_rate_that_each_worker_counts_for_itself(monkeypatch):
    monkeypatch.setattr(app.tasks["helpers.plain"], "rate_limit", "5/s")
    assert found_by_checks() == set()
    monkeypatch.setattr(add, "rate_limit", "5/s")
    assert found_by_checks() == {"durable_jobs.W008"}
