"""Where it bakes: old and new Cookiecutters, Windows, odd file systems and folders."""

import json
import os
import shutil
import subprocess

import pytest

from harness.bake import TEMPLATE
from harness.checks import check_names
from harness.libraries import environment
from harness.project import Project

OLDEST, JINJA = "2.3", "3.1.5"  # as docs/options.md says
OTHERS = ["broker=rabbitmq", "worker_pool=gevent", "periodic_tasks=admin", "include_example=no"]


@pytest.fixture
def cookiecutter(tmp_path):
    """A function that runs Cookiecutter in a new environment with these packages."""

    def cookiecutter(packages, *arguments):
        folder = tmp_path / "-".join(packages)
        if not folder.exists():
            environment(folder, *packages)
        return subprocess.run(
            [folder / ".venv/bin/python", "-m", "cookiecutter", TEMPLATE, *arguments],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path)},
            capture_output=True,
            encoding="utf-8",
        )

    return cookiecutter


def texts(project):
    return {file.relative_to(project): file.read_bytes() for file in Project(project).files()}


@pytest.mark.parametrize(
    "packages",
    [[f"cookiecutter=={OLDEST}", f"jinja2=={JINJA}"], ["cookiecutter"]],
    ids=["oldest", "newest"],
)
def test_other_versions_of_cookiecutter_write_the_same_project(
    cookiecutter, bake, tmp_path, packages
):
    for slug, arguments in {"shop": [], "other": OTHERS}.items():
        result = cookiecutter(packages, "--no-input", f"project_slug={slug}", *arguments)
        assert result.returncode == 0, result.stderr
        answers = dict(argument.split("=") for argument in arguments)
        written, expected = texts(tmp_path / slug), texts(bake(project_slug=slug, **answers))
        for secrets in written, expected:
            del secrets[next(file for file in secrets if file.name == ".env")]
        assert written == expected

    before = sorted(tmp_path.iterdir())
    result = cookiecutter(packages, "--no-input", "project_slug=../guest", "author_email=nobody")
    assert result.returncode == 1
    assert "project_slug '../guest': use 1-40 characters: a-z" in result.stderr
    assert "author_email 'nobody': enter one plain address" in result.stderr
    assert sorted(tmp_path.iterdir()) == before
    replay = tmp_path / f".cookiecutter_replay/{TEMPLATE.name}.json"
    answers = json.loads(replay.read_text())
    answers["cookiecutter"] |= {"project_slug": "again", "author_email": "me@example.com"}
    replay.write_text(json.dumps(answers))
    result = cookiecutter(packages, f"--replay-file={replay}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again/manage.py").exists()


def test_an_older_cookiecutter_is_refused_with_a_remedy(cookiecutter, tmp_path):
    result = cookiecutter(["cookiecutter==2.1.1"], "--no-input")

    assert result.returncode == 1
    remedy = f"needs Cookiecutter {OLDEST} or newer: pip install --upgrade cookiecutter"
    assert remedy in result.stderr
    assert not (tmp_path / "my_project").exists()


def test_windows_and_file_systems_that_ignore_case_can_have_each_file_of_the_template():
    """test_bake.py checks the names in each output in the same way."""
    files = Project(TEMPLATE).tracked()

    check_names(files)
    for file in files:
        assert len(file) <= 120 and "{%" not in file, f"{file}: a name as in an output, and short"


def test_windows_clones_the_template_with_unix_line_ends():
    """Otherwise Git for Windows writes others, and so would the output have them."""
    listed = Project(TEMPLATE).call("git", "ls-files", "--eol", ":!*.whl")
    for line in listed.splitlines():
        described, file = line.split("\t")
        assert "eol=lf" in described and "crlf" not in described, file


@pytest.mark.parametrize("folder", ["with space", "Jürgens Läden", "$HOME; #1 & 'x'"])
def test_make_finds_its_tools_in_any_folder(bake, tmp_path, folder):
    """Fake tools print which honcho `make run` would start."""
    project = Project(bake().rename(tmp_path / folder))
    tools = {"python": "command -v honcho", "honcho": "true", "uv": "true", "pip": "true"}
    (project / ".venv/bin").mkdir(parents=True)
    for name, command in tools.items():
        tool = project / ".venv/bin" / name
        tool.write_text(f"#!/bin/sh\n{command}\n")
        tool.chmod(0o755)
    printed = project.call("make", "--silent", "run").strip()

    assert printed == str(project.resolve() / ".venv/bin/honcho")


ABOUT = """[project]
name = "tools"
version = "1"
[dependency-groups]
test = ["certifi"]
"""


def test_a_clone_installs_the_packages_of_the_day_of_its_commit(tmp_path):
    clone = Project(tmp_path / "clone")
    shutil.copytree(TEMPLATE / "celery-steady/src", clone / "celery-steady/src")
    (clone / "durable-jobs").mkdir()
    shutil.copy(TEMPLATE / "Makefile", clone)
    for folder in clone, clone / "celery-steady", clone / "durable-jobs":
        (folder / "pyproject.toml").write_text(ABOUT)
    clone.commit(GIT_COMMITTER_DATE="2026-01-15T12:00:00Z")
    clone.call("make", ".venv")
    assert "certifi==2026.1.4" in clone.call(".venv/bin/uv", "pip", "freeze")
