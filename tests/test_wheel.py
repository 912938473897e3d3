"""The wheels in outputs have the libraries' source, and a second build has the same bytes."""

import os
import re
import runpy
import shutil
import sys
import zipfile

import pytest

from harness.bake import LIBRARY, OUTPUT, PINNED, STEADY, TEMPLATE
from harness.project import Project

VENDOR, NAMES = "{{cookiecutter.project_slug}}/vendor", "templates/versions.jinja"
STEADY_VERSION = re.search(
    '__version__ = "(.+)"', (STEADY / "src/celery_steady/__init__.py").read_text("utf-8")
)[1]
STEADY_WHEEL, WHEEL = (
    OUTPUT / "vendor" / name for name in (PINNED.celery_steady, PINNED.durable_jobs)
)
libraries = pytest.mark.parametrize(
    ("source", "wheel"),
    [(STEADY, STEADY_WHEEL), (LIBRARY, WHEEL)],
    ids=["celery-steady", "durable-jobs"],
)


of_source = runpy.run_path(str(TEMPLATE / ".ci/wheel.py"))["source"]


def build(source, folder, *options):
    """Build a library, and return what that wrote, {name: bytes}."""
    options = ["--quiet", "--no-create-gitignore", "--out-dir", folder, *options]
    Project(source).run("uv", "build", *options)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@libraries
def test_the_wheel_is_that_of_the_source(source, wheel, tmp_path):
    assert build(source, tmp_path, "--wheel").keys() == {wheel.name}, "run `make wheel`"
    built = of_source(tmp_path / wheel.name)
    assert built == of_source(wheel), "the source has changed: run `make wheel`"


def test_only_source_and_versions_change_a_wheel_and_a_released_one_stays(tmp_path):
    """`make wheel`, in a copy of what it reads."""
    copy = Project(tmp_path)
    for folder in ".ci", "celery-steady":
        shutil.copytree(TEMPLATE / folder, copy / folder)
    for file in VENDOR, NAMES:
        (copy / file).parent.mkdir(parents=True)
    (copy / NAMES).write_text('{% set celery_steady = "celery_steady-0.9.0-py3-none-any.whl" %}\n')
    (copy / VENDOR).mkdir()

    def change(file, old="", new="\n"):
        path = copy / "celery-steady" / file
        path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8")

    def make():
        copy.call(sys.executable, ".ci/wheel.py", "celery-steady")
        [wheel] = (copy / VENDOR).iterdir()
        assert f'"{wheel.name}"' in copy.read(NAMES)
        return wheel.read_bytes()

    code = "src/celery_steady/__init__.py"
    change(code, STEADY_VERSION, "2.0.0.dev")
    first = make()
    for page in "README.md", "CHANGELOG.md":
        change(page)
    assert make() == first
    change(code)
    assert make() != first
    change(code, "2.0.0.dev", "2.0.0")
    released = make()
    assert make() == released
    change(code)
    with pytest.raises(AssertionError, match="is released, but its source has changed"):
        make()


@pytest.mark.parametrize("durable_jobs", ["no", "yes"])
def test_an_output_has_the_wheels_that_it_names(bake, durable_jobs):
    project = bake(durable_jobs=durable_jobs)
    expected = {STEADY_WHEEL, *([WHEEL] if durable_jobs == "yes" else [])}
    found = {path.name: path.read_bytes() for path in (project / "vendor").iterdir()}
    assert found == {wheel.name: wheel.read_bytes() for wheel in expected}
    for wheel in STEADY_WHEEL, WHEEL:
        assert (f'"vendor/{wheel.name}"' in project.read("pyproject.toml")) == (wheel in expected)


@libraries
def test_two_builds_have_the_same_bytes(source, wheel, tmp_path):
    """Another time, folder, umask and leftovers of Python change nothing."""
    first = build(source, tmp_path / "first")
    copy = shutil.copytree(source, tmp_path / "copy")  # its folders and compiled files are newer
    [package] = (copy / "src").iterdir()
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__/left.pyc").write_bytes(b"left")
    for path in copy.rglob("*.py"):
        path.chmod(0o600)
        os.utime(path, (0, 10**9))
    assert build(copy, tmp_path / "second") == first


@libraries
def test_the_wheel_has_every_file_its_licence_and_what_changed(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if "dist-info/" not in name}
        about = {name.rpartition("/")[2] for name in archive.namelist()} - names
    source = source / "src"
    files = {file for file in source.rglob("*.*") if file.is_file() and file.suffix != ".pyc"}
    assert names >= {file.relative_to(source).as_posix() for file in files}
    assert {"LICENSE", "CHANGELOG.md", "AGENTS.md"} <= about
