"""The engine is a library: a wheel of `jobs/` alone replaces the folder."""

import re
import shutil
import sys
import tomllib
import zipfile
from email import message_from_bytes

import pytest

from harness.bake import TEMPLATE, engine
from harness.checks import PACKAGES, imports, packages
from harness.project import Project

pytestmark = pytest.mark.xdist_group("package")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    Project(TEMPLATE).call("make", "package", ARGS=f"--out-dir {folder}")
    [wheel] = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_every_file_of_the_engine(wheel):
    files = {str(file): text.encode() for file, text in engine().items()}
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert {name: archive.read(name) for name in names} == files


def test_the_wheel_requires_what_the_engine_imports(wheel, bake):
    """The versions are those that a project requires. Only testing.py imports pytest."""
    with zipfile.ZipFile(wheel) as archive:
        [about] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        about = message_from_bytes(archive.read(about))
    required = about.get_all("Requires-Dist")
    python = [text for file, text in engine().items() if file.suffix == ".py"]
    foreign = set().union(*map(imports, python)) - sys.stdlib_module_names - {"jobs", "pytest"}
    assert packages(required) == {PACKAGES.get(name, name.replace("_", "-")) for name in foreign}

    project = tomllib.loads(bake(durable_jobs="yes").read("pyproject.toml"))["project"]
    assert set(required) <= {re.sub(r"\[.*]", "", each) for each in project["dependencies"]}


def test_a_project_without_the_folder_passes_its_tests_on_the_wheel(wheel, bake):
    project = bake(durable_jobs="yes")
    project.call("make", ".venv")  # its own, for the wheel
    shutil.rmtree(project / "jobs")
    # Offline, because all that the wheel requires is installed.
    project.run("uv", "pip", "install", "--offline", "--python", ".venv/bin/python", wheel)
    assert "/site-packages/jobs/" in project.shell("import jobs; print(jobs.__file__)")

    printed = project.call("make", "check", "test", **project.free_servers())
    assert re.search(r"= \d+ passed", printed), printed
