"""docs/reference.md lists the public names of the package: these, and no others."""

import re
from importlib import import_module

import pytest
from django.core import checks
from settings import SOURCE

from durable_jobs import conf, versions

PACKAGE = SOURCE / "durable_jobs"
PAGE = (SOURCE.parent / "docs/reference.md").read_text("utf-8")
SECTION = re.compile(r"^### (durable_jobs[\w.]+)\n(.*?)(?=^#)", re.MULTILINE | re.DOTALL)
# What Django and DRF add to a class, or use of it.
ADDED = {"DoesNotExist", "Meta", "MultipleObjectsReturned", "NotUpdated", "basename", "description"}
ADDED |= {"batch_id", "detail", "filterset_class", "filterset_fields", "get", "id", "job_id"}
ADDED |= {"filter_backends", "name", "objects", "owner_id", "pagination_class", "suffix"}


def listed():
    """Return {module: names} of the list items of the page: - `name`, `name(…)`: a text"""
    names = {}
    for module, text in SECTION.findall(PAGE):
        items = re.findall(r"^- ((?:`[^`]+`(?:, )?)+):", text, re.MULTILINE)
        names[module] = re.findall(r"`([\w.]+)", " ".join(items))
    return names


def members(cls):
    """Return the public names of a class that it does not inherit from another package."""
    foreign = [base for base in cls.__mro__ if not base.__module__.startswith("durable_jobs.")]
    inherited = {name for base in foreign for name in dir(base)}
    own = {*dir(cls), *vars(cls).get("__annotations__", {})} - inherited - ADDED
    return {name for name in own if not name.startswith(("_", "get_"))}  # get_state_display()


LISTED = listed()


def test_the_reference_lists_each_public_name_of_each_module():
    public = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
        if "\n__all__ = " in path.read_text("utf-8")
    }
    assert public == LISTED.keys() >= {"durable_jobs.models", "durable_jobs.tasks"}
    for module, names in LISTED.items():
        of_module = {name for name in names if "." not in name}
        assert set(import_module(module).__all__) == of_module, module


@pytest.mark.parametrize("module", LISTED)
def test_the_reference_lists_each_public_member_of_a_class_and_no_other(module):
    found = import_module(module)
    for cls in (getattr(found, name) for name in found.__all__):
        if isinstance(cls, type):
            start = f"{cls.__name__}."
            names = {name.removeprefix(start) for name in LISTED[module] if name.startswith(start)}
            known = {*dir(cls), *vars(cls).get("__annotations__", {})}
            assert names <= known, f"{cls}: the reference lists names that do not exist"
            # A class that a section does not describe is described in another one.
            assert not names or members(cls) <= names, f"{cls}: the reference lacks names"


def test_the_reference_lists_each_setting_with_its_default():
    rows = re.findall(r"^\| `([A-Z_]+)` \| (none|True|[\d,]+) \|", PAGE, re.MULTILINE)
    defaults = {name: str(value or "none") for name, value in conf.DEFAULTS.items()}
    assert {name: value.replace(",", "") for name, value in rows} == defaults


def test_the_reference_lists_each_metric():
    code = (PACKAGE / "contrib/prometheus.py").read_text("utf-8")
    metrics = re.findall(r'^    "(durable_jobs_\w+)": ', code, re.MULTILINE)
    section = PAGE.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"`(durable_jobs_\w+)`", section)) == sorted(metrics)


def test_the_checks_that_the_reference_names_exist():
    assert checks.registry.registry.registered_checks
    code = "".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    ids = set(re.findall(r'id="(durable_jobs\.\w+)"', code))
    named = set(re.findall(r"`(durable_jobs\.[EWI]\d+)`", PAGE))
    assert named and named <= ids


def test_the_reference_names_each_command():
    commands = {path.stem for path in (PACKAGE / "management/commands").glob("[a-z]*.py")}
    assert set(re.findall(r"^- `manage\.py (\w+) ", PAGE, re.MULTILINE)) == commands


def test_the_tests_that_the_page_names_for_internals_exist():
    internals = PAGE.partition("\n## Internals\n")[2]
    named = set(re.findall(r"\| `(test_\w+)` \|$", internals, re.MULTILINE))
    tests = [*SOURCE.parent.glob("tests/test_*.py")]
    for folder in "tests", "templates/durable_jobs/yes/tests":
        tests += SOURCE.parents[1].glob(f"{folder}/**/test_*.py")
    text = "".join(file.read_text("utf-8") for file in tests)
    defined = set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))
    assert named and named <= defined
    off = {
        name for name in re.findall(r"^\| ([^|]+) \| (?:Celery|kombu) ", internals, re.MULTILINE)
    }
    assert off == versions.SINCE.keys()
