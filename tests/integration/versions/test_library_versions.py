"""The library passes its own tests on each version of Django, Celery and Python that it supports.

A covering set of their combinations; all of them with EVERY=1, as each night. test_library.py has
the versions that are installed.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from harness import missing
from harness.bake import LIBRARY, STEADY, covering, name, product
from harness.versions import SUPPORTED
from test_library import run_tests

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
    printed = run_tests("threads", tmp_path, python=environment(tmp_path, **versions))
    assert re.search(r"= \d+ passed, \d+ skipped", printed), printed


def environment(folder, django, celery, python):
    """Return the Python of a new environment with these versions."""
    uv, found = [sys.executable, "-m", "uv"], folder / ".venv/bin/python"
    create = [*uv, "venv", "--quiet", "--python", python, folder / ".venv"]
    created = subprocess.run(create, capture_output=True, text=True)
    if created.returncode:
        missing(f"there is no Python {python}: {created.stderr}")
    override = folder / "django.txt"  # django-celery-beat allows a new one only later
    override.write_text(f"django~={django}.0")
    about = LIBRARY / "pyproject.toml"
    install = [*uv, "pip", "install", "--quiet", "--python", found, "--override", override]
    # A version of Celery with the kombu of its day
    install += ["-r", about, "--all-extras", "--group", f"{about}:test", STEADY]
    install += [f"celery~={celery}.0", f"kombu~={celery}.0"]
    subprocess.run(install, check=True)
    return found
