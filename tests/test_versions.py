"""Each version stands in one place, or a test names the one that differs; Renovate reads all."""

import itertools
import json
import re
import tomllib

import pytest
import yaml

from harness.bake import ABOUT, ABOUT_LIBRARY, CHOICES, PINNED, TEMPLATE, render
from harness.libraries import SUPPORTED
from harness.project import Project

VERSIONS, REQUIREMENTS = "templates/versions.jinja", "{{cookiecutter.project_slug}}/pyproject.toml"
# Of the tests, of the libraries
OWN = {"pyproject.toml", "celery-steady/pyproject.toml", "durable-jobs/pyproject.toml"}
WORKFLOW, PUBLISH = ".github/workflows/ci.yml", ".github/workflows/publish.yml"
NAMED = {name: value for name, value in vars(PINNED).items() if isinstance(value, str)}
TEXTS = dict.fromkeys(("description", "author_name", "author_email"), "")
IMAGES = {value for value in NAMED.values() if re.search(":v?[0-9]", value)}
ACTIONS = {value for value in NAMED.values() if "@" in value}
FRAMEWORKS = ("celery", "django", "djangorestframework", "drf-spectacular")  # with every choice
# What was, and what was measured.
HISTORY = {
    "CHANGELOG.md",
    "celery-steady/docs/scorecard.md",
    "celery-steady/docs/speed.md",
    "docs/decisions.md",
    "docs/reliability.md",
    "durable-jobs/docs/decisions.md",
    "durable-jobs/docs/performance.md",
}
# Sentences that stay true with other versions, and so may have a number.
FACTS = [
    "| batched task events | Celery 5.7 |",  # durable-jobs/src/durable_jobs/versions.py
    "| Celery 5.7 | broker | lost |",  # durable-jobs/docs/alternatives.md: what was compared
    "`task_retry_on_worker_lost` of Celery 5.7",
    "as long as the project supports Django 5.2",
    "Celery 5.7 deprecates `queue`",
    "delivers the tasks of a killed worker again (kombu 5.7)",
    "Caddy 2.7 or newer",
    '"`django~=6.',
    "RabbitMQ 4 accepts 16 MiB",
    "RabbitMQ 4.3 refuses",  # and later ones
]
# A package that the template's tests need in a version other than outputs, and why.
DIFFER = {
    "pytest": "with 9.2, xdist 3.8 ignores its groups",
    "ruff": "a newer formatter would fail the template's CI; an output has uv.lock",
}


def tracked():
    """Return the texts of the repository, {path: text}."""
    files = {name: TEMPLATE / name for name in Project(TEMPLATE).tracked()}
    texts = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    return {name: text.decode() for name, text in texts.items() if b"\0" not in text}


TRACKED = tracked()


def package(requirement):
    return re.match("[a-z0-9-]+", requirement)[0]


def requirements():
    """Return what outputs require, with every choice, {package: requirement without extras}."""
    found = {}
    for option, choices in CHOICES.items():
        for choice in choices:
            about = tomllib.loads(render("pyproject.toml", **{**TEXTS, option: choice}))
            groups = {
                **about["dependency-groups"],
                **about["project"].get("optional-dependencies", {}),
            }
            for each in itertools.chain(about["project"]["dependencies"], *groups.values()):
                without_extras = re.sub(r"\[.*]", "", each)
                assert found.setdefault(package(each), without_extras) == without_extras
    return found


def without_facts(text):
    for fact in FACTS:
        text = text.replace(fact, "")
    return text


ALWAYS = {name: each for name, each in requirements().items() if name in FRAMEWORKS}


def homes():
    """Return where each version stands, {pattern of a version: file}."""
    python = r"\bpython(-version)?:[ \"]*3\.\d"
    images = {rf"(?<![\w/.-]){value.split(':')[0]}:v?\d{{1,3}}(?!\d)" for value in IMAGES}
    actions = {rf"{value.split('@')[0]}@[0-9a-f]" for value in ACTIONS}
    frameworks = {rf"(?<![\w-]){name}(\[.*?])?[~<>=]=\d" for name in FRAMEWORKS}
    home = dict.fromkeys({*images, *actions, python}, VERSIONS)
    return home | dict.fromkeys(frameworks, REQUIREMENTS)


def test_each_version_stands_in_one_file():
    """The workflows, which no template can write, have some too: the next test compares them."""
    for pattern, home in homes().items():
        files = {name for name, text in TRACKED.items() if re.search(pattern, without_facts(text))}
        also = OWN if home == REQUIREMENTS else set()
        assert files - {home, WORKFLOW, PUBLISH} - also - HISTORY == set(), pattern


def test_the_templates_own_workflows_have_the_versions_of_an_output():
    ci, publish = (yaml.safe_load(TRACKED[file])["jobs"] for file in (WORKFLOW, PUBLISH))
    jobs = [*ci.values(), *publish.values()]
    assert {job["runs-on"] for job in jobs} == {PINNED.runner, "macos-latest"}
    used = set(re.findall("uses: (.+)", TRACKED[WORKFLOW] + TRACKED[PUBLISH]))
    publishing = {each for each in used if re.search("-artifact@|pypi-publish@", each)}
    assert used - publishing == {PINNED.checkout, PINNED.setup_python}

    steps = itertools.chain(*(job["steps"] for job in jobs))
    pythons = {step["with"]["python-version"] for step in steps if "setup-python" in str(step)}
    assert pythons == {PINNED.python, "${{ matrix.python }}"}
    [matrix] = [job["strategy"]["matrix"] for job in jobs if "matrix.python" in str(job)]
    assert matrix["python"][0] == PINNED.oldest_python
    assert matrix["python"][-1] == PINNED.python


