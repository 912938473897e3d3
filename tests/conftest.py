import os

import pytest
from project import Project


@pytest.fixture
def bake(cookies):
    """Bake a project: `bake(project_name="Shop").run("ruff", "check")`."""
    return lambda **answers: baked(cookies, answers)


@pytest.fixture(scope="session", params=[True, False], ids=["example", "no-example"])
def project(request, cookies_session):
    """A project with its own virtual environment, once with the example and once without."""
    project = baked(cookies_session, {"include_example": request.param})
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
