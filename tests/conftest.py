import hashlib
import os
import re
import runpy
import sys
import tempfile
from collections import Counter
from functools import cache, partial
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from cookiecutter import generate
from cookiecutter.__main__ import main
from cookiecutter.utils import work_in
from jinja2 import Environment

pytest.register_assert_rewrite("harness")  # before the first import from there
from harness.bake import ENVIRONMENT, TEMPLATE, baked  # noqa: E402
from harness.project import Project  # noqa: E402

LONGEST = "(chaos|docker-redis|library-.+|steady)$"  # groups of tests
pytest_plugins = [f"harness.{name}" for name in "containers faults outputs services".split()]


@pytest.fixture(scope="session", autouse=True)
def cache_templates():
    """Compile each template, and check whether a file is binary, once instead of in each bake."""
    compiled = cache(partial(Environment.compile, ENVIRONMENT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "compile", lambda _, *source: compiled(*source))
        patch.setattr(generate, "is_binary", cache(generate.is_binary))
        yield


@pytest.fixture(scope="session", autouse=True)
def environments(shared):
    """Share environments: a package is installed and compiled once, not for each output."""
    Project.environments = shared / "environments"
    Project.environments.mkdir(exist_ok=True)


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """A folder that all processes of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture
def bake(cookies):
    """Bake a project: `bake(project_name="Shop").run("ruff", "check")`."""
    return lambda **answers: baked(cookies, answers)


@pytest.fixture
def is_new(shared):
    """A function, is_new(check, *texts): whether this run has not yet checked these texts."""
    seen = shared / "seen"
    seen.mkdir(exist_ok=True)

    def is_new(check, *texts):
        digest = hashlib.sha256("\n".join(map(str, texts)).encode()).hexdigest()
        try:
            (seen / f"{check}-{digest}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    return is_new


@pytest.fixture
def hooks_in_this_process(monkeypatch):
    """Start no process for a hook, which saves two for each bake; test_hooks.py starts them."""

    def run_script(script, cwd="."):
        with work_in(cwd):
            runpy.run_path(script, run_name="__main__")

    monkeypatch.setattr("cookiecutter.hooks.run_script", run_script)


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """A function that runs cookiecutter's command; the output goes to `tmp_path / "out"`.

    In this process, because each start takes a second. Hooks are processes of their own.
    """

    def run(*arguments, typed=None, out="out"):
        config = tmp_path / "config.yaml"
        config.write_text(f"replay_dir: {tmp_path}/replay\ncookiecutters_dir: {tmp_path}/cloned\n")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        command = [TEMPLATE, "--config-file", config, "--output-dir", tmp_path / out, *arguments]
        capfd.readouterr()
        result = CliRunner().invoke(main, list(map(str, command)), input=typed)
        hooks = capfd.readouterr()
        return SimpleNamespace(
            returncode=result.exit_code,
            stdout=result.stdout + hooks.out,
            stderr=result.stderr + hooks.err,
        )

    return run


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Start with what takes longest; run tests that share a stack in the order of their files."""

    def group(item):
        marker = item.get_closest_marker("xdist_group")
        return marker.args[0] if marker else ""

    def place(item):
        return item.location[:2] if group(item) else ()  # file and line; fixtures order the others

    # The longest of all, then the stacks with the most tests
    longest = {name: len(items) for name in map(group, items) if re.match(LONGEST, name)}
    sizes = Counter(map(group, items)) | longest | {"": 0}
    items.sort(key=lambda item: (-sizes[group(item)], group(item), place(item)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Two for each processor: most tests wait, for servers or for time to pass."""
    # macOS has no affinity.
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return 2 * cpus
