"""The engine's own tests, on the folder `jobs/` of the template, without a bake."""

import re
import subprocess
import sys

import pytest

from harness.bake import TEMPLATE
from harness.faults import database  # noqa: F401  a fixture
from harness.project import env

TESTS = TEMPLATE / "tests/engine"
POOLS = {  # a child of prefork has one thread
    "threads": ["pytest"],
    "gevent": ["gevent.monkey", "--module", "pytest"],  # monkey-patched first, as in a worker
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("server", ["sqlite", "database"])
def test_the_engine_passes_its_own_tests(server, pool, request, tmp_path):
    variables = {}
    if server == "database":  # PostgreSQL
        variables["DATABASE_URL"] = request.getfixturevalue(server).create(f"engine_{pool}")
    command = [sys.executable, "-m", *POOLS[pool], "-c", TESTS / "pytest.ini", TESTS]
    # In the usual folder, pytest would also delete what earlier runs of others have left there.
    command.append(f"--basetemp={tmp_path / 'engine'}")
    run = subprocess.run(command, env=env(**variables), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    skipped = r", \d+ skipped" if server == "sqlite" else ""  # they need PostgreSQL
    assert re.search(rf"= \d+ passed{skipped} in", run.stdout), run.stdout