def test_the_tests_have_the_packages_of_an_output():
    outputs = requirements()
    group = sum((ABOUT["dependency-groups"][name] for name in ("demo", "test")), [])
    tests = {package(each): re.sub(r"\[.*]", "", each) for each in group if isinstance(each, str)}
    differ = {name for name in tests.keys() & outputs.keys() if tests[name] != outputs[name]}
    assert differ == DIFFER.keys()


def test_the_oldest_python_is_the_same_everywhere():
    oldest = PINNED.oldest_python
    assert ABOUT_LIBRARY["project"]["requires-python"] == f">={oldest}"
    for about in ABOUT, ABOUT_LIBRARY:
        assert about["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    pages = {name: text for name, text in TRACKED.items() if name.endswith(".md")}
    named = {
        (name, version)
        for name, text in pages.items()
        for version in re.findall(r"Python (3\.\d+) or newer", text)
    }
    assert {version for _, version in named} == {oldest}, named
    assert len(named) >= 3


def test_celery_steady_requires_no_version_in_which_it_would_be_off():
    major, minor = map(int, SUPPORTED["celery"][-1].split("."))
    about = tomllib.loads(TRACKED["celery-steady/pyproject.toml"])["project"]
    limit = f",<{major}.{minor + 1}"
    limited = {package(each) for each in about["dependencies"] if each.endswith(limit)}
    assert limited == {"celery", "kombu"}


def test_no_page_names_a_version_that_a_bump_would_make_untrue():
    pages = {name: text for name, text in TRACKED.items() if name.endswith((".md", ".jinja"))}
    for name in pages.keys() - HISTORY:
        text = without_facts(pages[name])
        for product, version in pinned().items():
            found = re.search(rf"\b{product}\w* {version}\b", text, re.IGNORECASE)
            assert not found, f"{name}: {found}"


def pinned():
    """Return {product: version}, such as "postgres": "18" and "django": "5.2"."""
    images = (re.search(r"([\w-]+):v?(\d+(\.\d+)?)", image) for image in IMAGES)
    packages = (re.search(r"([\w-]+).=(\d+(\.\d+)?)", each) for each in ALWAYS.values())
    return {found[1]: found[2] for found in (*images, *packages)} | {"python": PINNED.python}


def test_both_readmes_name_the_versions_that_are_supported():
    django, celery, python = (f"{each[0]} to {each[-1]}" for each in SUPPORTED.values())
    new = f"| new projects | {python} | {pinned()['django']} | {pinned()['celery']} |"
    row = f"| {python} | {django} | {celery} |"
    assert new in TRACKED["README.md"] and f"| durable-jobs {row}" in TRACKED["README.md"]
    assert row in TRACKED["durable-jobs/README.md"]


def found_by_renovate():
    """Yield (file, name, version) of what its own managers find with our patterns."""
    for manager in json.loads(TRACKED[".github/renovate.json"])["customManagers"]:
        files = "|".join(pattern.strip("/") for pattern in manager["managerFilePatterns"])
        [pattern] = manager["matchStrings"]
        for file in TRACKED:
            if re.search(files, file):
                for match in re.finditer(pattern.replace("(?<", "(?P<"), TRACKED[file]):
                    yield file, match["depName"], match["currentValue"]


def test_renovate_reads_every_version_of_an_output():
    found = {}
    for file, name, version in found_by_renovate():
        found.setdefault(file, {})[name] = version
    actions = {re.sub("@.+# ", ":", action) for action in ACTIONS}
    assert {f"{name}:{version}" for name, version in found.pop(VERSIONS).items()} == (
        IMAGES | actions | {f"python:{PINNED.python}", PINNED.runner.replace("-", ":")}
    )
    assert "procrastinate" in found.pop("durable-jobs/bench/stack.py")
    packages = {f"{name}{version}" for names in found.values() for name, version in names.items()}
    assert packages == set(requirements().values()) - {"celery-steady", "durable-jobs"}


@pytest.mark.parametrize("own", [True, False], ids=["template", "output"])
def test_renovate_takes_the_releases_of_django_with_three_years_of_support(own):
    """Those of Django's DEP 20: after 6.2 comes 2028.0, and each year another one."""
    rules = json.loads(TRACKED[".github/renovate.json"] if own else render("renovate.json"))
    [rule] = [rule for rule in rules["packageRules"] if rule["matchPackageNames"] == ["django"]]
    versions = "5.2.19", "6.0.8", "6.1.1", "6.2", "7.2.0", "2028.0", "2031.14"
    allowed = [each for each in versions if re.search(rule["allowedVersions"].strip("/"), each)]
    assert allowed == ["5.2.19", "6.2", "2028.0", "2031.14"]


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_containers_have_no_other_images(bake, broker):
    project = bake(broker=broker, deployment="docker")
    text = "".join(project.read(file.name) for file in project.glob("compose*.yaml"))
    text += project.read("Dockerfile")
    found = re.findall(r"^ *(?:image: |FROM |COPY --from=)(\S+)", text, re.MULTILINE)
    own = {project.name, "build", f"python:{PINNED.python}-slim"}
    assert set(found) - own <= IMAGES
    assert len(found) > 8
