"""The hooks: they run anywhere, make secrets, and change no file that is not theirs."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from stat import S_IMODE
from types import SimpleNamespace

import pytest
from cookiecutter.utils import create_env_with_context

from harness.bake import DEFAULTS, OPTIONS, TEMPLATE
from harness.project import Project


@pytest.mark.parametrize("hook", ["pre_gen_project", "post_gen_project"])
def test_hooks_run_on_a_bare_python(tmp_path, hook):
    source = (TEMPLATE / f"hooks/{hook}.py").read_text("utf-8")
    (tmp_path / ".env.example").write_text("# For development\nDEBUG=True\n\n# For production\n")
    (tmp_path / ".dropped").write_text("")
    script = tmp_path / "hook.py"
    answers = {**OPTIONS, **DEFAULTS, "project_slug": "shop"}
    script.write_text(create_env_with_context({}).from_string(source).render(cookiecutter=answers))
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", script], cwd=tmp_path, capture_output=True
    )

    assert result.returncode == 0
    # Each import takes time in every bake: these few take 5 ms.
    imported = {
        node.names[0].name for node in ast.parse(source).body if isinstance(node, ast.Import)
    }
    assert imported <= {"json", "keyword", "os", "re", "sys", "unicodedata"}


def test_a_refusal_leaves_an_existing_project_alone(run, bake):
    project = bake(project_slug="shop")
    before = project.contents()
    result = run(
        *("--no-input", "--overwrite-if-exists", "author_email=nobody", "project_slug=shop"),
        out=project.parent,
    )

    assert result.returncode == 1
    assert project.contents() == before


# Refused slugs: a folder of that name may exist and belong to somebody else.

OCCUPIED = ["guest", "my-shop", "Shop"]
PATHS = [
    *("..", ".", "", "shop/", "a/b", "x/..", "../victim", "../empty", "../new"),
    *("x/../../victim", "{neighbours}/victim", "{neighbours}/new/deep"),
]


@pytest.fixture
def neighbours(tmp_path):
    """The folder that contains the output folder. Both have files before the bake."""
    folder = tmp_path / "neighbours"
    for file in ("victim/file", "victim/deep/file", "file", *(f"there/{s}/file" for s in OCCUPIED)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("mine")
    (folder / "empty").mkdir()
    return folder


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("slug", [*OCCUPIED, *PATHS])
@pytest.mark.parametrize("out", ["there", "new_out/deeper"])
def test_a_refused_slug_changes_no_existing_file(run, neighbours, slug, out):
    slug = slug.format(neighbours=neighbours)
    before = everything(neighbours)
    ways = [
        {"arguments": ["--no-input", f"project_slug={slug}"]},
        {"arguments": ["--no-input", "--overwrite-if-exists", f"project_slug={slug}"]},
        {"arguments": ["--overwrite-if-exists"], "typed": f"Shop\n{slug}\n" + "\n" * len(OPTIONS)},
    ]
    for way in ways if slug else ways[:2]:  # an empty line that is typed takes the default
        result = run(*way["arguments"], typed=way.get("typed"), out=neighbours / out)

        assert result.returncode == 1, way
        after = everything(neighbours)
        made = {neighbours / out, *(neighbours / out).parents} & after.keys() - before.keys()
        for folder in sorted(made, reverse=True):  # --output-dir made these: they are empty
            del after[folder]
            folder.rmdir()
        assert after == before, way
        if "already exists" not in result.stdout:  # Cookiecutter's own refusal
            assert f"project_slug {slug!r}: " in result.stderr, way


@pytest.mark.parametrize("slug", ["s" * 300, "a\0b", "a\0/../b"], ids=len)
def test_a_typed_slug_that_cannot_name_a_folder_is_refused(run, tmp_path, slug):
    result = run(typed=f"Shop\n{slug}\n" + "\n" * len(OPTIONS))

    assert result.returncode == 1
    assert f"project_slug {slug!r}: use 1-40 characters: a-z, 0-9, _" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_refused_slug_can_be_corrected_in_the_replay_file(run, tmp_path):
    assert run("--no-input", "project_slug=../shop").returncode == 1
    [file] = (tmp_path / "replay").iterdir()
    assert "project_slug '../shop': use" in run("--replay-file", file).stderr

    answers = json.loads(file.read_text())
    answers["cookiecutter"]["project_slug"] = "shop"
    file.write_text(json.dumps(answers))
    assert run("--replay-file", file).returncode == 0
    assert (tmp_path / "out/shop/manage.py").exists()


# .env


def test_env_has_fresh_secrets(bake):
    one, other = (
        dict(re.findall("^([A-Z_]+)=(.*)$", (bake() / ".env").read_text(), re.MULTILINE))
        for _ in range(2)
    )
    secrets = {name for name in one if re.search("SECRET|PASSWORD|AUTH", name)}

    assert {"SECRET_KEY", "FLOWER_BASIC_AUTH", "POSTGRES_PASSWORD", "REDIS_PASSWORD"} <= secrets
    assert secrets == {name for name in one if one[name] != other[name]}
    assert all(re.search("[0-9a-f]{24}$", one[name]) for name in secrets)


def test_all_secrets_of_env_differ(bake):
    secrets = re.findall("[0-9a-f]{24}", (bake() / ".env").read_text())

    assert len(secrets) >= 6
    assert len(set(secrets)) == len(secrets)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_its_owner_can_read_env(bake, umask):
    before = os.umask(umask)
    try:
        project = bake()
    finally:
        os.umask(before)

    assert S_IMODE((project / ".env").stat().st_mode) == 0o600


def test_env_is_never_overwritten(run, tmp_path):
    env = tmp_path / "out/my_project/.env"
    run("--no-input")
    env.write_text("SECRET_KEY=in-use\n")
    result = run("--no-input", "--overwrite-if-exists")

    assert result.returncode == 0
    assert env.read_text() == "SECRET_KEY=in-use\n"


# Folders and files


def test_empty_folders_of_git_and_virtualenvs_are_kept(tmp_path):
    kept = [tmp_path / folder for folder in (".git/refs/tags", ".venv/include")]
    gone = [tmp_path / folder for folder in ("orders/migrations", ".github/workflows")]
    for folder in kept + gone:
        folder.mkdir(parents=True)
    (tmp_path / ".env.example").write_text("# For development\nDEBUG=True\n\n# For production\n")
    (tmp_path / ".dropped").write_text("orders\n.github\n")
    subprocess.run(
        [sys.executable, TEMPLATE / "hooks/post_gen_project.py"], cwd=tmp_path, check=True
    )

    assert all(folder.exists() for folder in kept)
    assert not any(folder.parent.exists() for folder in gone)


def test_empty_folders_behind_a_link_are_kept(run, tmp_path):
    """The link leads out of the project, so the folders behind it are not the project's."""
    (tmp_path / "others/kubernetes").mkdir(parents=True)
    (tmp_path / "out/my_project").mkdir(parents=True)
    (tmp_path / "out/my_project/deploy").symlink_to(tmp_path / "others")
    result = run("--no-input", "--overwrite-if-exists", "deployment=none")

    assert result.returncode == 0, result.stderr
    assert (tmp_path / "others/kubernetes").is_dir()


