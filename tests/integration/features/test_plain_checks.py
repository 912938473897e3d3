"""What `make`, the checks and the admin of the default output do, and a recipe of its pages."""

import re

import pytest

from harness.bake import DEFAULTS
from harness.blocks import code
from harness.outputs import both_outputs, outputs, plain_output, working
from harness.project import Console, path_without, started, wait_for

TASKS = """

import functools
from celery import shared_task


def decorated(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


@shared_task
async def coroutine():
    pass


@shared_task(bind=True, autoretry_for=(OSError,))
async def retried(self):
    pass


@shared_task
@decorated
async def decorated_coroutine():
    pass


@shared_task
def generator():
    yield 1


@shared_task
async def asynchronous_generator():
    yield 1
"""
SCHEDULE = """
from datetime import timedelta
from celery.schedules import crontab, schedule

CELERY_BEAT_SCHEDULE |= {
    "day": {"task": "t", "schedule": timedelta(days=1)},
    "seconds": {"task": "t", "schedule": 7200.0},
    "object": {"task": "t", "schedule": schedule(7200)},
    "hour": {"task": "t", "schedule": timedelta(hours=1)},
    "minute": {"task": "t", "schedule": 60},
    "crontab": {"task": "t", "schedule": crontab(hour=3)},
}
"""


def found(project, command, check, **variables):
    """Return the names in the messages of this check, which must fail the command."""
    with pytest.raises(AssertionError) as error:
        project.manage(*command.split(), **variables)
    return set(re.findall(rf"{check}\) .*?([\w.]+)(?= is due|: it is async)", str(error.value)))


@both_outputs
def test_a_task_that_would_not_run_is_found(copied):
    """Celery calls it, and gets an object that nothing uses. A job may be async."""
    copied.append("orders/tasks.py", TASKS)
    names = {"coroutine", "retried", "decorated_coroutine", "generator", "asynchronous_generator"}
    assert found(copied, "check --fail-level WARNING", "steady.W008") == {
        f"orders.tasks.{name}" for name in names
    }


@both_outputs
def test_an_interval_that_deploys_may_start_anew_is_found(copied):
    copied.append("config/settings.py", SCHEDULE)
    command = "check --deploy --fail-level WARNING"
    variables = {**copied.production(), "DEBUG": "False", "FLOWER_BASIC_AUTH": "a:secret"}
    assert found(copied, command, "steady.W004", **variables) == {"day", "seconds", "object"}


UPLOAD = """
from django.db import models
from django.test import override_settings
from api.checks import check_uploads

class Report(models.Model):
    file = models.FileField()

    class Meta:
        app_label = "users"

for folder in "", "media", "/srv/media":
    with override_settings(MEDIA_ROOT=folder):
        print("found", len([*check_uploads(None)]))
Report._meta.get_field("file").storage = type("S3", (), {"location": ""})()
print("found", len([*check_uploads(None)]))
"""


@outputs({**DEFAULTS, "result_backend": "none", "deployment": "kubernetes"})
def test_uploads_that_the_read_only_root_refuses_are_found(project):
    printed = project.manage("shell", "-v0", "-c", UPLOAD)
    assert re.findall("found ([0-9])", printed) == ["1", "1", "0", "0"]


@both_outputs
def test_a_source_map_that_is_missing_is_found_before_the_deploy(copied):
    (copied / "orders/static").mkdir()
    (copied / "orders/static/own.js").write_text("//# sourceMappingURL=missing.map")
    with pytest.raises(AssertionError, match="missing.map"):
        copied.call(".venv/bin/python", "-m", "pytest", "tests/test_static_files.py")


@plain_output
def test_sigterm_to_make_stops_everything(project):
    """It comes from an IDE, `timeout` or CI. Ctrl-C comes to all processes of the terminal."""
    with project.up() as site:
        site.process.stop()
        wait_for(lambda: not site.processes())


WORKSPACE = """
[project]
name = "workspace"
version = "1"
requires-python = ">=3.11"

[tool.uv.workspace]
members = ["*"]
"""


