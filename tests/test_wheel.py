"""The wheels in outputs are what the libraries build, and a second build has the same bytes."""

import os
import shutil
import zipfile

import pytest

from harness.bake import LIBRARY, OUTPUT, PINNED, STEADY
from harness.project import Project

STEADY_WHEEL, WHEEL = (
    OUTPUT / "vendor" / name for name in (PINNED.celery_steady, PINNED.durable_jobs)
)
libraries = pytest.mark.parametrize(
    ("source", "wheel"),
    [(STEADY, STEADY_WHEEL), (LIBRARY, WHEEL)],
    ids=["celery-steady", "durable-jobs"],
)


def build(source, folder, *options):
    """Build a library, and return what that wrote, {name: bytes}."""
    options = ["--quiet", "--no-create-gitignore", "--out-dir", folder, *options]
    Project(source).run("uv", "build", *options)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@libraries
def test_the_wheel_is_that_of_the_source(source, wheel, tmp_path):
    built = build(source, tmp_path, "--wheel")
    assert built == {wheel.name: wheel.read_bytes()}, "the source has changed: run `make wheel`"


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
    assert {"LICENSE", "CHANGELOG.md"} <= about
