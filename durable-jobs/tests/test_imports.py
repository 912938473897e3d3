"""The imports run one way: no module imports one that stands above it.

ORDER is the drawing, from the bottom to the top. Imports in functions count, too.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from settings import SOURCE

PACKAGE = SOURCE / "durable_jobs"
ORDER = """
api.schema conf exceptions migrations pools transport.rabbitmq validation versions views
coroutines database limits messages process transport
beat.entries states transport.redis worker.forks worker.steps
models
checks compiler hooks pauses results worker.heartbeat
statistics transitions
publish
admission
beat.republish enqueue
actions
batches
beat.purge celery diagnosis tasks worker.remote_control worker.runs
admin api.serializers contrib.django_tasks contrib.prometheus drill worker.lease
api.views beat.sweeper management.commands.durable_jobs worker.children worker.execution worker.shutdown
beat.schedule eager urls worker.startup
apps testing worker.consumer
"""
LAYERS = [line.split() for line in ORDER.strip().splitlines()]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {
    name_of(path): path for path in PACKAGE.rglob("*.py") if path.parent.name != "migrations"
}
MODULES |= {"migrations": PACKAGE / "migrations/__init__.py"}
# Without rooms that have only a docstring.
MODULES = {
    name: path for name, path in MODULES.items() if name and ast.parse(path.read_text()).body[1:]
}


def imported(path):
    """Return the modules of the package that this file imports, wherever it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write the full path"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        known = {name.removeprefix("durable_jobs.") for name in names if "durable_jobs." in name}
        found |= known & MODULES.keys()
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_modules_below_it(name):
    assert name in LEVELS, "add it to ORDER"
    above = {each for each in imported(MODULES[name]) - {name} if LEVELS[each] >= LEVELS[name]}
    assert not above


WEB = """
import sys, django, settings
settings.DATABASES["default"] = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
django.setup()
import urls
from celery import shared_task
from django.core.management import call_command
from durable_jobs import actions, batches, tasks
from durable_jobs.contrib import django_tasks
call_command("check")
call_command("migrate", verbosity=0)
@tasks.job
async def wait(self): ...
batch = batches.enqueue([wait.s()])
actions.cancel(batch.jobs.all())
wait.delay()
wait()
print(*(name for name in sys.modules if name.startswith("durable_jobs.worker")))
"""


def test_a_web_process_imports_nothing_of_a_worker():
    variables = {**os.environ, "PYTHONPATH": str(SOURCE), "DJANGO_SETTINGS_MODULE": "settings"}
    run = [sys.executable, "-c", WEB]
    options = {"cwd": Path(__file__).parent, "env": variables, "text": True, "check": True}
    assert subprocess.run(run, capture_output=True, **options).stdout.splitlines()[-1] == ""


def test_no_import_is_hidden_in_a_string():
    hidden = "get_model(", "symbol_by_name", "TYPE_CHECKING", "import_string"
    found = {
        (path.name, word)
        for path in PACKAGE.rglob("*.py")
        for word in hidden
        if word in path.read_text()
    }
    # None imports a module of this package: a task of Django's Tasks, typing_extensions, and the
    # consumer that a project has set.
    assert found == {
        ("django_tasks.py", "import_string"),
        ("enqueue.py", "TYPE_CHECKING"),
        ("checks.py", "symbol_by_name"),
    }
