"""`make release` in a repository of its own: what it writes, and when it refuses."""

import os
import re
import shutil
import sys
from datetime import date

import pytest

from harness.bake import ADDRESS, TEMPLATE
from harness.project import Project

VENDOR = "{{cookiecutter.project_slug}}/vendor"
# What is unreleased, by what the tags begin with: the second library has nothing new.
FOLDERS = {"v": ".", "celery-steady-": "celery-steady", "durable-jobs-": "durable-jobs"}
CHANGELOG = "# Changelog\n\n## 1.2.3 (unreleased)\n\n- New.\n\n## 1.2.2 (2026-11-01)\n\n- Old.\n"
OLD = CHANGELOG.replace("## 1.2.3 (unreleased)\n\n- New.\n\n", "")
STEADY, JOBS = (
    f"{name}/src/{name.replace('-', '_')}/__init__.py" for name in ("celery-steady", "durable-jobs")
)
# Writes which version it had, and whether a missing server would fail the tests.
MAKEFILE = f"""VERSION := $$(grep -o '[0-9][^"]*' '{STEADY}')
test prove dist:
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
    for code, version in (STEADY, "1.2.3.dev"), (JOBS, "1.2.2"):
        (clone / code).parent.mkdir(parents=True)
        (clone / code).write_text(f'__version__ = "{version}"\n')
    (clone / VENDOR).mkdir(parents=True)
    (clone / VENDOR / "1.2.3.dev.whl").touch()
    (clone / "CHANGELOG.md").write_text(CHANGELOG)
    (clone / "celery-steady/CHANGELOG.md").write_text(CHANGELOG)
    (clone / "durable-jobs/CHANGELOG.md").write_text(OLD)
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


def test_a_release_is_a_tested_commit_with_a_tag_for_each_unreleased_product(clone):
    printed = release(clone)

    made = (clone.parent / "made").read_text().splitlines()
    assert made == ["test 1 1.2.3", "prove 1 1.2.3", "dist 1 1.2.3"]
    tags = ["celery-steady-1.2.3", "v1.2.3"]
    assert clone.call("git", "tag").split() == tags
    assert clone.call("git", "rev-parse", *(f"{tag}^{{}}" for tag in tags)).split() == 2 * [
        clone.call("git", "rev-parse", "HEAD").strip()
    ]
    assert [clone.read(code) for code in (STEADY, JOBS)] == [
        '__version__ = "1.2.3"\n',
        '__version__ = "1.2.2"\n',
    ]
    assert [path.name for path in (clone / VENDOR).iterdir()] == ["1.2.3.whl"]
    released = CHANGELOG.replace("unreleased", str(date.today()))
    pages = [clone.read(f"{folder}/CHANGELOG.md") for folder in FOLDERS.values()]
    assert pages == [released, released, OLD]
    assert clone.call("git", "status", "--porcelain") == ""

    published = clone.parent / "published.git"
    clone.call("git", "init", "--quiet", "--bare", str(published))
    [push] = re.findall("^ +(git push .+)", printed, re.MULTILINE)
    rewrite = {"KEY_0": f"url.{published}.insteadOf", "VALUE_0": "git@github.com:tea/shop.git"}
    environment = {f"GIT_CONFIG_{name}": value for name, value in rewrite.items()}
    clone.call(*push.split(), GIT_CONFIG_COUNT="1", **environment)
    assert clone.call("git", "-C", str(published), "tag").split() == tags


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
    ("files", "text", "sentence"),
    [
        ([STEADY], '__version__ = "1.2.4.dev"\n', f"The version in {STEADY} must be 1.2.3.dev"),
        (["CHANGELOG.md", "celery-steady/CHANGELOG.md"], OLD, "No changelog has a heading"),
        (["CHANGELOG.md"], CHANGELOG.replace("- New.\n\n", ""), "CHANGELOG.md says nothing about"),
    ],
)
def test_a_release_is_refused_if_there_is_nothing_to_release(clone, files, text, sentence):
    for file in files:
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
