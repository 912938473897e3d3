"""`make scorecard`, with few faults: nothing is lost, and only what ran at a kill runs again."""

import subprocess
import sys

import pytest

from harness.bake import TEMPLATE

SCORECARD = TEMPLATE / "celery-steady/bench/scorecard.py"


@pytest.mark.xdist_group("chaos")  # one at a time: each needs the whole machine
def test_kills_and_restarts_lose_and_double_nothing():
    few = "--kills 5 --restarts 2 --cuts 3 --kinds celery-steady --check".split()
    command = [sys.executable, SCORECARD, "redis", *few]
    found = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-3000:]
