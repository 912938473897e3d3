"""celery-steady passes its own tests on each version of Celery that it supports."""

import re
import subprocess
import sys

import pytest

from harness import missing
from harness.bake import STEADY
from harness.versions import SUPPORTED
from test_steady import run_steady_tests

OLDEST, NEWEST = SUPPORTED["python"][0], SUPPORTED["python"][-1]
WITHOUT_DJANGO = SUPPORTED["celery"][0]  # one is enough
PARAMS = [
    pytest.param(celery, python, marks=[pytest.mark.nightly] * (python != OLDEST))
    for celery in SUPPORTED["celery"]
    for python in (OLDEST, NEWEST)
]


@pytest.mark.parametrize(("celery", "python"), PARAMS)
def test_celery_steady_passes_its_tests_on(celery, python, tmp_path):
    in_parallel = "-n", "2", "--dist", "loadgroup"
    printed = run_steady_tests(tmp_path, *in_parallel, python=environment(tmp_path, celery, python))
    assert re.search(r"= \d+ passed", printed), printed


def test_celery_steady_needs_no_django(tmp_path):
    """Of all tests, only those of its classes for Django are skipped."""
    python = environment(tmp_path, WITHOUT_DJANGO, OLDEST)
    django = ["django", "django-celery-beat", "django-celery-results", "django-structlog"]
    uv = [sys.executable, "-m", "uv", "pip", "uninstall", "--quiet", "--python", python]
    subprocess.run([*uv, *django], check=True)
    printed = run_steady_tests(tmp_path, "-k", "django or patience or beat", python=python)
    assert re.search(r"SKIPPED \[1\] .*test_django\.py", printed), printed
    assert re.search(r"= \d+ passed, 1 skipped", printed), printed


def environment(folder, celery, python):
    """Return the Python of a new environment with these versions."""
    uv, found = [sys.executable, "-m", "uv"], folder / ".venv/bin/python"
    create = [*uv, "venv", "--quiet", "--python", python, folder / ".venv"]
    created = subprocess.run(create, capture_output=True, text=True)
    if created.returncode:
        missing(f"there is no Python {python}: {created.stderr}")
    about = STEADY / "pyproject.toml"
    # A version of Celery with the kombu of its day
    install = ["-r", about, "--group", f"{about}:test", f"celery~={celery}.0", f"kombu~={celery}.0"]
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", found, *install], check=True)
    return found
