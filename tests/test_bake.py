"""Every three choices together bake to a small, clean project.

integration/features/test_every_combination.py does the same for all combinations.
"""

import ast
import itertools
import re
from collections import defaultdict
from fnmatch import fnmatch
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from jinja2 import nodes

from harness.bake import (
    ADDRESS,
    CHOICES,
    COMBINATIONS,
    CONTEXT,
    ENVIRONMENT,
    OUTPUT,
    TEMPLATE,
    chosen,
    covering,
    name,
    render,
)
from harness.blocks import check_blocks
from harness.checks import check_celery, check_dependencies, check_file, check_names, check_pages
from harness.project import Project
from harness.servers import sentinel_settings

PARTS = TEMPLATE / "templates"  # one folder for each option, and one more: `servers`
# How a file of the output calls the chosen file of a folder.
MODULES = {folder.name: folder.name for folder in PARTS.iterdir() if folder.is_dir()}
MODULES["servers"] = "server"
# The one line of a file that stands whole, once for each of these choices.
WHOLE = r'\{% include "durable_jobs/(?:" ~ cookiecutter\.durable_jobs ~ "|yes|no)/(.+)" %\}\n'
# Where a "job" is one of GitHub, Kubernetes or Prometheus.
OTHER_JOBS = r"^jobs:$|job!?=\"(flower|web)\""


def own_traces(option, choice):
    """Return the patterns of words that may appear only where this choice was made."""
    return getattr(chosen(**{option: choice}), option).traces


def server_traces(option, choice):
    module = chosen(**{option: choice})
    name = getattr(getattr(module, option), "server", "")
    return [trace for server in module.servers if server.name == name for trace in server.traces]


@cache
def owners():
    """Return the choices that may bring a word into the output, {pattern: {(option, choice)}}."""
    found = defaultdict(set)
    for option, choices in CHOICES.items():
        for choice in choices:
            for word in own_traces(option, choice) + server_traces(option, choice):
                found[word].add((option, choice))
    return found


@cache
def traces_in(file, text):
    """Return the patterns that match a file or its name."""
    text = re.sub(OTHER_JOBS, "", f"{file}\n{text}", flags=re.MULTILINE).replace(ADDRESS, "")
    return {word for word in owners() if re.search(word, text, re.IGNORECASE)}


def read(project):
    files = [file for file in project.files() if file.suffix != ".whl"]
    return {file.relative_to(project): file.read_text("utf-8") for file in files}


def kept(answers):
    """Return the files of the template that .dropped does not list for these answers."""
    gone = set(map(Path, render(".dropped", **answers).split())) | {Path(".dropped")}
    kept = {file for file in template_paths() if not gone & {file, *file.parents}}
    return {file for file in kept if file.suffix != ".whl"}  # test_wheel.py looks for it


