"""Every combination of answers bakes to a small, clean project."""

import ast
import hashlib
import itertools
import re
import runpy
from collections import defaultdict
from fnmatch import fnmatch
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from cookiecutter.utils import work_in
from jinja2 import nodes

from harness.bake import (
    CHOICES,
    COMBINATIONS,
    CONTEXT,
    ENVIRONMENT,
    OUTPUT,
    TEMPLATE,
    chosen,
    engine,
    name,
)
from harness.checks import (
    NEW_FILES,
    check_celery,
    check_dependencies,
    check_file,
    check_names,
    check_pages,
)
from harness.reader import check_code
from harness.servers import sentinel_settings

ENGINE = engine()
# One folder for each option that has a file per choice, and one more: `servers`.
PARTS = TEMPLATE / "templates"
# Patterns of words that may appear only where a choice was made, for options without such a folder.
# Other choices list theirs in their own file and in their server's.
TRACES = {
    ("ci", "github"): ["github", r"\bCI\b", "dependabot"],
    ("ci", "gitlab"): ["gitlab", r"\bCI\b", "renovate"],
    ("include_example", "yes"): ["orders", "newsletter", "httpx"],
}
NOTHING = ("none", "no")  # choices that leave no trace


def own_traces(option, choice):
    """Return the patterns of a choice, from its file or from TRACES."""
    if not (PARTS / option).exists():
        return TRACES.get((option, choice), [])
    return getattr(getattr(chosen(**{option: choice}), option), "traces", [])


def server_traces(option, choice):
    module = chosen(**{option: choice})
    name = getattr(getattr(module, option, None), "server", "")
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
    return {word for word in owners() if re.search(word, f"{file}\n{text}", re.IGNORECASE)}


def read(project):
    return {file.relative_to(project): file.read_text("utf-8") for file in project.files()}


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
    """Start no process for a hook, which saves two for each bake; test_options.py starts them."""

    def run_script(script, cwd="."):
        with work_in(cwd):
            runpy.run_path(script, run_name="__main__")

    monkeypatch.setattr("cookiecutter.hooks.run_script", run_script)


