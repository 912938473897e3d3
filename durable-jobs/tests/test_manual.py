"""docs/reference.md lists the public names of the package: these, and no others."""

import re
from importlib import import_module
from operator import attrgetter

import pytest
from django.db import models
from settings import SOURCE

from durable_jobs import conf
from durable_jobs.models import Job

MANUAL = (SOURCE.parent / "README.md").read_text()
FILES = {path.stem: path.read_text() for path in (SOURCE / "durable_jobs").glob("[a-z]*.py")}
SECTION = re.compile(r"^### durable_jobs\.(\w+)\n(.*?)(?=^#)", re.MULTILINE | re.DOTALL)
# What Django and DRF use of a class, or add to it.
ADDED = {"DoesNotExist", "Meta", "MultipleObjectsReturned", "NotUpdated", "filterset_fields", "get"}
ADDED |= {"batch_id", "filterset_class", "id", "job_id", "objects", "owner_id", "parent_id"}
ADDED |= {"basename", "description", "detail", "name", "suffix"}


def listed():
    """Return {module: names} of the list items of the manual: - `name`, `name(…)`: a text"""
    names = {}
    for module, text in SECTION.findall(MANUAL):
        items = re.findall(r"^- ((?:`[^`]+`(?:, )?)+):", text, re.MULTILINE)
        names[module] = re.findall(r"`([\w.]+)", " ".join(items))
    return names


def members(cls):
    """Return the public names of a class, and of its objects, that it does not inherit."""
    foreign = [base for base in cls.__mro__ if not base.__module__.startswith("durable_jobs.")]
    inherited = {name for base in foreign for name in dir(base)}
    own = {*dir(cls), *vars(cls).get("__annotations__", {})} - inherited - ADDED
    return {name for name in own if not name.startswith(("_", "get_"))}  # get_state_display()


LISTED = listed()


def test_the_manual_lists_each_public_name_of_each_module():
    public = {name for name, text in FILES.items() if "\n__all__ = " in text}
    assert public == LISTED.keys() >= {"models", "tasks", "views"}
    for module, names in LISTED.items():
        of_module = [name for name in names if "." not in name]
        assert sorted(import_module(f"jobs.{module}").__all__) == sorted(of_module), module


@pytest.mark.parametrize("module", LISTED)
def test_each_name_of_the_manual_exists(module):
    for name in LISTED[module]:
        path, _, member = name.rpartition(".")
        owner = attrgetter(path)(import_module(f"jobs.{module}")) if path else None
        if member not in getattr(owner, "__annotations__", {}):
            attrgetter(name)(import_module(f"jobs.{module}"))


@pytest.mark.parametrize("module", LISTED)
def test_the_manual_lists_each_public_member_of_a_class(module):
    found = import_module(f"jobs.{module}")
    classes = [cls for cls in map(found.__dict__.get, found.__all__) if isinstance(cls, type)]
    of_classes = {f"{cls.__name__}.{name}" for cls in classes for name in members(cls)}
    assert of_classes - set(LISTED[module]) == set()


def test_an_object_has_no_other_public_names(user):
    """A manager, a queryset and a row, as Django makes them."""

    class Plain(models.Model):
        class Meta:
            app_label = "plain"

    plain = models.Manager()
    plain.model = Plain
    assert set(dir(Job.objects)) - set(dir(plain)) == {"enqueue", "aenqueue", "enqueue_many"}
    methods = set(dir(Job.objects.all())) - set(dir(plain.all()))
    assert methods == {"cancel", "run_again", "start_now"}
    shown = {name.partition(".")[2] for name in LISTED["models"] if name.startswith("Job.")}
    added = {name for name in dir(Job(owner=user)) if not name.startswith(("_", "get_"))}
    assert added - set(dir(Plain())) - ADDED - shown == set()


def test_the_manual_lists_each_setting_with_its_default():
    listed = re.findall(r"^- `(JOB_\w+)` \((none|[\d,]+)", MANUAL, re.MULTILINE)
    defaults = {name: value or "none" for name, value in conf.DEFAULTS.items()}
    assert {name: value.replace(",", "") for name, value in listed} == {
        name: str(value) for name, value in defaults.items()
    }


def test_the_manual_names_each_command():
    commands = [path.stem for path in (SOURCE / "durable_jobs/management/commands").glob("[a-z]*.py")]
    listed = set(re.findall(r"^- `manage\.py (\w+) ", MANUAL, re.MULTILINE))
    assert listed == set(commands) == {"durable_jobs"}
