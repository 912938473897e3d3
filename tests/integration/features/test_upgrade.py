"""A project gets the changes of a newer template, and keeps those of its owner.

The tests run the commands of docs/upgrading.md as they are, with the cruft that uvx installs today.
"""

import json
import os
import re
import shlex
import shutil

import pytest

from harness.bake import ADDRESS, TEMPLATE
from harness.project import Project

PARTS = ["cookiecutter.json", "hooks", "templates", "{{cookiecutter.project_slug}}"]
PAGE = (TEMPLATE / "docs/upgrading.md").read_text("utf-8")
CREATE, LINK, CHECK, UPDATE, CHANGE_ANSWER = re.findall(r"uvx cruft [^`\n]+", PAGE)
ANSWERS = {"project_name": "Tea Shop", "broker": "rabbitmq", "include_example": "no"}
# The same at the prompts, in the order of the options: the second broker, the second answer.
TYPED = ["Tea Shop", *[""] * 4, "2", *[""] * 6, "2"]
SETTINGS = "config/settings.py"
OWNERS = 'STATIC_URL = "static/"', 'STATIC_URL = "files/"'
TEMPLATES = '"TASK_TIME_LIMIT", 600', '"TASK_TIME_LIMIT", 500'


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"replay_dir: {tmp_path}/replay\ncookiecutters_dir: {tmp_path}/cloned\n")
    monkeypatch.setenv("COOKIECUTTER_CONFIG", str(config))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for name in ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL"):
        monkeypatch.setenv(f"GIT_{name}", "you@example.com")


@pytest.fixture
def template(tmp_path):
    """A copy of this template in its own repository, which can get a newer commit."""
    template = Project(tmp_path / "template")
    template.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (TEMPLATE / part).is_dir() else shutil.copy
        copy(TEMPLATE / part, template / part)
    template.commit()
    return template


def type_in(folder, command, template, answers=()):
    """Run a command of the page in this folder, and type these answers."""
    commit = template.call("git", "rev-parse", "HEAD").strip()
    command = command.replace(ADDRESS, str(template))
    typed = shlex.quote("".join(f"{answer}\n" for answer in answers))
    return folder.call("sh", "-c", f"printf %s {typed} | {command.replace('COMMIT', commit)}")


def created(template, folder):
    """Bake a project with `cruft create`."""
    folder.mkdir(exist_ok=True)
    type_in(Project(folder), CREATE, template, TYPED)
    return Project(folder / "tea_shop")


def baked(template, folder, answers=ANSWERS):
    """Bake a project with cookiecutter."""
    answers = [f"{option}={answer}" for option, answer in answers.items()]
    options = ["--output-dir", folder, "--no-input", *answers]
    template.run("cookiecutter", template, *options)
    return Project(folder / "tea_shop")


def linked(template, folder, answers=ANSWERS, typed=TYPED):
    """Bake a project with cookiecutter, then link it. The last answer is the commit."""
    project = baked(template, folder, answers)
    type_in(project, LINK, template, [*typed, ""])
    state = json.loads(project.read(".cruft.json"))
    (project / ".cruft.json").write_text(json.dumps({**state, "skip": [".env"]}))
    return project


def test_cruft_writes_what_cookiecutter_writes(template, tmp_path):
    project = created(template, tmp_path / "cruft")
    other = baked(template, tmp_path / "cookiecutter")
    for file in project / ".env", project / ".cruft.json", other / ".env":
        file.unlink()
    assert project.contents() == other.contents()


@pytest.mark.parametrize("make", [created, linked])
def test_an_update_keeps_what_the_owner_changed(make, template, tmp_path):
    project = make(template, tmp_path)
    secrets = project.read(".env")
    project.edit(SETTINGS, *OWNERS)
    (project / "Procfile.dev").unlink()
    (project / "own.py").write_text("")
    project.commit()

    output = template / "{{cookiecutter.project_slug}}"
    output.edit(SETTINGS, *TEMPLATES)
    output.edit("Procfile.dev", "beat: python", "beat: exec python")
    (output / "{{ cookiecutter.new_option }}.md").write_text("New\n")
    options = '"new_option": ["default", "other"], "include_example"'
    template.edit("cookiecutter.json", r'"include_example"(?=: \[)', options)
    template.commit()
    type_in(project, UPDATE, template)

    settings = project.read(SETTINGS)
    assert OWNERS[1] in settings and TEMPLATES[1] in settings
    assert project.read(".env") == secrets
    changes = project.call("git", "status", "--short", "--untracked-files=all").split()
    assert dict(zip(changes[1::2], changes[::2], strict=True)) == {
        SETTINGS: "M",  # merged without a conflict
        "default.md": "A",
        ".cruft.json": "M",
    }
    assert "up to date" in type_in(project, CHECK, template)
    project.call("git", "reset", "--hard", "--quiet")
    assert project.call("git", "status", "--short") == ""
    type_in(project, CHANGE_ANSWER, template)
    assert OWNERS[1] in project.read(SETTINGS)
    assert 'CELERY_WORKER_POOL = "threads"' in project.read(SETTINGS)


def test_the_example_can_be_removed_and_the_owners_changes_stay(template, tmp_path):
    """By the command in the project's README."""
    default = ["Tea Shop", *[""] * 12]
    project = linked(template, tmp_path, {"project_name": "Tea Shop"}, default)
    [remove] = re.findall(r"uvx cruft [^`\n]+", project.read("README.md"))
    project.edit(SETTINGS, *OWNERS)
    (project / "own.py").write_text("")
    project.commit()
    type_in(project, remove, template)

    assert OWNERS[1] in project.read(SETTINGS) and (project / "own.py").exists()
    left = [path for path in project.files() if ".git/" not in str(path) and path.suffix == ".py"]
    assert not [path for path in left if "orders" in path.read_text() or "orders" in str(path)]
    assert not list(project.rglob("*.rej"))


def test_a_replay_file_without_a_new_option_needs_a_terminal(template, tmp_path):
    """As docs/options.md says."""
    baked(template, tmp_path)
    template.edit("cookiecutter.json", r'"ci": \["github"', '"new": ["a", "b"], "ci": ["github"')
    file = tmp_path / "replay/template.json"
    replay = f"cookiecutter --replay-file {file} {template} --output-dir again"
    with pytest.raises(AssertionError, match="Aborted!"):
        template.call("sh", "-c", f"{replay} < /dev/null")
    template.call("sh", "-c", f"echo | {replay}")
    assert (template / "again/tea_shop").exists()