def check_project(project, is_new):
    """Assert that a baked project is clean. Texts that are not new have passed their checks."""
    answers = project.answers
    texts = read(project)
    python = [part for file in texts.items() if file[0].suffix == ".py" for part in file]
    about = texts[Path("pyproject.toml")]
    del texts[Path(".env")]  # .env.example with secrets

    if is_new("names", *texts):
        check_names(texts)
    assert texts.keys() == kept(answers), ".dropped lists what is left out, and it is no more there"
    with_jobs = answers["durable_jobs"] == "yes"
    empty = [path for path in project.rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert empty == []
    for file, text in texts.items():
        for word in traces_in(file, text):
            assert owners()[word] & answers.items(), f"{file} has {word}"
    for file, text in texts.items():
        if is_new("file", file, text):
            check_file(project, file, text)
            if file.suffix == ".md":
                check_blocks(file, text)
    if own_checks := texts.get(Path("api/checks.py")):
        ids = re.findall(r'id="(api\.\w+)"', own_checks)
        assert ids and len(ids) == len(set(ids)), "each check has an id of its own"
    settings = texts[Path("config/settings.py")]
    celery = settings, texts[Path(".env.example")]
    if is_new("celery", *celery):
        check_celery(*celery)
    check_dependencies(texts)
    if not with_jobs:
        lines = itertools.chain(*(text.splitlines() for text in texts.values()))
        named = [line for line in lines if "durable_jobs" in line]
        assert len(named) <= 2, "one paragraph says what the other choice is, one points to it"
    check_pages(texts, [file.relative_to(project) for file in project.files()], template_paths())
    if is_new("ruff", about, *python):
        project.call("ruff", "check", "--no-cache")
        project.call("ruff", "format", "--check", "--no-cache")


@pytest.mark.promise("Only what you chose")
@pytest.mark.usefixtures("hooks_in_this_process")
@pytest.mark.parametrize("answers", covering(COMBINATIONS), ids=name)
def test_every_three_choices_bake_to_a_clean_project(bake, is_new, answers):
    check_project(bake(**answers), is_new)


@pytest.mark.parametrize("pool", CHOICES["worker_pool"])
@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_celery_6_changes_nothing_when_a_worker_loses_its_connection(broker, pool):
    """It then cancels running tasks by default. Only RabbitMQ delivers them again at once.

    For other brokers, that is a default of celery-steady.
    """
    answers = {"project_name": "Shop", "broker": broker, "worker_pool": pool}
    settings = render("config/settings.py", **answers)
    found = re.findall("LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = (True|False)", settings)
    assert found == ["True"] * (broker == "rabbitmq" and pool != "threads")


@pytest.mark.parametrize("durable_jobs", CHOICES["durable_jobs"])
def test_there_are_no_circular_imports(bake, durable_jobs):
    """Not even inside functions."""
    project = bake(durable_jobs=durable_jobs)
    modules = {
        ".".join(file.relative_to(project).with_suffix("").parts): ast.parse(file.read_text())
        for file in project.rglob("*.py")
        if "migrations" not in file.parts
    }
    graph = {name: imports(name, tree) & modules.keys() for name, tree in modules.items()}
    assert {"users.models", "orders.tasks"} & graph["orders.views"]  # so imports are found
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def imports(module, tree):
    """Return the modules that this part of a module may import when it runs."""
    found, for_types = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for_types |= set(node.body)
    for node in set(ast.walk(tree)) - for_types:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = [*package, *(node.module or "").split(".")]
            base = ".".join(filter(None, base))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(
    ("broker", "result_backend"),
    [
        (broker, result_backend)
        for broker in CHOICES["broker"]
        for result_backend in CHOICES["result_backend"]
        if "redis" in (broker, result_backend)
    ],
)
def test_the_settings_for_sentinel_fit_every_project_with_redis(bake, broker, result_backend):
    project = bake(broker=broker, result_backend=result_backend)
    answers = {"CELERY_BROKER_URL": broker, "CELERY_RESULT_BACKEND": result_backend}
    variables = [name for name, answer in answers.items() if answer == "redis"]
    project.append("config/settings.py", sentinel_settings(*variables))
    project.call("ruff", "check", "--no-cache")
    project.call("ruff", "format", "--check", "--no-cache")


@pytest.mark.parametrize("durable_jobs", CHOICES["durable_jobs"])
@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_flower_listens_only_on_the_loopback_address(bake, broker, durable_jobs):
    """Its /metrics and /healthcheck need no password."""
    project = bake(broker=broker, durable_jobs=durable_jobs, deployment="kubernetes")
    texts, services = read(project), project.services()
    for service, options in services.items():
        for port in options.get("ports", []):
            is_public = service == "caddy" and options["profiles"] == ["https"]
            assert port.startswith("0.0.0.0:" if is_public else "127.0.0.1:"), service
    pods = list(yaml.safe_load_all(texts[Path("deploy/kubernetes/base/app.yaml")]))
    assert [each["metadata"]["name"] for each in pods if each["kind"] == "Service"] == ["web"]
    [has_flower] = {"flower" in services, "\nflower:" in texts[Path("Procfile.dev")]}
    assert has_flower == chosen(broker=broker).has_flower
    assert has_flower == (Path("flowerconfig.py") in texts)
    if has_flower:
        assert 'or "127.0.0.1"' in texts[Path("flowerconfig.py")]
        assert re.search("^flower: celery -A config flower$", texts[Path("Procfile.dev")], re.M)
        [pod] = [each for each in pods if each["metadata"]["name"] == "flower"]
        [container] = pod["spec"]["template"]["spec"]["containers"]
        assert container["command"] == ["celery", "-A", "config", "flower"]
        assert "FLOWER_ADDRESS" not in texts[Path("deploy/kubernetes/base/app.yaml")]


@cache
def template_paths():
    """Return the paths that an output may have."""
    return {path.relative_to(OUTPUT) for path in OUTPUT.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("option", "choice"), [(option, choice) for option in CHOICES for choice in CHOICES[option]]
)
def test_the_output_of_a_choice_has_the_words_listed_as_its_traces(bake, option, choice):
    """Otherwise check_project() would search for words that do not exist."""
    own = own_traces(option, choice)
    others = [other for other in CHOICES[option] if other != choice]
    assert own or all(own_traces(option, other) for other in others), (
        "two choices without traces: then no test tells their outputs apart"
    )

    found = set()
    for durable_jobs in CHOICES["durable_jobs"]:
        answers = {"durable_jobs": durable_jobs, option: choice}
        for file, text in read(bake(**answers)).items():
            found |= traces_in(file, text)
    assert not {*own, *server_traces(option, choice)} - found, "the output lacks these words"


def listed_parts():
    """Return the lists of templates/README.md, {part: for which choices it is optional}."""
    parts = {}
    for section in (PARTS / "README.md").read_text("utf-8").split("\n## ")[1:]:
        module, _, items = section.partition("\n")
        for part, optional in re.findall(r"^- `(\w+)`(\?| \(.+?\))?", items, re.MULTILINE):
            assert f"{module}.{part}" not in parts, f"{module}.{part} is listed twice"
            parts[f"{module}.{part}"] = optional
    return parts


@pytest.mark.parametrize("deployment", CHOICES["deployment"])
def test_make_alone_lists_each_command(bake, deployment):
    project = bake(deployment=deployment)
    targets = set(re.findall(r"(?m)^([a-z]+):", project.read("Makefile")))
    listed = project.call("make", "--no-print-directory").splitlines()  # also inside `make test`
    assert {line.split()[1] for line in listed} == targets


def test_the_list_of_parts_names_those_that_files_print():
    printed, guarded = set(), set()  # all parts; parts that may be missing
    for path in [*PARTS.rglob("*.jinja"), *PARTS.glob("*/*.md"), *whole_files(), *output_files()]:
        tree = ENVIRONMENT.parse(path.read_text("utf-8"))
        filters = tree.find_all((nodes.Filter, nodes.Test))
        optional = {id(each.node) for each in filters if each.name in ("default", "defined")}
        for node in tree.find_all(nodes.Getattr):
            if isinstance(node.node, nodes.Name) and node.node.name in MODULES.values():
                part = f"{node.node.name}.{node.attr}"
                printed.add(part)
                guarded |= {part} if id(node) in optional else set()
    assert listed_parts().keys() == printed
    # With `| default`, a misspelled part would be missing without an error.
    assert {part for part, text in listed_parts().items() if text == "?"} == guarded


def test_each_file_of_a_choice_has_the_parts_of_the_list():
    listed, unused = listed_parts(), set(listed_parts())
    for folder, module in MODULES.items():
        for path in (PARTS / folder).glob("*.jinja"):
            parts = [f"{module}.{name}" for name in names_set(path) if name != "traces"]
            unknown = set(parts) - listed.keys()
            assert not unknown, f"{path}: the list has no such part"
            in_order = [part for part in listed if part in parts]
            assert parts == in_order, f"{path}: parts in another order"
            for part, optional in listed.items():
                may_lack = optional == "?" or f"`{path.stem}`" in optional
                needed = part.startswith(f"{module}.") and not may_lack
                assert part in parts or not needed, f"{path} lacks {part}"
            unused -= set(parts)
    assert not unused, "no choice has these parts"


def whole_files():
    """Return the files that stand whole, under the name of a choice."""
    folders = [path for path in PARTS.glob("*/*") if path.is_dir()]
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def name_of(path):
    """Return what the table of parts calls a file: for one that stands whole, its output."""
    if path.is_relative_to(OUTPUT):
        return str(path.relative_to(OUTPUT))
    parts = path.relative_to(PARTS).parts
    return str(Path(*parts[2:] if len(parts) > 2 else parts))


def names_set(path):
    """Return the names that a template exports, in the order of its lines."""
    body = list(ENVIRONMENT.parse(path.read_text("utf-8")).body)
    found = []
    while body:
        node = body.pop(0)
        if isinstance(node, nodes.If):
            body = node.body + body
        elif isinstance(node, nodes.Macro):
            found.append(node.name)
        elif isinstance(node, nodes.Assign | nodes.AssignBlock):
            found += [name.name for name in getattr(node.target, "items", [node.target])]
    return found


def test_each_path_that_is_dropped_is_one_of_the_template():
    dropped = set(itertools.chain(*(render(".dropped", **each).split() for each in COMBINATIONS)))
    known = template_paths() | set(itertools.chain(*(path.parents for path in template_paths())))
    assert set(map(Path, dropped)) <= known


def test_a_whole_file_is_included_by_the_file_of_its_name():
    """So that an editor and `make lint` see plain Python, and an output's tree has plain names."""
    for path in output_files():
        if found := re.fullmatch(WHOLE, path.read_text("utf-8")):
            assert found[1] == str(path.relative_to(OUTPUT))
            assert path in {OUTPUT / name_of(whole) for whole in whole_files()}
    for whole in whole_files():
        assert re.fullmatch(WHOLE, (OUTPUT / name_of(whole)).read_text("utf-8")), whole


def test_whole_python_files_are_formatted_before_a_bake():
    Project(TEMPLATE).call("make", "--silent", "lint", "CHECK=1")


def output_files():
    """Yield the files of the output that are rendered."""
    for path in OUTPUT.rglob("*"):
        file = str(path.relative_to(OUTPUT))
        copied = any(fnmatch(file, pattern) for pattern in CONTEXT["_copy_without_render"])
        if path.is_file() and not copied:
            yield path


@pytest.mark.promise("Only what you chose")
def test_a_choice_is_named_only_in_its_files_and_in_conditions():
    """A condition compares an answer to names of its choices; an include may be named by one."""
    for path in [TEMPLATE / "cookiecutter.json", *output_files(), *whole_files()]:
        file, text = str(path.relative_to(TEMPLATE)), path.read_text("utf-8")
        if not re.fullmatch(WHOLE, text):
            tree = ENVIRONMENT.parse(text)
            comparisons = list(conditions(tree))
            allowed = [*comparisons, *tree.find_all(nodes.Include)]
            allowed = [each.find_all((nodes.Getattr, nodes.Const)) for each in allowed]
            allowed = {id(node) for node in itertools.chain(*allowed)}
            for answer in filter(is_answer, tree.find_all(nodes.Getattr)):
                known = answer.attr not in CHOICES or id(answer) in allowed
                assert known, f"{file} prints cookiecutter.{answer.attr}: ask for a part"
            for word in tree.find_all(nodes.Const):
                known = word.value not in NAMES or id(word) in allowed
                assert known, f"{file}: {word.value!r} is the name of a choice"
            for each in comparisons:
                [answer] = filter(is_answer, each.find_all(nodes.Getattr))
                words = {word.value for word in each.find_all(nodes.Const)}
                unknown = words - set(CHOICES[answer.attr])
                assert not unknown, f"{file}: cookiecutter.{answer.attr} is never {unknown}"


def conditions(tree):
    """Yield the comparisons in conditions of a template that have an answer."""
    for node in tree.find_all((nodes.If, nodes.CondExpr)):
        tests = [node.test] if isinstance(node.test, nodes.Compare) else []
        for each in [*tests, *node.test.find_all(nodes.Compare)]:
            if any(a.attr in CHOICES for a in filter(is_answer, each.find_all(nodes.Getattr))):
                yield each


NAMES = {choice for choices in CHOICES.values() for choice in choices}
NAMES |= {path.stem for path in (PARTS / "servers").iterdir()}


def is_answer(node):
    return isinstance(node.node, nodes.Name) and node.node.name == "cookiecutter"


def test_flowers_port_is_written_in_one_place():
    files = [*PARTS.rglob("*.jinja"), *output_files()]
    found = {path.name for path in files if "5555" in path.read_text("utf-8")}
    assert found == {"chosen.jinja"}