def test_overwriting_keeps_files_that_the_owner_added(run, tmp_path):
    project = tmp_path / "out/my_project"
    assert run("--no-input", "durable_jobs=yes").returncode == 0
    (project / "media/uploads").mkdir(parents=True)  # still empty
    (project / "vendor/mine.whl").write_text("mine")
    result = run("--no-input", "--overwrite-if-exists", "durable_jobs=yes")

    assert result.returncode == 0, result.stderr
    assert (project / "media/uploads").is_dir()
    assert (project / "vendor/mine.whl").read_text() == "mine"


PATHS_DROPPED = ["orders/templates/mine.html", "deploy/kubernetes/mine.yaml"]


@pytest.mark.usefixtures("hooks_in_this_process")
def test_overwriting_keeps_older_files_in_folders_that_are_dropped(run, tmp_path, monkeypatch):
    """No call sets the time of a file's last change, so the hook is told an older one."""
    project = tmp_path / "out/my_project"
    answers = ["--no-input", "include_example=no", "deployment=none"]
    assert run(*answers).returncode == 0
    for file in PATHS_DROPPED:
        (project / file).parent.mkdir(parents=True)
        (project / file).write_text("mine")

    def stat_of(path, **options):
        found = stat(path, **options)
        if str(path) not in PATHS_DROPPED:
            return found
        return SimpleNamespace(st_ctime=found.st_ctime - 3600, st_mode=found.st_mode)

    stat = os.stat
    monkeypatch.setattr(os, "stat", stat_of)
    assert run(*answers, "--overwrite-if-exists").returncode == 0
    monkeypatch.undo()
    left = {path.relative_to(project) for path in project.rglob("*") if path.is_file()}
    folders = {Path(file).parts[0] for file in PATHS_DROPPED}
    assert {path for path in left if path.parts[0] in folders} == set(map(Path, PATHS_DROPPED))


@pytest.mark.parametrize("out", ["with space", "ünï/名前/🚀", 'o\'clock "now"', "$HOME; #1 & [x]"])
def test_the_output_path_may_have_unusual_characters(run, tmp_path, out):
    result = run("--no-input", out=out)

    assert result.returncode == 0, result.stderr
    project = Project(tmp_path / out / "my_project")
    project.run("ruff", "check", "--no-cache")
    assert (project / ".env").exists()


@pytest.mark.parametrize("folder, printed", [("out", True), ("elsewhere", False)])
def test_the_next_steps_are_printed_where_the_project_is_new(
    run, tmp_path, monkeypatch, folder, printed
):
    """cruft's updates write it to temporary folders: there, they would be wrong."""
    monkeypatch.setenv("PWD", str(tmp_path / folder))
    assert ("    cd my_project\n    make run\n" in run("--no-input").stdout) is printed
