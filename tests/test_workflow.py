"""The files in .github/ are valid; the workflows have few permissions, and CI runs every test."""

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml

from harness.bake import CHOICES, TEMPLATE, baked
from harness.blocks import code
from harness.project import Project

WORKFLOW, PUBLISH = ".github/workflows/ci.yml", ".github/workflows/publish.yml"
FORM = ".github/ISSUE_TEMPLATE/bug.yml"
ABOUT = yaml.safe_load((TEMPLATE / WORKFLOW).read_text())
JOBS = ABOUT["jobs"]
ENDS = ".tar.gz", "-py3-none-any.whl"


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("check-jsonschema --builtin-schema vendor.github-workflows", WORKFLOW),
        ("check-jsonschema --builtin-schema vendor.github-workflows", PUBLISH),
        ("zizmor --offline --persona pedantic", WORKFLOW),
        ("zizmor --offline --persona pedantic", PUBLISH),
        ("check-jsonschema --builtin-schema vendor.github-issue-forms", FORM),
        ("check-jsonschema --builtin-schema vendor.renovate", ".github/renovate.json"),
    ],
)
def test_the_files_of_github_are_valid(command, file):
    Project(TEMPLATE).call(*command.split(), file)


def test_each_yaml_file_of_the_template_itself_is_checked():
    """Here, or by promtool: see integration/features/test_alerts.py."""
    listed = Project(TEMPLATE).call("git", "ls-files", ":!*cookiecutter*", "*.yml", "*.yaml")
    assert {WORKFLOW, PUBLISH, FORM} == {
        file for file in listed.split() if not is_for_promtool(file)
    }


def is_for_promtool(file):
    return "rule_files:" in (TEMPLATE / file).read_text()


def last_step(job):
    return job["steps"][-1]["run"]


def collect(*options):
    """Return the slow tests that pytest selects with these options."""
    options = "tests/integration", "--collect-only", "--quiet", *options
    return re.findall("^tests/integration/.+", Project(TEMPLATE).run("pytest", *options), re.M)


def test_make_prove_in_its_jobs_runs_each_test_once():
    collected = collect()
    each = [test for broker in CHOICES["broker"] for test in collect("-m", broker)]
    assert sorted(each) == sorted(collected)

    prove = JOBS["prove"]["strategy"]["matrix"]["folder"]
    for broker in CHOICES["broker"]:  # pytest fails if it finds none
        assert {test.split("/")[2] for test in collect("-m", broker)} >= {*prove}
    others = [last_step(JOBS[name]).split("integration/")[1] for name in ("pythons", "versions")]
    assert sorted([*prove, *others]) == sorted({test.split("/")[2] for test in collected})


def test_a_push_runs_the_quick_tests_and_each_night_runs_all():
    events = ABOUT[True]  # YAML 1.1 reads the key `on` as True
    assert events.keys() == {"push", "pull_request", "schedule", "workflow_dispatch"}
    [night] = events["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", night["cron"])
    expected = {"test": None, "output": "github.event_name == 'push'"}
    expected["diff"] = "github.event_name == 'pull_request'"
    expected["newest"] = "github.event_name == 'schedule'"
    for name, job in JOBS.items():
        assert job.get("if") == expected.get(name, "github.event_name != 'push'"), name
        proves = "make prove" in last_step(job)
        assert proves == (name not in [*expected, "choices", "macos"]), name
        brokers = job.get("strategy", {}).get("matrix", {}).get("broker", "")
        assert not brokers or job["needs"] == "choices" in brokers.split("."), name


def test_the_jobs_of_brokers_read_them_from_cookiecutter_json(tmp_path):
    [step] = [step for step in JOBS["choices"]["steps"] if step.get("id") == "read"]
    Project(TEMPLATE).call("bash", "-e", "-c", step["run"], GITHUB_OUTPUT=str(tmp_path / "output"))
    name, _, value = (tmp_path / "output").read_text().partition("=")
    assert (name, json.loads(value)) == ("brokers", CHOICES["broker"])


