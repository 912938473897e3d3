"""Projects of others change one import: their settings stay, and a killed worker loses nothing."""

import os
import signal
import sys

import pytest
from servers import LIMIT, Process, until
from workers import PATHS

from celery_steady import versions

TASKS = """
import os, time

@shared_task
def slow(number):
    open(f"{number}.started", "a").close()
    until = time.monotonic() + 300
    while not os.path.exists("go") and time.monotonic() < until:
        time.sleep(0.05)
    open(f"{number}.done", "a").close()
"""
FLASK = """
from celery_steady import Celery
from celery import Task, shared_task
from flask import Flask, current_app

def celery_init_app(app):
    class FlaskTask(Task):
        def __call__(self, *args, **kwargs):
            with app.app_context():
                assert current_app.config["OWN"]
                return self.run(*args, **kwargs)

    celery_app = Celery(app.name, task_cls=FlaskTask)
    celery_app.config_from_object(app.config["CELERY"])
    celery_app.set_default()
    app.extensions["celery"] = celery_app
    return celery_app

flask_app = Flask("project")
flask_app.config.from_mapping(OWN=True, CELERY=dict(broker_url=BROKER, task_ignore_result=True, OPTIONS))
app = celery_init_app(flask_app)
"""
FASTAPI = """
from celery_steady import Celery
from fastapi import FastAPI
from fastapi.testclient import TestClient

app = Celery("project")
app.conf.update(broker_url=BROKER, task_ignore_result=True, OPTIONS)
shared_task = app.task
fastapi_app = FastAPI()

@fastapi_app.post("/slow/{number}", status_code=202)
def start(number: int) -> str:
    return slow.delay(number).id

def send(number):
    assert TestClient(fastapi_app).post(f"/slow/{number}").status_code == 202
"""
PLAIN = """
from celery_steady import Celery
from celery import shared_task

app = Celery("project", broker=BROKER, OPTIONS)
app.conf.update(task_ignore_result=True)
"""
DJANGO = """
import django
from celery_steady import Celery
from celery import shared_task
from django.conf import settings

names = {f"CELERY_{name.upper()}": value for name, value in dict(OPTIONS).items()}
settings.configure(CELERY_BROKER_URL=BROKER, CELERY_TASK_IGNORE_RESULT=True, **names)
django.setup()
app = Celery("project")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
"""
OPTIONS = "broker_transport_options={'visibility_timeout': 3}, worker_prefetch_multiplier=2"


def run(tmp_path, name, words):
    """A command in the project's folder."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [tmp_path, *PATHS]))}
    env.pop("DJANGO_SETTINGS_MODULE", None)
    return Process([sys.executable, *words], tmp_path / f"{name}.log", cwd=tmp_path, env=env)


def worker(tmp_path, name):
    words = f"-m celery -A project worker -c 2 -n {name} -l INFO --without-mingle"
    return run(tmp_path, name, words.split())


@pytest.mark.parametrize(
    "project", [FLASK, FASTAPI, PLAIN, DJANGO], ids=["flask", "fastapi", "plain", "django"]
)
def test_a_project_changes_one_import_and_a_killed_worker_loses_nothing(project, redis, tmp_path):
    source = project.replace("=BROKER", f"={redis.url!r}").replace("OPTIONS", OPTIONS) + TASKS
    (tmp_path / "project.py").write_text(source)
    send = (
        "import project\nsend = getattr(project, 'send', project.slow.delay)\n"
        "for number in range(4): send(number)\n"
        "conf = project.app.conf\n"
        "assert conf.task_ignore_result and conf.worker_prefetch_multiplier == 2 and conf.task_acks_late"
    )
    with run(tmp_path, "sender", ["-c", send]) as sender:
        assert sender.wait() == 0
    with worker(tmp_path, "killed") as killed:
        until(lambda: len(list(tmp_path.glob("*.started"))) == 2, "two tasks run")
        killed.kill()
    (tmp_path / "go").touch()
    with worker(tmp_path, "second"):
        until(lambda: len(list(tmp_path.glob("*.done"))) == 4, f"all four ran within {LIMIT} s")


DEFAULTS = """
import os, signal, time
from celery_steady import Celery
from celery.signals import worker_process_init

app = Celery("project", broker=BROKER, broker_connection_retry=False)

@worker_process_init.connect
def be_slow(**kwargs):
    time.sleep(5)
    open(f"{os.getpid()}.up", "a").close()

@app.task(bind=True, default_retry_delay=0)
def kill_child(self):
    if os.path.exists("killed"):
        open(f"{self.request.retries} retries", "a").close()
        while True:
            time.sleep(0.05)
            if os.path.exists("go"):
                return
    open("killed", "a").close()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_keeps_its_tasks_with_no_more_than_the_defaults(redis, tmp_path):
    source = DEFAULTS.replace("=BROKER", f"={redis.url!r}")
    (tmp_path / "project.py").write_text(source)
    redis.kill()
    with worker(tmp_path, "only") as only:
        until(lambda: "Cannot connect" in only.text(), "it waits for its broker")
        redis.start()
        until(lambda: "Connected" in only.text(), "the broker is there")
        with run(
            tmp_path, "sender", ["-c", "import project; project.kill_child.delay()"]
        ) as sender:
            assert sender.wait() == 0
        until(lambda: list(tmp_path.glob("* retries")), "the task runs again")
        # Before Celery 5.7, the message is delivered again.
        retries = int(versions.minor("celery") >= (5, 7))
        assert (tmp_path / f"{retries} retries").exists()
        until(lambda: len(list(tmp_path.glob("*.up"))) == 3, "a child may take time to start")
        only.signal(signal.SIGTERM)
        until(lambda: "Soft shutdown" in only.text(), "the task has a limited time to end")
        (tmp_path / "go").touch()
        assert only.wait() == 0
