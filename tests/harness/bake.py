"""The options of cookiecutter.json, combinations of their choices, and how to bake one."""

import itertools
import json
import tempfile
import tomllib
from pathlib import Path

from cookiecutter.utils import create_env_with_context
from jinja2 import FileSystemLoader

from .project import Project

TEMPLATE = Path(__file__).parents[2]
OUTPUT = TEMPLATE / "{{cookiecutter.project_slug}}"
CONTEXT = json.loads((TEMPLATE / "cookiecutter.json").read_text("utf-8"))
OPTIONS = {option: value for option, value in CONTEXT.items() if not option.startswith("_")}
CHOICES = {option: value for option, value in OPTIONS.items() if isinstance(value, list)}
DEFAULTS = {option: choices[0] for option, choices in CHOICES.items()}
WITH_JOBS = {"durable_jobs": "yes"}
GROUP = 3  # so many choices meet each other in a covering set
ENVIRONMENT = create_env_with_context({"cookiecutter": CONTEXT})
ENVIRONMENT.loader = FileSystemLoader(TEMPLATE / "templates")
ABOUT = tomllib.loads((TEMPLATE / "pyproject.toml").read_text("utf-8"))
LIBRARY = TEMPLATE / "durable-jobs"
STEADY = TEMPLATE / "celery-steady"
ABOUT_LIBRARY = tomllib.loads((LIBRARY / "pyproject.toml").read_text("utf-8"))
ADDRESS = ABOUT_LIBRARY["project"]["urls"]["Repository"]  # as this repository's pages write it
PINNED = ENVIRONMENT.get_template("versions.jinja").module  # its `postgres` is an image with a tag


def product(choices):
    """Return every combination of choices, {option: choices}."""
    return [dict(zip(choices, each, strict=True)) for each in itertools.product(*choices.values())]


COMBINATIONS = product(CHOICES)


def groups(answers, size=GROUP):
    """Return every `size` of these answers, each with its option."""
    return set(itertools.combinations(answers.items(), size))


def covering(combinations, size=GROUP):
    """Return a few of these, the first one included, that have each group of all.

    The next one is always the one with the most groups that no earlier one has.
    """
    bits, rows = {}, []  # each group is a bit, so that a set of them is a number: this is quick
    for each in combinations:
        own = {1 << bits.setdefault(group, len(bits)) for group in groups(each, size)}
        rows.append((sum(own), each))
    found = []
    new, best = rows[0]
    while new:
        found.append(best)
        rows = [(rest, each) for old, each in rows if (rest := old & ~new)]
        new, best = max(rows, key=lambda row: row[0].bit_count(), default=(0, None))
    return found


def name(answers):
    return "-".join(str(choice) for choice in answers.values())


def context(**answers):
    """What a template is rendered with: these answers, and the defaults of all other options."""
    return {"cookiecutter": {**DEFAULTS, "project_slug": "my_project", **answers}}


def chosen(**answers):
    """Return what templates/chosen.jinja sets for these answers, with defaults for the others."""
    return ENVIRONMENT.get_template("chosen.jinja").make_module(context(**answers))


def render(file, **answers):
    """Return the text of a file of the output, without a bake."""
    return ENVIRONMENT.from_string((OUTPUT / file).read_text("utf-8")).render(context(**answers))


def baked(cookies, answers):
    # Cookiecutter leaves rendered hooks in its temporary folder, so remove that folder.
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        result = cookies.bake(extra_context=answers)
    tempfile.tempdir = None
    if result.exception:
        raise result.exception
    project = Project(result.project_path)
    project.answers = answers
    return project
