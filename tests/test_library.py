"""The tests of the library durable-jobs, on its source, without a bake."""

import os
import re
import subprocess
import sys

import pytest

from harness.bake import LIBRARY
from harness.project import env

TESTS = LIBRARY / "tests"
# A test in one transaction queries in its own thread (see `one_connection` in the library's
# conftest.py), so it says nothing about greenlets.
OTHER_THREADS = "not django_db or django_db(transaction=True)"
POOLS = {  # a child of prefork has one thread
    "threads": ["pytest"],
    # monkey-patched first, as in a worker
    "gevent": ["gevent.monkey", "--module", "pytest", "-m", OTHER_THREADS],
}
# Each is a group of its own, so that conftest.py starts these long ones before other tests.
RUNS = [
    pytest.param(server, pool, marks=pytest.mark.xdist_group(f"library-{server}-{pool}"))
    for server, pool in [("database", "gevent"), ("database", "threads"), ("sqlite", "threads")]
]
FEW_ROUNDS = 30  # of races; integration/features/test_library_races.py has more


def run_tests(pool, folder, *options, python=sys.executable, **variables):
    """Run tests of the library, and return what they print."""
    command = [python, "-m", *POOLS[pool], "-c", TESTS / "pytest.ini", TESTS, *options]
    # In the usual folder, pytest would also delete what earlier runs of others have left there.
    command.append(f"--basetemp={folder / 'library'}")
    run = subprocess.run(command, env=env(**variables), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize(("server", "pool"), RUNS)
def test_the_library_passes_its_own_tests(server, pool, request, tmp_path):
    variables = {"ROUNDS": os.environ.get("ROUNDS", FEW_ROUNDS)}
    if server == "database":  # PostgreSQL
        variables["DATABASE_URL"] = request.getfixturevalue(server).create(f"library_{pool}")
    printed = run_tests(pool, tmp_path, **variables)
    # Those that need PostgreSQL, or more than one thread.
    others = r", \d+ skipped" if server == "sqlite" else ""
    others += r", \d+ deselected" if pool == "gevent" else ""
    assert re.search(rf"= \d+ passed{others} in", printed), printed
