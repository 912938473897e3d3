import hashlib
import itertools
import os
import runpy
import sys
import tempfile
from collections import Counter
from functools import cache
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from cookiecutter import generate
from cookiecutter.__main__ import main
from cookiecutter.utils import work_in
from jinja2 import Environment

pytest.register_assert_rewrite("harness")  # before the first import from there
from harness.bake import TEMPLATE, baked  # noqa: E402
from harness.project import Project  # noqa: E402

pytest_plugins = [f"harness.{name}" for name in "checks containers faults outputs plain".split()]


@pytest.fixture(scope="session", autouse=True)
def cache_templates():
    """Compile each template, and check whether a file is binary, once instead of in each bake."""
    codes = {}

    def compile(environment, *source, **options):
        key = (*source, *options.items())
        if key not in codes:
            codes[key] = original(environment, *source, **options)
        return codes[key]

    original = Environment.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "compile", compile)
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
    """Run tests that share a stack in the order of their files, and start with what takes longest.

    These are chaos, containers, then the stacks with the most tests. Also add the answers of its
    output to the reports of a test, because xdist sends nothing else to the main process.
    """

    def group(item):
        marker = item.get_closest_marker("xdist_group")
        return marker.args[0] if marker else ""

    def place(item):
        return item.location[:2] if group(item) else ()  # file and line; fixtures order the others

    longest = {"chaos": len(items), "docker-redis": len(items), "": 0}
    sizes = Counter(map(group, items)) | longest
    items.sort(key=lambda item: (-sizes[group(item)], group(item), place(item)))
    for item in items:
        if "output" in item.fixturenames and hasattr(item, "callspec"):
            item.user_properties.append(("answers", item.callspec.params["output"]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Two for each processor: most tests wait, for servers or for time to pass."""
    # macOS has no affinity.
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return 2 * cpus


def pytest_terminal_summary(terminalreporter):
    """Print how long tests took, which ran with which output, and why tests were skipped."""
    outputs = {}  # {answers: {column: reports}}
    chaos, seconds = [], Counter()
    for report in itertools.chain(*terminalreporter.stats.values()):
        if not isinstance(report, pytest.TestReport):
            continue
        seconds[report.nodeid.split("::")[0]] += report.duration
        properties = dict(report.user_properties)
        if "chaos" in properties and report.when == "call":
            chaos.append(properties["chaos"])
        if "answers" in properties:
            test = report.nodeid.split("::")[1].split("[")[0]
            column = test[8:].replace("_", " ") if test.startswith("test_it_") else "other tests"
            columns = outputs.setdefault(tuple(properties["answers"].items()), {})
            columns.setdefault(column, []).append(report)
    terminalreporter.section("seconds, of all processes together")
    for file, count in seconds.most_common():
        terminalreporter.line(f"{count:6.0f}  {file}")
    if chaos:
        terminalreporter.section("chaos")
        terminalreporter.write("".join(chaos))
    for reason in sorted({r.longrepr[2] for r in terminalreporter.stats.get("skipped", [])}):
        terminalreporter.line(reason)
    if not outputs:
        return
    always = {"broker", "result_backend", "worker_pool"}
    shown = [
        choices[0][0] in always or len(set(choices)) > 1 for choices in zip(*outputs, strict=True)
    ]
    options = list(itertools.compress([option for option, _ in next(iter(outputs))], shown))
    tests = sorted(set().union(*outputs.values()), key=lambda column: (column[0] == "o", column))
    table = [[*options, *tests]]
    for answers, reports in sorted(outputs.items(), key=str):
        choices = [str(choice) for _, choice in itertools.compress(answers, shown)]
        table.append([*choices, *(cell(reports.get(test, [])) for test in tests)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    terminalreporter.section("outputs that ran")
    for row in table:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        terminalreporter.line("  ".join(cells).rstrip())


def cell(reports):
    outcomes = {report.outcome for report in reports}
    for bad in {"failed", "skipped"} & outcomes:
        return bad
    seconds = sum(report.duration for report in reports)
    return f"{seconds:.0f} s" if reports else "-"
