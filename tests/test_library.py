"""The tests of the libraries, on their source, without a bake."""

import os
import re

import pytest

from harness.bake import LIBRARY, STEADY
from harness.libraries import run_tests

# Those with workers that are killed, and with each server: integration/versions/
NAMES = "conformance", "malformed", "poisons", "strangers", "unknown", "worker"
SLOW = [f"test_{name}.py" for name in NAMES]
# A test in one transaction queries in its own thread (see `one_connection` in the library's
# conftest.py), so it says nothing about greenlets.
OTHER_THREADS = "not django_db or django_db(transaction=True)"
POOLS = {  # a child of prefork has one thread
    "threads": ["pytest"],
    # monkey-patched first, as in a worker
    "gevent": ["gevent.monkey", "--module", "pytest", "-m", OTHER_THREADS],
}
# Each is a group of its own: conftest.py starts those first.
RUNS = [
    pytest.param(server, pool, marks=pytest.mark.xdist_group(f"library-{server}-{pool}"))
    for server, pool in [("database", "gevent"), ("database", "threads"), ("sqlite", "threads")]
]
# They start tools and processes: neither the database nor the pool matters.
NAMES = "test_plain.py", "test_strangers.py", "test_types.py"
ONCE = [f"--ignore={LIBRARY / 'tests' / name}" for name in NAMES]
FEW_ROUNDS = 30  # of races; integration/features/test_library_races.py has more


@pytest.mark.xdist_group("steady")
def test_celery_steady_passes_its_quick_tests(tmp_path):
    slow = [f"--ignore={STEADY / 'tests' / name}" for name in SLOW]
    assert re.search(r"= \d+ passed", run_tests(STEADY, tmp_path, *slow))


@pytest.mark.parametrize(("server", "pool"), RUNS)
def test_the_library_passes_its_own_tests(server, pool, request, tmp_path):
    variables = {"ROUNDS": os.environ.get("ROUNDS", FEW_ROUNDS)}
    if server == "database":  # PostgreSQL
        variables["DATABASE_URL"] = request.getfixturevalue(server).create(f"library_{pool}")
    options = ONCE if server == "database" else []
    printed = run_tests(LIBRARY, tmp_path, *options, modules=POOLS[pool], **variables)
    # Those that need PostgreSQL, or more than one thread.
    others = r", \d+ skipped" if server == "sqlite" else ""
    others += r", \d+ deselected" if pool == "gevent" else ""
    assert re.search(rf"= \d+ passed{others} in", printed), printed
