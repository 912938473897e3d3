"""celery-steady passes its own tests on each version of Celery that it supports."""

import re
import subprocess
import sys

import pytest

from harness.bake import STEADY
from harness.libraries import SUPPORTED, environment, of_tests, run_tests

OLDEST, NEWEST = SUPPORTED["python"][0], SUPPORTED["python"][-1]
PARAMS = [
    pytest.param(celery, python, marks=[pytest.mark.nightly] * (python != OLDEST))
    for celery in SUPPORTED["celery"]
    for python in (OLDEST, NEWEST)
]


@pytest.mark.parametrize(("celery", "python"), PARAMS)
def test_celery_steady_passes_its_tests_on(celery, python, tmp_path):
    python = environment(tmp_path, *of_tests(STEADY, celery), python=python)
    printed = run_tests(STEADY, tmp_path, "-n", "2", "--dist", "loadgroup", python=python)
    assert re.search(r"= \d+ passed", printed), printed


def test_celery_steady_needs_no_django(tmp_path):
    """Of all tests, only those of its classes for Django are skipped."""
    python = environment(tmp_path, *of_tests(STEADY, SUPPORTED["celery"][0]), python=OLDEST)
    django = ["django", "django-celery-beat", "django-celery-results", "django-structlog"]
    uv = [sys.executable, "-m", "uv", "pip", "uninstall", "--quiet", "--python", python]
    subprocess.run([*uv, *django], check=True)
    printed = run_tests(STEADY, tmp_path, "-k", "django or patience or beat", python=python)
    assert re.search(r"SKIPPED \[1\] .*test_django\.py", printed), printed
    assert re.search(r"= \d+ passed, 1 skipped", printed), printed
