"""The settings in celery-steady's README, in projects that weren't made from this template."""

import os
import re
import subprocess
import sys
import time

import pytest

from harness.bake import STEADY
from harness.blocks import code
from harness.libraries import environment
from harness.project import Project, started, wait_for
from harness.servers import Redis
from test_wheel import STEADY_WHEEL

README = (STEADY / "README.md").read_text("utf-8")
SETTINGS = code(README, "\nworker_consumer")
DJANGO_SETTINGS = re.sub(r"^\w+", lambda name: f"CELERY_{name[0].upper()}", SETTINGS, flags=re.M)
RECOVERED_WITHIN = 150  # seconds, with the defaults
# Notes each start, and doesn't end.
TASKS = """

@{decorator}
def endless(path):
    import time
    with open(path, "a") as file:
        file.write("started\\n")
    time.sleep(600)
"""
# For cookiecutter-django: another one, or a clone
SOURCE = os.environ.get(
    "COOKIECUTTER_DJANGO", "https://github.com/cookiecutter/cookiecutter-django"
)


@pytest.fixture
def bare(tmp_path):
    """A Celery project without Django, of three files."""
    project = Project(tmp_path / "bare")
    project.mkdir()
    environment(project, STEADY_WHEEL, "celery[redis]")
    (project / "celeryconfig.py").write_text(SETTINGS)
    app = 'from celery import Celery\n\napp = Celery("tasks", config_source="celeryconfig")\n'
    (project / "tasks.py").write_text(app + TASKS.format(decorator="app.task"))
    return project


@pytest.fixture
def cookiecutter_django(tmp_path):
    """What the newest cookiecutter-django writes. Its hook would download Python 3.14."""
    bake = [sys.executable, "-m", "cookiecutter", "--no-input", "--accept-hooks", "no"]
    answers = ["project_slug=shop", "use_celery=y"]
    subprocess.run([*bake, "--output-dir", tmp_path, SOURCE, *answers], check=True)
    project = Project(tmp_path / "shop")
    # What its requirements for production bring, without those that need a compiler
    more = "celery[redis]", "psycopg[binary]", "-r", project / "requirements/base.txt"
    environment(project, STEADY_WHEEL, *more, python="3.13")
    own = 'from .base import *\nSECRET_KEY = "secret"\n'
    (project / "config/settings/steady.py").write_text(own + DJANGO_SETTINGS)
    project.append("shop/users/tasks.py", TASKS.format(decorator="shared_task"))
    return project


def recovery(project, app, task, folder, **variables):
    """Kill a worker that runs a task. Return after how many seconds another one starts it."""
    note = folder / "starts"
    with started(Redis(folder / "broker")) as [broker]:
        url = broker.variables["CELERY_BROKER_URL"]
        variables |= {"CELERY_BROKER_URL": url, "REDIS_URL": url}
        command = f"celery -A {app} worker --concurrency 2 -l info"
        first, second = (
            project.process(command, folder / f"{name}.log", says=" ready.", **variables)
            for name in ("first", "second")
        )
        with started(first):
            call = [".venv/bin/celery", "-A", app, "call", task, "--args", f'["{note}"]']
            project.call(*call, **variables)
            wait_for(note.exists)
            first.kill()
            killed = time.monotonic()
        with started(second):
            wait_for(lambda: note.read_text().count("started") == 2)
            return time.monotonic() - killed


def test_a_killed_workers_task_runs_again_in_a_project_without_django(bare, tmp_path):
    assert recovery(bare, "tasks", "tasks.endless", tmp_path) < RECOVERED_WITHIN
    assert not list(bare.glob(".venv/lib/*/site-packages/django"))


def test_it_needs_no_package_but_celery(tmp_path):
    """A project with RabbitMQ has no redis-py and no boto3. A lock file may hold old packages."""
    lowest = "--resolution=lowest-direct", "celery", "billiard>=4", "amqp>=5"
    environment(tmp_path, STEADY_WHEEL, *lowest)
    modules = "celery_steady.consumer, celery_steady.beat, celery_steady.rabbitmq"
    Project(tmp_path).call(".venv/bin/python", "-c", f"import {modules}")


@pytest.mark.nightly  # it needs GitHub, or COOKIECUTTER_DJANGO=a clone
def test_a_killed_workers_task_runs_again_in_cookiecutter_django(cookiecutter_django, tmp_path):
    variables = {
        "DJANGO_SETTINGS_MODULE": "config.settings.steady",
        "DATABASE_URL": f"sqlite:///{tmp_path}/db.sqlite3",
    }
    task = "shop.users.tasks.endless"
    assert recovery(cookiecutter_django, "config.celery_app", task, tmp_path, **variables) < (
        RECOVERED_WITHIN
    )