@pytest.mark.usefixtures("hooks_in_this_process")
@pytest.mark.parametrize("answers", COMBINATIONS, ids=name)
def test_every_combination_is_clean(bake, answers, is_new, record_property):
    project = bake(**answers)
    texts = read(project)
    python = [part for file in texts.items() if file[0].suffix == ".py" for part in file]
    about = texts[Path("pyproject.toml")]
    del texts[Path(".env")]  # .env.example with secrets

    if is_new("names", *texts):
        check_names(texts)
    # More than the default has: manifests, a migration that makes a periodic task, and a policy.
    more = 5 * (answers["deployment"] == "kubernetes") + (answers["periodic_tasks"] == "admin")
    more += answers["broker"] == "rabbitmq"
    jobs = {file: text for file, text in texts.items() if file.parts[0] == "jobs"}
    pages = {file for file in texts if file.parts[0] == "docs"}
    assert len(texts) - len(jobs) - len(pages) <= 42 + more, (
        "too many files outside of jobs/ and docs/"
    )
    assert len(texts[Path("README.md")].split()) <= 1600, "details belong into docs/"
    assert jobs == ENGINE, "each output has the same engine, byte for byte"
    empty = [path for path in project.rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert empty == []
    for file, text in texts.items():
        for word in traces_in(file, text) if file not in ENGINE else ():
            assert owners()[word] & answers.items(), f"{file} has {word}"
    checked = 0
    for file, text in texts.items():
        if is_new("file", file, text):
            check_file(project, file, text)
            if file.suffix == ".md":
                check_code(str(file), text)
            checked += 1
    record_property(NEW_FILES, checked)
    asked = re.findall(r'env\.\w+\("([A-Z_]+)"\)', texts[Path("config/settings.py")])
    assert asked and ast.literal_eval(
        re.search(r"^REQUIRED = (\[.*?\])", texts[Path("config/settings.py")], re.S | re.M)[1]
    ) == sorted(asked, key=asked.index), "REQUIRED lists every required variable"
    celery = texts[Path("config/settings.py")], texts[Path(".env.example")]
    if is_new("celery", *celery):
        check_celery(*celery)
    check_dependencies(texts)
    check_pages(texts, template_paths())
    if is_new("ruff", about, *python):
        project.call("ruff", "check", "--no-cache")
        project.call("ruff", "format", "--check", "--no-cache")


def test_the_engine_is_plain_python():
    """So an editor, a linter and the tests in tests/engine/ can read it without a bake."""
    for file, text in ENGINE.items():
        if file.suffix == ".py":
            assert "{%" not in text and "{{" not in text, file


def test_there_are_no_circular_imports(bake):
    """Not even inside functions."""
    project = bake()
    modules = {
        ".".join(file.relative_to(project).with_suffix("").parts): ast.parse(file.read_text())
        for file in project.rglob("*.py")
        if "migrations" not in file.parts
    }
    graph = {name: imports(name, tree) & modules.keys() for name, tree in modules.items()}
    assert {"jobs.models", "jobs.pools"} <= graph["jobs.tasks"]  # so imports are found
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle
    for module, tree in modules.items():
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        late = {function.name for function in functions if imports(module, function)}
        if module.startswith("jobs."):  # ready() is where Django wants imports of models
            assert late <= {"ready"}, module


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
    with open(project / "config/settings.py", "a") as file:
        file.write(sentinel_settings(project.read("docs/sentinel.md")))
    project.call("ruff", "check", "--no-cache")
    project.call("ruff", "format", "--check", "--no-cache")


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_flower_listens_only_on_the_loopback_address(bake, broker):
    """Its /metrics and /healthcheck need no password."""
    texts = read(bake(broker=broker, deployment="kubernetes"))
    services = yaml.safe_load(texts[Path("compose.yaml")])["services"]
    for service, options in services.items():
        for port in options.get("ports", []):
            assert port.startswith("127.0.0.1:"), service
    pods = list(yaml.safe_load_all(texts[Path("deploy/kubernetes/base/app.yaml")]))
    assert [each["metadata"]["name"] for each in pods if each["kind"] == "Service"] == ["web"]
    [has_flower] = {"flower" in services, "\nflower:" in texts[Path("Procfile")]}
    said = "Keep the port closed" in texts[Path("docs/security.md")]
    assert has_flower == said == chosen(broker=broker).broker.flower
    assert has_flower == (Path("flowerconfig.py") in texts)
    if has_flower:
        assert 'or "127.0.0.1"' in texts[Path("flowerconfig.py")]
        assert re.search("^flower: celery -A config flower$", texts[Path("Procfile")], re.M)
        [pod] = [each for each in pods if each["metadata"]["name"] == "flower"]
        [container] = pod["spec"]["template"]["spec"]["containers"]
        assert "--address=127.0.0.1" in container["command"][-1]
        assert "ports" not in container


@cache
def template_paths():
    """Return the paths that an output may have."""
    files = (path.relative_to(OUTPUT) for path in OUTPUT.rglob("*") if path.is_file())
    return {Path(rendered(file)) for file in files}


def rendered(path):
    """Return the path, or the name, that a file of the template has in an output."""
    return re.sub("{%.*?%}", "", str(path))


@pytest.mark.parametrize(
    ("option", "choice"), [(option, choice) for option in CHOICES for choice in CHOICES[option]]
)
def test_the_output_of_a_choice_has_the_words_listed_as_its_traces(bake, option, choice):
    """Otherwise test_every_combination_is_clean() would search for words that do not exist."""
    own = own_traces(option, choice)
    assert own or choice in NOTHING, "no traces are listed: see TRACES"

    found = set()
    for file, text in read(bake(**{option: choice})).items():
        found |= traces_in(file, text)
    assert not {*own, *server_traces(option, choice)} - found, "the output lacks these words"


def test_every_part_of_a_choice_is_printed_where_its_comment_says():
    """A part is a block or macro of a choice. The comment above it names the files that print it.

    A choice may leave out parts, so no other test finds a misspelled name.
    """
    printed = defaultdict(set)  # {(option, part): names of the files that print it}
    for path in [*PARTS.rglob("*.jinja"), *output_files()]:
        for node in ENVIRONMENT.parse(path.read_text("utf-8")).find_all(nodes.Getattr):
            if isinstance(node.node, nodes.Name):
                printed[node.node.name, node.attr].add(rendered(path.name))
    options = {folder.name: folder.name for folder in PARTS.iterdir() if folder.is_dir()}
    options["servers"] = "server"  # chosen.jinja calls each of them so
    written, follows = set(), set()
    for path in PARTS.glob("*/*.jinja"):
        option, text, places = options[path.parent.name], path.read_text("utf-8"), []
        for node in ENVIRONMENT.parse(text).body:
            if not isinstance(node, nodes.Assign | nodes.AssignBlock):
                continue
            part = node.target.name
            written.add((option, part))
            comment = re.search(rf"{{# (.+) #}}\n{{% (?:set|macro) {part}\b", text)
            assert comment, f"{path.name}: {part} has no comment on the line above it"
            if isinstance(node, nodes.AssignBlock):
                for file in printed[option, part] - {"chosen.jinja"}:  # it looks, and prints none
                    assert file in comment[1], f"{path.name}: {file} prints {part}"
                places.append(re.match("[^,:]+", comment[1])[0])
        follows |= {pair for pair in itertools.combinations(places, 2) if len(set(pair)) == 2}
    traces = {(option, "traces") for option in options.values()}
    asked = {key for key in printed if key[0] in options.values()}
    assert written - traces == asked
    assert not {pair for pair in follows if pair[::-1] in follows}, "parts are in another order"


def output_files():
    """Yield the files of the output that are rendered."""
    for path in OUTPUT.rglob("*"):
        file = str(path.relative_to(OUTPUT))
        copied = any(fnmatch(file, pattern) for pattern in CONTEXT["_copy_without_render"])
        if path.is_file() and not copied:
            yield path


def test_no_broker_or_result_backend_is_named_outside_its_file():
    """So that a new one needs only a choice and a file: see CONTRIBUTING.md."""
    hooks = list((TEMPLATE / "hooks").glob("*.py"))
    for path in [TEMPLATE / "cookiecutter.json", *hooks, *output_files()]:
        file = str(path.relative_to(TEMPLATE))
        assert not names_in_jinja(file), file
        assert not names_in_jinja(path.read_text("utf-8")), file
    for hook in hooks:
        assert not names_in_hook(hook.read_text("utf-8")), hook


NAMES = {
    *("broker", "result_backend", *CHOICES["broker"], *CHOICES["result_backend"]),
    *(path.stem for path in (PARTS / "servers").iterdir()),
}


def names_in_jinja(text):
    """Return the nodes that name a broker or a result backend.

    Another option may be compared with the same word: {% if cookiecutter.ci == "none" %}.
    """
    tree = ENVIRONMENT.parse(text)
    options = {
        node
        for node in tree.find_all(nodes.Getattr)
        if isinstance(node.node, nodes.Name) and node.node.name == "cookiecutter"
    }
    allowed = set()
    for compare in tree.find_all(nodes.Compare):
        if compare.expr in options and compare.expr.attr not in NAMES:
            allowed |= set(map(id, compare.find_all(nodes.Const)))
    found = [node for node in options if node.attr in NAMES]
    found += [
        node
        for node in tree.find_all(nodes.Const)
        if isinstance(node.value, str) and NAMES & set(node.value.split("/"))
    ]
    return [node for node in found if id(node) not in allowed]


def names_in_hook(source):
    """Return the names of brokers and backends in its strings, except those in CHOICES."""
    tree = ast.parse(source)
    allowed = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CHOICES":
            allowed |= set(map(id, ast.walk(node)))
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [node.value for node in strings if node.value in NAMES and id(node) not in allowed]
