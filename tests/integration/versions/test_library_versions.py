"""The libraries pass their own tests on each Django, Celery and Python that they support.

For durable-jobs, a covering set of their combinations; all of them with EVERY=1, as each night.
test_library.py has the versions that are installed.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from harness.bake import LIBRARY, STEADY, covering, name, product
from harness.libraries import SUPPORTED, environment, of_tests, run_tests

EVERY = bool(os.environ.get("EVERY"))
COMBINATIONS = [  # Django 6 needs Python 3.12
    each for each in product(SUPPORTED) if each["django"] < "6" or each["python"] > "3.11"
]
INSTALLED = {each: ".".join(version(each).split(".")[:2]) for each in ("django", "celery")}


def is_nightly(versions):
    return versions["python"] != "3.11" or versions == {**INSTALLED, "python": "3.11"}


PARAMS = [
    pytest.param(each, id=name(each), marks=[pytest.mark.nightly] * is_nightly(each))
    for each in (COMBINATIONS if EVERY else covering(COMBINATIONS, size=2))
]


@pytest.mark.parametrize("versions", PARAMS)
def test_the_library_passes_its_tests_on(versions, tmp_path):
    override = tmp_path / "django.txt"  # django-celery-beat allows a new one only later
    override.write_text(f"django~={versions['django']}.0")
    needed = "--override", override, "--all-extras", STEADY, *of_tests(LIBRARY, versions["celery"])
    python = environment(tmp_path, *needed, python=versions["python"])
    printed = run_tests(LIBRARY, tmp_path, python=python)
    assert re.search(r"= \d+ passed, \d+ skipped", printed), printed


OLDEST, NEWEST = SUPPORTED["python"][0], SUPPORTED["python"][-1]
PAIRS = [
    pytest.param(celery, python, marks=[pytest.mark.nightly] * (python != OLDEST))
    for celery in SUPPORTED["celery"]
    for python in (OLDEST, NEWEST)
]


@pytest.mark.parametrize(("celery", "python"), PAIRS)
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
    named = "(django or defaults or beat) and not strangers"  # one of whom has Django
    printed = run_tests(STEADY, tmp_path, "-k", named, python=python)
    assert re.search(r"SKIPPED \[1\] .*test_django\.py", printed), printed
    assert re.search(r"= \d+ passed, 1 skipped", printed), printed