@plain_output
def test_make_works_where_others_have_their_own_environments(copied, tmp_path):
    """A development container names its own, and a folder above is a workspace of uv.

    Neither is that one used, nor does half of it stay behind. pip, which installs uv if nobody has
    it, is set to install for the user.
    """
    (copied / ".venv").unlink()
    other, path = tmp_path / "other", path_without("uv", folder=tmp_path / "bin")
    (tmp_path / "pyproject.toml").write_text(WORKSPACE)
    variables = {"UV_PROJECT_ENVIRONMENT": other, "VIRTUAL_ENV": other, "PIP_USER": 1}
    copied.call("make", "check", PATH=path, **variables)
    assert (copied / ".venv/bin/celery").exists() and not other.exists()


RUN = """
import threading, time
from unittest.mock import patch
from django.db import connection, connections
from orders.tasks import import_prices
runs, entered, leave = [], threading.Event(), threading.Event()

def work(seconds):
    runs.append(1)
    entered.set()
    leave.wait(60)

def run():
    try:
        import_prices()
    finally:
        connections.close_all()

with patch("time.sleep", work):
    first = threading.Thread(target=run)
    first.start()
    entered.wait(60)
    import_prices()  # returns: the first one runs
    leave.set()
    first.join()
    meanwhile = len(runs)
    import_prices()
with patch("time.sleep", side_effect=OSError):
    try:
        import_prices()
    except OSError:
        pass
with patch("time.sleep", runs.append):
    second = threading.Thread(target=run)
    second.start()
    second.join()
result = [meanwhile, len(runs)]
"""


@plain_output
def test_a_periodic_task_with_the_lock_of_the_page_does_not_overlap_itself(
    copied, database, tmp_path
):
    recipe = code(copied.read("docs/tasks.md"), "pg_try_advisory_lock")
    copied.append("orders/tasks.py", recipe)
    variables = {"DATABASE_URL": f"{database.url}/postgres"}
    with started(Console(copied, tmp_path / "log", **variables)) as [console]:
        assert console.ask(RUN) == [1, 3]


FAIL = """

@shared_task(ignore_result=True)
def read(path, text="", **more):
    open(path).close()
    open(path + " was read", "w").close()


@shared_task
def fail():
    raise ValueError
"""
AGAIN = """
from django.test import Client
from django_celery_results.models import TaskResult
from users.models import User
user, _ = User.objects.get_or_create(username="staff", is_staff=True)
from django.contrib.auth.models import Permission
user.user_permissions.set(Permission.objects.filter(codename__in=may))
client = Client(raise_request_exception=False, headers={"host": "localhost"})
client.force_login(user)
url, rows = "/admin/django_celery_results/taskresult/", [row.pk for row in TaskResult.objects.all()]
page = client.post(url, {"action": "run_again", "_selected_action": rows}, follow=True)
result = page.content.decode()
"""
STATES = """
from django_celery_results.models import TaskResult
result = sorted(TaskResult.objects.values_list("status", flat=True))
"""


@outputs({**DEFAULTS, "result_backend": "database"})
def test_a_failed_task_runs_again_from_the_admin(copied, tmp_path):
    """Not with cut arguments, not a step that didn't start, and not for who may only see it."""
    copied.append("orders/tasks.py", FAIL)
    path = tmp_path / "é 'quoted' file"

    def again(asked, *may):
        return asked.ask(f"may = {may!r}{AGAIN}")

    with working(copied, tmp_path, WORKER_CONCURRENCY=1) as (_, console):
        send = "from orders.tasks import read; result = read.delay({!r}, {!r}, more=[1]).id"
        for text in "short", "long" * 1000:
            console.ask(send.format(str(path), text))
        wait_for(lambda: console.ask(STATES) == ["FAILURE"] * 2)
        path.touch()
        again(console, "view_taskresult")
        assert console.ask(STATES) == ["FAILURE"] * 2
        database = {"DATABASE_URL": f"sqlite:///{tmp_path}/db.sqlite3"}
        down = Console(copied, tmp_path / "down", **copied.free_servers(), **database)
        with started(down):
            assert "unavailable" in again(down, "view_taskresult", "change_taskresult")
        assert console.ask(STATES) == ["FAILURE"] * 2
        assert "not stored" in again(console, "view_taskresult", "change_taskresult")
        wait_for(path.with_name(f"{path.name} was read").exists)
        assert console.ask(STATES) == ["FAILURE"]
        steps = "from celery import chain; from orders.tasks import fail"
        console.ask(f"{steps}; result = chain(fail.si(), fail.si()).delay().id")
        wait_for(lambda: console.ask(STATES) == ["FAILURE"] * 3)
        assert "start the whole again" in again(console, "view_taskresult", "change_taskresult")
