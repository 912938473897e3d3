"""Every combination of answers bakes to a small, clean project."""

import ast
import hashlib
import itertools
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

TEMPLATE = Path(__file__).parents[1]
CHOICES = {
    option: default if isinstance(default, list) else [True, False]
    for option, default in json.loads((TEMPLATE / "cookiecutter.json").read_text()).items()
    if isinstance(default, list | bool) and not option.startswith("_")
}
COMBINATIONS = [
    dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())
]
# {word: what must have been chosen, as (option, choice), for the word to appear anywhere}
TRACES = {
    "redis": [("broker", "redis"), ("result_backend", "redis")],
    "rabbitmq|amqp://": [("broker", "rabbitmq")],
    r"\bsqs\b": [("broker", "sqs")],
    "aws|moto": [("broker", "sqs"), ("result_backend", "dynamodb")],
    "dynamodb": [("result_backend", "dynamodb")],
    "django.celery.results": [("result_backend", "database")],
    "result_backend": [("result_backend", other) for other in CHOICES["result_backend"][:-1]],
    "gevent|greenlet": [("worker_pool", "gevent")],
    "pool threads": [("worker_pool", "threads")],
    "billiard|max_tasks_per_child": [("worker_pool", "prefork")],
    "django.celery.beat": [("periodic_tasks", "admin")],
    r"beat_schedule\b": [("periodic_tasks", "code")],
    r"compose\.yaml|dockerfile|make up": [("deployment", "docker"), ("deployment", "kubernetes")],
    "kubernetes|kustomize|keda": [("deployment", "kubernetes")],
    "github": [("ci", "github")],
    "gitlab": [("ci", "gitlab")],
    r"\bCI\b": [("ci", "github"), ("ci", "gitlab")],
    "orders|newsletter|httpx": [("include_example", True)],
}
# Modules whose package has another name.
PACKAGES = {
    "environ": "django-environ",
    "rest_framework": "djangorestframework",
    "sentry_sdk": "sentry-sdk",
}
INDIRECT = {
    "gevent",  # by the worker's option --pool
    "moto",  # by the command moto_server
    "psycopg",  # by Django, where DATABASE_URL says postgres
    "pytest-django",  # by pytest
}
seen = set()  # what was checked already, by this process


def name(answers):
    return "-".join(str(choice) for choice in answers.values())


@pytest.mark.parametrize("answers", COMBINATIONS, ids=name)
def test_every_combination_is_clean(bake, answers):
    project = bake(**answers)
    texts = {file.relative_to(project): file.read_text("utf-8") for file in project.files()}

    assert len(texts) - 1 <= 45, "files, without .env"
    for file, text in texts.items():
        check_traces(file, text, answers)
        if is_new(file, text):
            check_file(file, text)
    check_dependencies(project, texts)
    check_readme(texts)
    if is_new("", "".join(text for file, text in texts.items() if file.name != ".env")):
        project.run("ruff", "check", "--no-cache")
        project.run("ruff", "format", "--check", "--no-cache")


def is_new(file, text):
    digest = hashlib.sha256(f"{file}\n{text}".encode()).digest()
    return digest not in seen and not seen.add(digest)


def check_traces(file, text, answers):
    for word, choices in TRACES.items():
        if not any(answers[option] == choice for option, choice in choices):
            found = re.search(f".*({word}).*", f"{file}\n{text}", re.IGNORECASE)
            assert not found, f"{file}: {found[0]}"


def check_file(file, text):
    assert "cookiecutter" not in text, file
    if file.suffix not in (".html", ".yml"):  # Django's braces, GitHub's
        assert not re.search(r"{%|{#|{{ ", text), file
    assert text.strip() or file.name == "__init__.py", f"{file} is empty"
    assert not text or (text.endswith("\n") and not text.endswith("\n\n")), file
    assert "\n\n\n" not in text or file.suffix == ".py", file
    assert not re.search("[ \t]\n", text), file
    match file.suffix:
        case ".py":
            ast.parse(text)
        case ".toml":
            tomllib.loads(text)
        case ".yml" | ".yaml":
            yaml.safe_load(text)


def check_dependencies(project, texts):
    """Every module that is imported is declared, and every dependency that is declared is used."""
    about = tomllib.loads(texts[Path("pyproject.toml")])
    declared = about["project"]["dependencies"] + about["dependency-groups"]["dev"]
    packages = {re.match("[a-z0-9-]+", requirement)[0] for requirement in declared}
    extras = set(re.findall(r"[a-z0-9]+", " ".join(re.findall(r"\[(.*?)\]", " ".join(declared)))))
    own = {path.name.removesuffix(".py") for path in project.iterdir()}
    own |= {path.stem for path in (project / "tests").iterdir()}
    imported = {
        module.split(".")[0]
        for file, text in texts.items()
        if file.suffix == ".py"
        for module in imports(ast.parse(text))
    }
    foreign = imported - own - sys.stdlib_module_names
    needed = {PACKAGES.get(module, module.replace("_", "-")) for module in foreign}
    assert needed <= packages | extras

    everything = "\n".join(text for file, text in texts.items() if file.name != "pyproject.toml")
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


def check_readme(texts):
    """It names no file and no command of make that the output lacks."""
    readme = texts[Path("README.md")]
    targets = set(re.findall(r"^([a-z]+):", texts[Path("Makefile")], re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", readme)) <= targets
    paths = set(re.findall(r"`((?:config|jobs|orders|tests)/[\w./]*)`", readme))
    assert all(any(str(file).startswith(path) for file in texts) for path in paths)


def test_no_broker_and_no_backend_is_named_outside_its_folder():
    """A new one is a choice and a folder: see CONTRIBUTING.md."""
    names = "|".join(CHOICES.get("broker", []) + CHOICES.get("result_backend", []))
    compared = re.compile(
        rf"cookiecutter\.(broker|result_backend) *(==|!=|in\b)|[\"']({names})[\"']"
    )
    files = [TEMPLATE / "hooks/post_gen_project.py"]
    files += [file for file in (TEMPLATE / "{{cookiecutter.project_slug}}").rglob("*")]
    for file in files:
        if file.is_file():
            for line in file.read_text("utf-8").splitlines():
                if "{%" in line or "{{" in line:
                    assert not compared.search(line), f"{file}: {line}"
