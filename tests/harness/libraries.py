"""The libraries' own tests, and the versions of Django, Celery and Python that they support."""

import re
import runpy
import subprocess
import sys

from . import missing
from .bake import ABOUT_LIBRARY, LIBRARY, PINNED
from .project import env

ABOUT = ABOUT_LIBRARY["project"]


def minors(oldest, newest):
    """Return the versions from "5.5" to "5.7"."""
    (major, first), (_, last) = oldest.split("."), newest.split(".")
    return [f"{major}.{minor}" for minor in range(int(first), int(last) + 1)]


OLDEST_CELERY = re.search(r"celery>=([\d.]+)", " ".join(ABOUT["dependencies"]))[1]
NEWEST_CELERY = runpy.run_path(LIBRARY / "src/durable_jobs/versions.py")["NEWEST"]
SUPPORTED = {
    "django": [each.split()[-1] for each in ABOUT["classifiers"] if re.search(r":: \d", each)],
    "celery": minors(OLDEST_CELERY, ".".join(map(str, NEWEST_CELERY))),
    "python": minors(PINNED.oldest_python, PINNED.python),
}


def run_tests(library, folder, *options, python=sys.executable, modules=("pytest",), **variables):
    """Run the tests of a library, and return what they print."""
    command = [python, "-m", *modules, "-c", library / "pyproject.toml", library / "tests"]
    # In the usual folder, pytest would also delete what earlier runs of others have left there.
    command += [f"--basetemp={folder / library.name}", *options]
    run = subprocess.run(command, env=env(**variables), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def environment(folder, *requirements, python=sys.executable):
    """Make an environment with these, and return its Python. Skip the test without this one."""
    uv, found = [sys.executable, "-m", "uv"], folder / ".venv/bin/python"
    create = [*uv, "venv", "--quiet", "--python", python, folder / ".venv"]
    created = subprocess.run(create, capture_output=True, text=True)
    if created.returncode:
        missing(f"there is no Python {python}: {created.stderr}")
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", found, *requirements], check=True)
    return found


def of_tests(library, celery):
    """What a library's tests require, on a version of Celery with the kombu of its day."""
    about = library / "pyproject.toml"
    return ["-r", about, "--group", f"{about}:test", f"celery~={celery}.0", f"kombu~={celery}.0"]
