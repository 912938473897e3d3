"""The imports run one way: no module imports one that stands above it.

ORDER is the drawing, from the bottom to the top. Imports in functions count, too.
"""

import ast

import pytest
from settings import SOURCE

PACKAGE = SOURCE / "durable_jobs"
ORDER = """
conf exceptions pools validation versions migrations
database limits messages transport
states transport.rabbitmq transport.redis
models
compiler eager pauses results
transitions
hooks publish
admission
enqueue
actions
batches
worker.runs
worker.forks worker.lease
worker.children worker.heartbeat worker.remote_control
worker.shutdown worker.startup worker.steps statistics diagnosis beat.republish
worker.consumer worker.execution beat.purge contrib.prometheus
tasks beat.sweeper api.schema api.serializers
beat.schedule api.views contrib.django_tasks drill
admin celery checks testing urls views management.commands.durable_jobs
apps
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


def test_no_import_is_hidden_in_a_string():
    hidden = "get_model", "symbol_by_name", "TYPE_CHECKING", "import_string"
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
