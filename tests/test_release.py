"""`make release` in a repository of its own: what it writes, and when it refuses."""

import os
import re
import shutil
import sys
from datetime import date

import pytest

from harness.bake import ADDRESS, TEMPLATE
from harness.project import Project

VERSION = "durable-jobs/src/durable_jobs/__init__.py"
VENDOR = "{{cookiecutter.project_slug}}/vendor"
CHANGELOG = "# Changelog\n\n## Unreleased\n\n- New.\n"
# Writes which version it had, and whether a missing server would fail the tests.
MAKEFILE = f"""VERSION := $$(grep -o '[0-9][^"]*' '{VERSION}')
test prove:
\t@echo $@ $(DEMAND_ALL) $(VERSION) >> ../made
wheel:
\t@rm -f '{VENDOR}'/*.whl; touch "{VENDOR}/$(VERSION).whl"
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The files that a release changes, all pages, and a Makefile that only says what it does."""
    monkeypatch.delenv("DEMAND_ALL", raising=False)  # a release sets it
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for name in ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL"):
        monkeypatch.setenv(f"GIT_{name}", "you@example.com")
    clone = Project(tmp_path / "clone")
    for name in (".ci", "docs"):
        shutil.copytree(TEMPLATE / name, clone / name)
    for folder in [(clone / VERSION).parent, clone / VENDOR]:
        folder.mkdir(parents=True)
    (clone / VERSION).write_text('__version__ = "1.2.3.dev"\n')
    (clone / VENDOR / "1.2.3.dev.whl").touch()
    (clone / ".gitignore").write_text("dist/\n")
    for folder in "", "durable-jobs":
        (clone / folder / "CHANGELOG.md").write_text(CHANGELOG)
    (clone / "Makefile").write_text(MAKEFILE)
    for name in ("README.md", "durable-jobs/pyproject.toml"):
        shutil.copy(TEMPLATE / name, clone / name)
    clone.commit()
    clone.call("git", "remote", "add", "origin", "git@github.com:tea/shop.git")
    return clone


def release(clone):
    return clone.call(sys.executable, ".ci/release.py")


def refused(clone):
    with pytest.raises(AssertionError, match="No release.") as refused:
        release(clone)
    return str(refused.value)


def test_a_release_is_a_tested_commit_with_a_tag_and_a_wheel(clone):
    printed = release(clone)

    assert (clone.parent / "made").read_text().splitlines() == ["test 1 1.2.3", "prove 1 1.2.3"]
    wheels = clone.call("git", "ls-tree", "-r", "--name-only", "v1.2.3", VENDOR)
    assert wheels.split() == [f"{VENDOR}/1.2.3.whl"]
    assert [path.name for path in (clone / "dist").iterdir()] == ["1.2.3.whl"]
    assert clone.call("git", "show", f"v1.2.3:{VERSION}") == '__version__ = "1.2.3"\n'
    assert clone.call("git", "describe", "HEAD~1") == "v1.2.3\n"
    heading = f"## 1.2.3 ({date.today()})"
    released = CHANGELOG.replace("## Unreleased", heading)
    pages = ["CHANGELOG.md", "durable-jobs/CHANGELOG.md"]
    assert [clone.call("git", "show", f"v1.2.3:{page}") for page in pages] == [released] * 2
    assert "git push --atomic origin main v1.2.3" in printed

    assert clone.read(VERSION) == '__version__ = "1.3.0.dev"\n'
    next_one = released.replace(heading, f"## Unreleased\n\n{heading}")
    assert [clone.read(page) for page in pages] == [next_one] * 2
    assert [path.name for path in (clone / VENDOR).iterdir()] == ["1.3.0.dev.whl"]
    assert clone.call("git", "status", "--porcelain") == ""


def test_a_release_has_the_address_of_its_repository_on_every_page(clone):
    old = ADDRESS.removeprefix("https://github.com/")
    release(clone)
    assert 'urls.Repository = "https://github.com/tea/shop"' in clone.read(
        "durable-jobs/pyproject.toml"
    )
    assert "gh:tea/shop" in clone.read("README.md")
    assert "https://github.com/tea/shop" in clone.read("docs/upgrading.md")
    assert not [path for path in clone.files() if old.encode() in path.read_bytes()]


def test_every_page_has_the_same_address():
    owner_and_name = ADDRESS.removeprefix("https://github.com/")
    pages = [TEMPLATE / "README.md", *(TEMPLATE / "docs").glob("*.md")]
    text = "".join(page.read_text("utf-8") for page in pages)
    named = re.findall(r"gh:([\w.-]+/[\w.-]+)", text)
    cloned = re.findall(r"(?:git clone|cruft \w+) https://github\.com/([\w.-]+/[\w.-]+)", text)
    assert named and cloned
    assert {*named, *cloned} == {owner_and_name}


def test_a_release_that_fails_its_tests_changes_nothing(clone):
    (clone / "Makefile").write_text(MAKEFILE.replace("@echo", "false"))
    clone.commit()
    before = clone.call("git", "rev-parse", "HEAD")

    assert "the tests did not pass" in refused(clone)
    assert clone.call("git", "rev-parse", "HEAD") == before
    assert clone.call("git", "status", "--porcelain") == clone.call("git", "tag") == ""


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        (VERSION, '__version__ = "1.2.3"\n', "is 1.2.3, but only one with .dev"),
        ("CHANGELOG.md", "# Changelog\n\n## 1.2.2 (2026-11-01)\n\n- Old.\n", "says nothing under"),
        ("CHANGELOG.md", "## Unreleased\n\n## 1.2.2\n\n- Old.\n", "says nothing under"),
    ],
)
def test_a_release_is_refused_if_there_is_nothing_to_release(clone, file, text, sentence):
    (clone / file).write_text(text)
    clone.commit()
    assert sentence in refused(clone)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["touch", "new.py"], "There are changes without a commit"),
        (["git", "tag", "v1.2.3"], "The tag v1.2.3 exists"),
        (["git", "remote", "remove", "origin"], "`origin` isn't a repository on GitHub"),
    ],
)
def test_a_release_is_refused_in_this_state(clone, command, sentence):
    clone.call(*command)
    assert sentence in refused(clone)
    assert not (clone.parent / "made").exists()
