"""The template's own pages, and the versions of the libraries."""

import itertools
import json
import re
import runpy
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from harness import results, services
from harness.bake import CHOICES, LIBRARY, OPTIONS, OUTPUT, STEADY, TEMPLATE
from harness.checks import check_links
from harness.project import Project
from harness.promises import pages, proofs


def text(path):
    """Return the text of a page; of one that stands whole for each variant, all texts."""
    if not is_page(path):
        return ""
    file = TEMPLATE / path
    variants = []
    if file.is_relative_to(OUTPUT):
        variants = TEMPLATE.glob(f"templates/durable_jobs/*/{file.relative_to(OUTPUT)}")
    return "\n\n".join(each.read_text("utf-8") for each in (file, *variants))


def is_page(path):
    return path.suffix == ".md"


def is_output(path):
    """Whether this is a page of an output, whose links test_bake.py checks."""
    return "{" in str(path) or (path.parts[0] == "templates" and len(path.parts) > 2)


def test_every_link_leads_somewhere():
    listed = Project(TEMPLATE).tracked()
    paths = [Path(name) for name in listed if (TEMPLATE / name).is_file()]
    files = {path: text(path) for path in paths}
    pages = [path for path in files if is_page(path) and not is_output(path)]
    assert Path("README.md") in pages and Path("docs/reliability.md") in pages
    check_links(pages, files)


def test_one_spelling_of_cancelled_as_of_the_state():
    """Python's: cancelled, cancelling, cancellation."""
    command = ["git", "grep", "--untracked", "-inE", "[c]ancel(ed|ing|ation)"]
    found = subprocess.run(command, cwd=TEMPLATE, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")


def test_the_page_of_the_options_names_each_option_and_each_value():
    page = (TEMPLATE / "docs/options.md").read_text("utf-8")
    names = Counter([*OPTIONS, *itertools.chain(*CHOICES.values())])  # two options have `yes`
    assert [name for name in names if page.count(f"`{name}`") < names[name]] == []


@pytest.mark.parametrize("library", [STEADY, LIBRARY], ids=lambda folder: folder.name)
def test_a_library_has_the_newest_version_of_its_changelog(library):
    """While that is unreleased, with .dev."""
    [code] = library.glob("src/*/__init__.py")
    newest, state = re.search(
        r"^## (\S+) \((\S+)\)$", (library / "CHANGELOG.md").read_text("utf-8"), re.M
    ).groups()
    expected = f"{newest}.dev" if state == "unreleased" else newest
    assert f'__version__ = "{expected}"' in code.read_text("utf-8")


def test_each_promise_of_a_readme_has_a_test_that_a_table_names():
    """If a table is old: PYTHONPATH=tests .venv/bin/python -m harness.promises"""
    for page, promises in proofs().items():
        assert promises and all(promises.values())  # a mark with other words is a KeyError
        assert pages()[page] == page.read_text("utf-8")


def test_the_quick_start_of_durable_jobs_installs_all_that_it_needs(tmp_path):
    page = (LIBRARY / "README.md").read_text("utf-8")
    packages = re.search("^pip install (.+)", page, re.M)[1].replace("CLONE", str(TEMPLATE))
    install = ["uv", "pip", "install", "--dry-run", "--target", "."]
    Project(tmp_path).run(*install, *shlex.split(packages))


def test_pages_quote_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(LIBRARY / "bench")
    paths = STEADY / "bench/scorecard.py", STEADY / "bench/speed.py", LIBRARY / "bench/run.py"
    scorecard, speed, bench = map(runpy.run_path, map(str, paths))
    written = {  # {page: its text, from a text and rows}
        STEADY / "docs/scorecard.md": lambda _, rows: page_of(scorecard, rows),
        STEADY / "docs/speed.md": lambda _, rows: page_of(speed, rows),
        bench["PAGE"]: bench["quoted"],
        services.PAGE: services.quoted,
    }
    for page, write in written.items():
        text, stored = page.read_text("utf-8"), page.with_suffix(".json").read_text("utf-8")
        assert write(text, json.loads(stored)) == text


def page_of(module, rows):
    return results.page(module["PAGE"], rows, module["COLUMNS"])
