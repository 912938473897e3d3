"""The first five minutes: the default output is installed and works, and so does each broker."""

import re

import pytest

from harness.bake import DEFAULTS, baked
from harness.outputs import (
    ORDER,
    combinations,
    default_output,
    mails,
    one_for_each_broker,
    outputs,
    show_addresses,
    use,
)
from harness.project import path_without, wait_for


@pytest.fixture(scope="module")
def output(request, cookies_session):
    """The project has the name of a module of Python, which nothing imports by mistake."""
    return baked(cookies_session, {"project_name": "Calendar", **request.param})


@outputs(DEFAULTS, next(combinations()))
def test_it_passes_its_checks_and_its_own_tests(project):
    """On SQLite, with a real worker that takes jobs from Redis or from its stand-in."""
    assert project.name == "calendar"
    project.call("make", "check")
    printed = project.call("make", "test", **project.free_servers())
    assert re.search(r"= \d+ passed in", printed), printed  # none was skipped


@pytest.mark.parametrize("package", ["celery", "certifi"])
def test_a_project_may_have_the_name_of_a_package(bake, package):
    """Of a dependency, or of a dependency of one: uv installs no package of the same name."""
    project = bake(project_slug=package)
    project.run("uv", "lock", "--quiet")
    locked = re.findall('^name = "(.+)"$', project.read("uv.lock"), re.MULTILINE)
    assert {package, f"{package}-project"} < set(locked)


@outputs(DEFAULTS)
def test_the_default_runs_on_the_stand_in(project, tmp_path):
    path = path_without("redis-server", "valkey-server", folder=tmp_path / "bin")
    with project.up(PATH=path) as site:
        show_addresses(site)
        status, _, order = site.request("/api/orders/", ORDER)
        assert status == 201
        wait_for(lambda: site.request(f"/api/orders/{order['id']}/")[2]["confirmed_at"], site=site)
        assert "Thank you! You ordered 2 × Tea." in mails(project)

        status, headers, _ = site.request("/api/orders/report/", {})
        assert status == 202
        report = headers["Location"]
        wait_for(lambda: site.request(report)[2]["state"] == "PROGRESS", site=site)
        wait_for(lambda: site.worker in site.ask_flower("/api/workers?refresh=1")[2], site=site)
        wait_for(lambda: site.request(report)[2]["state"] == "SUCCESS", site=site)
    assert "Starting fakeredis" in site.log


@default_output
def test_it_runs_on_the_stand_in(with_tasks, tmp_path):
    """The stand-in is fakeredis, which `make run` starts if no Redis is installed."""
    path = path_without("redis-server", "valkey-server", folder=tmp_path / "bin")
    log = use(with_tasks, tmp_path, PATH=path)
    assert "Starting fakeredis" in log


@outputs(*one_for_each_broker())
def test_it_runs(broker, with_tasks, tmp_path):
    use(with_tasks, tmp_path, **broker)
