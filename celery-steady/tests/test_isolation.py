"""The package changes nothing in Celery, kombu and billiard, and no other app of the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery, shared_task
from celery.worker.consumer import Consumer
from kombu.transport.redis import Transport
from servers import LIMIT
from workers import PATHS, in_thread

POOLS = ["solo", "threads"]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
STEADY = {"worker_consumer": "celery_steady.consumer:Consumer"}


@shared_task
def add(x, y):
    return x + y


@shared_task
def leave():
    sys.exit()


def make_app(broker, backend, **conf):
    app = Celery(broker=broker, backend=backend, set_as_current=False)
    app.conf.update(conf)
    return app


@pytest.fixture(params=["memory", "redis"])
def urls(request):
    """The settings of a broker and a result backend."""
    if request.param == "memory":
        return {"broker": "memory://", "backend": "cache+memory://"}
    url = request.getfixturevalue("redis").url
    return {"broker": url, "backend": url, "broker_transport": "celery_steady.redis:Transport"}


def run(app, pool):
    """Run a task in a worker of this app, in another thread of this process."""
    with in_thread(app, pool) as worker:
        assert app.tasks[add.name].delay(2, 3).get(timeout=LIMIT, interval=0.01) == 5
        return type(worker.consumer)


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_in_a_thread_ends_with_a_limited_shutdown_too(urls, pool):
    """It must neither handle signals nor end the process, which is the test's."""
    run(make_app(**urls, **STEADY, worker_soft_shutdown_timeout=1), pool)


@pytest.mark.parametrize("pool", POOLS)
def test_another_app_of_the_process_is_as_it_was(urls, pool):
    stock = {name: url for name, url in urls.items() if name != "broker_transport"}
    other = make_app(**stock)
    before = {**other.conf}
    assert run(make_app(**urls, **STEADY), pool).__module__ == "celery_steady.consumer"
    assert {**other.conf} == before
    task = other.tasks[add.name]
    assert task.Request == make_app(**stock).tasks[add.name].Request
    assert not hasattr(task.run, "_lets_fail")
    if "redis" in stock["broker"]:
        assert type(other.connection().transport) is Transport
    assert type(other.backend).__module__.startswith("celery.")
    assert run(other, pool) is Consumer


def test_a_task_of_another_app_fails_as_celerys_does(urls):
    """A shared task has a function for each app."""
    other = make_app(urls["broker"], urls["backend"])
    run(make_app(**urls, **STEADY), "threads")
    with pytest.raises(SystemExit):
        other.tasks[leave.name]()


def test_no_class_and_no_module_of_celery_is_changed(redis):
    """In a new process, which imports the package only after the first look."""
    script = Path(__file__).with_name("changes.py")
    command = [sys.executable, script, redis.url]
    ended = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=2 * LIMIT)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stdout + ended.stderr


def test_a_process_of_redis_imports_no_client_of_aws():
    """boto3 takes a second and 40 MB, also in a worker that doesn't use it."""
    code = (
        "import sys, celery_steady.consumer, celery_steady.redis; assert 'boto3' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENV)


def test_an_app_imports_no_worker():
    """Some pools, such as celery-aio-pool's, replace functions that a worker's module imports after them."""
    code = """
import sys
from celery_steady import Celery, tasks
app = Celery(broker="redis://", backend="redis://")
app.connection_for_write().transport, app.backend
assert "celery.worker.consumer" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True, env=ENV)


def test_a_type_checker_sees_the_class_that_it_knows():
    code = """
import typing
from celery import Celery
typing.TYPE_CHECKING = True
import celery_steady
assert vars(celery_steady)["Celery"] is Celery"""
    subprocess.run([sys.executable, "-c", code], check=True, env=ENV)