GH = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$1 $2" in "issue list") cat "$OPEN" ;; esac
"""


def test_a_night_with_newer_versions_opens_one_issue(tmp_path):
    """It excludes no newer version. Another failure changes the text of the issue."""
    *_, relax, _, report = JOBS["newest"]["steps"]
    files = ["celery-steady/pyproject.toml", "durable-jobs/pyproject.toml"]
    files += ["{{cookiecutter.project_slug}}/pyproject.toml", "pyproject.toml"]
    files += [str(path.relative_to(TEMPLATE)) for path in TEMPLATE.glob("templates/*/*.jinja")]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TEMPLATE / file, tmp_path / file)
    clone = Project(tmp_path)
    clone.call("bash", "-e", "-c", relax["run"])
    for file in files[:3]:
        assert re.search(">=[0-9]", clone.read(file))
        assert not re.search(r"~=|,<", clone.read(file))

    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)
    (tmp_path / "output").write_text("one failed")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": "https://example.com/1"}
    environment |= {"CALLS": "calls", "OPEN": "open"}
    for number in "", "7":
        (tmp_path / "open").write_text(number)
        clone.call("bash", "-e", "-c", report["run"], **environment)
    calls = clone.read("calls")
    assert re.findall("^issue (create|edit [0-9]+)", calls, re.MULTILINE) == ["create", "edit 7"]
    assert "one failed" in clone.read("body")


def test_the_commands_of_the_readme_are_what_ci_runs():
    blocks = code((TEMPLATE / "README.md").read_text("utf-8"), "git clone")
    commands = re.findall("^make .+", blocks, re.MULTILINE)
    assert commands
    assert set(commands) <= {step.get("run") for step in JOBS["test"]["steps"]}
    assert set(commands) <= set(
        re.findall("^time (make .+)", (TEMPLATE / ".ci/run").read_text(), re.M)
    )


def test_a_push_publishes_the_default_output_and_the_pages(tmp_path, cookies_session):
    """The branch `output` has what Cookiecutter writes, except the secrets."""
    published = tmp_path / "published.git"
    subprocess.run(["git", "init", "--quiet", "--bare", published], check=True)
    environment = {
        "RUNNER_TEMP": str(tmp_path),
        "TOKEN": "secret",
        "GITHUB_REPOSITORY": "tea/shop",
        "GITHUB_SHA": "0" * 40,
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{published}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://x-access-token:secret@github.com/tea/shop",
    }
    script = JOBS["output"]["steps"][-1]["run"]
    Project(TEMPLATE).call("bash", "-e", "-c", script, **environment)

    def contents_of(branch):
        folder = Project(tmp_path / f"clone-{branch}")
        clone = "git", "clone", "--quiet", "--branch", branch, published, folder
        Project(tmp_path).call(*clone)
        shutil.rmtree(folder / ".git")
        return folder.contents()

    written = baked(cookies_session, {}).parent.contents()
    del written["my_project/.env"]
    assert contents_of("output") == written
    site = contents_of("site")
    assert {"docs/index.html", "durable-jobs/docs/guide.html", ".nojekyll"} <= site.keys()


def test_a_tag_publishes_only_its_own_library(tmp_path):
    (tmp_path / "dist").mkdir()
    files = {f"{name}-1.2.0{end}" for name in ("celery_steady", "durable_jobs") for end in ENDS}
    for name in files:
        (tmp_path / "dist" / name).touch()
    [script] = [
        step["run"]
        for step in yaml.safe_load((TEMPLATE / PUBLISH).read_text())["jobs"]["build"]["steps"]
        if "GITHUB_REF_NAME" in step.get("run", "")
    ]
    tag = {"GITHUB_REF_NAME": "durable-jobs-1.2.0"}
    Project(tmp_path).call("bash", "-e", "-c", script, **tag)
    published = {path.name for path in (tmp_path / "publish").iterdir()}
    assert published == {f"durable_jobs-1.2.0{end}" for end in ENDS}
    with pytest.raises(AssertionError):  # was built in another version
        Project(tmp_path).call("bash", "-e", "-c", script, GITHUB_REF_NAME="celery-steady-1.3.0")
