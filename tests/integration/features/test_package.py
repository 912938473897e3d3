"""The library is a package: what its wheel requires."""

import re
import sys
import tomllib
import zipfile
from email import message_from_bytes
from itertools import chain

from packaging.requirements import Requirement

from harness.bake import ABOUT_LIBRARY, LIBRARY
from harness.checks import imports, packages, packages_of
from test_wheel import WHEEL


def test_the_wheel_requires_what_its_modules_import():
    """With all extras. Only testing.py imports pytest; Celery brings kombu and others."""
    with zipfile.ZipFile(WHEEL) as archive:
        [about] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        required = message_from_bytes(archive.read(about)).get_all("Requires-Dist")
    python = (path.read_text("utf-8") for path in (LIBRARY / "src").rglob("*.py"))
    foreign = set().union(*map(imports, python)) - sys.stdlib_module_names
    foreign -= {
        "billiard",
        "django_celery_beat",  # if it is installed
        "typing_extensions",  # only for type checkers, which have it
        "durable_jobs",
        "gevent",
        "kombu",
        "pytest",
        "redis",
        "structlog",
    }
    assert packages(required) == packages_of(foreign)


def test_its_ranges_have_the_versions_that_a_project_pins(bake):
    project = tomllib.loads(bake(durable_jobs="yes").read("pyproject.toml"))["project"]
    pinned = dict(re.findall(r"^([a-z-]+).*~=([\d.]+)$", "\n".join(project["dependencies"]), re.M))
    library = ABOUT_LIBRARY["project"]
    extras = library["optional-dependencies"].values()
    required = [Requirement(each) for each in chain(library["dependencies"], *extras)]
    assert {"celery", "django"} <= {each.name for each in required} & pinned.keys()
    for each in required:
        assert each.name not in pinned or pinned[each.name] in each.specifier, each
