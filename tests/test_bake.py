"""Every combination of answers bakes to a small, clean project."""

import ast
import itertools
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parents[1]
CHOICES = {
    option: default if isinstance(default, list) else [True, False]
    for option, default in json.loads((TEMPLATE / "cookiecutter.json").read_text()).items()
    if isinstance(default, list | bool) and not option.startswith("_")
}
COMBINATIONS = [
    dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())
]
# {option: {choice: words that nothing may contain when another choice was made}}
TRACES = {"include_example": {True: ["orders", "newsletter", "httpx"]}}
# Modules whose package has another name.
PACKAGES = {
    "environ": "django-environ",
    "rest_framework": "djangorestframework",
    "sentry_sdk": "sentry-sdk",
}
INDIRECT = {
    "psycopg",  # by Django, where DATABASE_URL says postgres
    "pytest-django",  # by pytest
}


def name(answers):
    return "-".join(f"{option}={choice}" for option, choice in answers.items())


@pytest.fixture(params=COMBINATIONS, ids=name)
def answers(request):
    return request.param


@pytest.fixture
def project(bake, answers):
    return bake(**answers)


def test_it_is_formatted_and_free_of_mistakes(project):
    project.run("ruff", "check", "--no-cache")
    project.run("ruff", "format", "--check", "--no-cache")


def test_it_shows_no_trace_of_the_template(project):
    for file in project.files():
        text = file.read_text("utf-8")
        assert "cookiecutter" not in text, file
        if file.suffix != ".html":  # Django's
            assert not re.search(r"{%|{#|{{ ", text), file
        assert text.strip() or file.name == "__init__.py", f"{file} is empty"
        assert text == "" or (text.endswith("\n") and not text.endswith("\n\n")), file
        assert "\n\n\n" not in text or file.suffix == ".py", file


def test_it_shows_no_trace_of_what_was_not_chosen(project, answers):
    for option, traces in TRACES.items():
        for choice, words in traces.items():
            if answers[option] != choice:
                for file in project.files():
                    text = f"{file.relative_to(project)}\n{file.read_text('utf-8')}".lower()
                    assert not [word for word in words if word in text], file


def test_every_import_is_declared_and_every_dependency_is_used(project):
    about = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))
    declared = about["project"]["dependencies"] + about["dependency-groups"]["dev"]
    packages = {re.match("[a-z0-9-]+", requirement)[0] for requirement in declared}
    sources = {file: file.read_text("utf-8") for file in project.files()}
    own = {path.name.removesuffix(".py") for path in project.iterdir()}
    imported = {
        module.split(".")[0]
        for file, source in sources.items()
        if file.suffix == ".py"
        for module in imports(ast.parse(source))
    }
    foreign = imported - own - sys.stdlib_module_names
    extras = set(re.findall(r"\[([a-z]+)\]", " ".join(declared)))
    needed = {PACKAGES.get(module, module.replace("_", "-")) for module in foreign}
    assert needed <= packages | extras

    del sources[project / "pyproject.toml"]
    everything = "\n".join(sources.values())
    modules = {package: module for module, package in PACKAGES.items()}
    unused = {
        package
        for package in packages
        if modules.get(package, package.replace("-", "_")) not in everything
    }
    assert unused <= INDIRECT


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_it_is_small(project):
    """DESIGN: what an owner is ready to read. Files as git would track them."""
    tracked = [file for file in project.files() if file.name != ".env"]
    assert len(tracked) <= 45
