"""The wheel in outputs is what durable-jobs/ builds, and a second build has the same bytes."""

import os
import shutil
import zipfile

from harness.bake import LIBRARY, OUTPUT, chosen
from harness.project import Project

[WHEEL] = (OUTPUT / "vendor").glob("*.whl")


def build(source, folder, *options):
    """Build the library, and return what that wrote, {name: bytes}."""
    options = ["--quiet", "--no-create-gitignore", "--out-dir", folder, *options]
    Project(source).run("uv", "build", *options)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_wheel_is_that_of_the_source(tmp_path):
    built = build(LIBRARY, tmp_path, "--wheel")
    assert built == {WHEEL.name: WHEEL.read_bytes()}, "the source has changed: run `make wheel`"


def test_an_output_names_its_wheel(bake):
    assert f"vendor/{WHEEL.name}" in chosen(durable_jobs="yes").durable_jobs.sources
    assert (bake(durable_jobs="yes") / "vendor" / WHEEL.name).read_bytes() == WHEEL.read_bytes()
    assert not (bake() / "vendor").exists()


def test_two_builds_have_the_same_bytes(tmp_path):
    """Another time, folder, umask and leftovers of Python change nothing."""
    first = build(LIBRARY, tmp_path / "first")
    copy = shutil.copytree(LIBRARY, tmp_path / "copy")  # its folders and compiled files are newer
    (copy / "src/durable_jobs/__pycache__").mkdir(exist_ok=True)
    (copy / "src/durable_jobs/__pycache__/left.pyc").write_bytes(b"left")
    for path in copy.rglob("*.py"):
        path.chmod(0o600)
        os.utime(path, (0, 10**9))
    assert build(copy, tmp_path / "second") == first


def test_the_wheel_has_every_file_its_licence_and_what_changed():
    with zipfile.ZipFile(WHEEL) as archive:
        names = {name for name in archive.namelist() if "dist-info/" not in name}
        about = {name.rpartition("/")[2] for name in archive.namelist()} - names
    source = LIBRARY / "src"
    files = {file for file in source.rglob("*.*") if file.is_file() and file.suffix != ".pyc"}
    assert names >= {file.relative_to(source).as_posix() for file in files}
    assert {"LICENSE", "CHANGELOG.md"} <= about
