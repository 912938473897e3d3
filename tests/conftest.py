import os
import tempfile

import pytest
from project import Project

pytest_plugins = ["checks"]


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory):
    """Cookiecutter leaves the hooks that it renders: they go where pytest removes them."""
    tempfile.tempdir = str(tmp_path_factory.mktemp("hooks"))


@pytest.fixture
def bake(cookies):
    """Bake a project: `bake(project_name="Shop").run("ruff", "check")`."""
    return lambda **answers: baked(cookies, answers)


@pytest.fixture(scope="module")
def project(request, cookies_session):
    """An installed project; its tests name the answers: see runs() in test_run.py."""
    project = baked(cookies_session, request.param)
    project.install()
    return project


def baked(cookies, answers):
    result = cookies.bake(extra_context=answers)
    if result.exception:
        raise result.exception
    return Project(result.project_path)


def missing(reason):
    """Skip the test for lack of something on this machine, or fail it where all was promised."""
    if os.environ.get("DEMAND_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)
