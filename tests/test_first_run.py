"""The first five minutes: the default output is installed and works, and so does each broker."""

import re

import pytest

from harness import demo
from harness.bake import baked
from harness.containers import brokers
from harness.outputs import default_output, plain_output, use
from harness.project import path_without, started
from harness.servers import SERVERS

NOT_STARTED = ["rabbitmq"]  # `make run` has no stand-in for it


@pytest.fixture(scope="module")
def output(request, cookies_session):
    """The project has the name of a module of Python, which nothing imports by mistake."""
    return baked(cookies_session, {"project_name": "Calendar", **request.param})


@plain_output
def test_it_passes_its_checks_and_its_own_tests(project):
    """On SQLite, with a real worker that takes a task from Redis or from its stand-in."""
    assert project.name == "calendar"
    project.call("make", "check")
    printed = project.call("make", "test", **project.free_servers())
    assert re.search(r"= \d+ passed in", printed), printed  # none was skipped


IMPORT_EACH = """
import importlib, os
from pathlib import Path
import django
django.setup()
# config/tracing.py needs packages of an extra.
for path in sorted({*Path().glob("[!.t]*/**/*.py")} - {Path("config/tracing.py")}):
    child = os.fork()
    if not child:
        importlib.import_module(".".join(path.with_suffix("").parts))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, path
    print(path)
"""


@plain_output
def test_each_module_can_be_imported_first(project):
    """Settings name modules in strings, which test_there_are_no_circular_imports does not see."""
    settings = {"DJANGO_SETTINGS_MODULE": "config.settings"}
    imported = project.call(".venv/bin/python", "-c", IMPORT_EACH, **settings).split()
    assert {"api/throttling.py", "api/views.py", "config/logs.py", "orders/views.py"} <= {*imported}


@pytest.mark.parametrize("package", ["celery", "certifi"])
def test_a_project_may_have_the_name_of_a_package(bake, package):
    """Of a dependency, or of a dependency of one: uv installs no package of the same name."""
    project = bake(project_slug=package)
    project.run("uv", "lock", "--quiet")
    locked = re.findall('^name = "(.+)"$', project.read("uv.lock"), re.MULTILINE)
    assert {package, f"{package}-project"} < set(locked)


@pytest.mark.parametrize("broker", brokers("demo"))
def test_the_demo_runs_tasks_on_each_broker(broker, tmp_path, capfd):
    """As `make demo`: it fails if one of its steps does. Redis is not installed here."""
    tools = path_without("redis-server", "valkey-server", folder=tmp_path / "bin")
    servers = [SERVERS[broker](tmp_path / broker)] if broker in NOT_STARTED else []
    with started(*servers):
        variables = servers[0].variables if servers else {}
        demo.main([f"broker={broker}"], tmp_path / "demo", PATH=tools, **variables)
    assert re.search("(5000|4999) of 5000 .* 0 of them twice", capfd.readouterr().out)


@default_output
def test_durable_jobs_run_on_the_stand_in(with_tasks, tmp_path):
    """The stand-in is fakeredis, which `make run` starts if no Redis is installed."""
    path = path_without("redis-server", "valkey-server", folder=tmp_path / "bin")
    log = use(with_tasks, tmp_path, PATH=path)
    assert "Starting fakeredis" in log
