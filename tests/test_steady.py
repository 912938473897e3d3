"""The tests of the library celery-steady, on its source, without a bake."""

import re
import subprocess
import sys

import pytest

from harness.bake import STEADY
from harness.project import env

SLOW = "test_conformance.py", "test_poisons.py", "test_worker.py"


def run_steady_tests(folder, *options, python=sys.executable, **variables):
    """Run the tests of celery-steady, and return what they print."""
    command = [python, "-m", "pytest", "-c", STEADY / "pyproject.toml", STEADY / "tests", *options]
    # In the usual folder, pytest would also delete what earlier runs of others have left there.
    command.append(f"--basetemp={folder / 'steady'}")
    run = subprocess.run(command, env=env(**variables), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


# A group of its own, so that conftest.py starts it before other tests.
@pytest.mark.xdist_group("steady")
def test_celery_steady_passes_its_quick_tests(tmp_path):
    """Those with workers that are killed, and with each server: integration/versions/."""
    slow = [f"--ignore={STEADY / 'tests' / name}" for name in SLOW]
    assert re.search(r"= \d+ passed", run_steady_tests(tmp_path, *slow))
