"""The template's own workflow is valid, has few rights, and leaves no test out."""

import re

import pytest
import yaml
from project import Project
from test_bake import CHOICES, TEMPLATE

WORKFLOW = ".github/workflows/ci.yml"


@pytest.mark.parametrize(
    "command",
    [
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows"],
        ["zizmor", "--offline", "--persona", "pedantic"],
    ],
    ids=" ".join,
)
def test_the_workflow_passes(command):
    Project(TEMPLATE).call(*command, WORKFLOW)


def test_each_output_that_runs_does_so_in_one_job():
    jobs = yaml.safe_load((TEMPLATE / WORKFLOW).read_text())["jobs"]
    matrix = jobs["run"]["strategy"]["matrix"]
    assert matrix["broker"] == jobs["docker"]["strategy"]["matrix"]["broker"] == CHOICES["broker"]

    tests = Project(TEMPLATE).run("pytest", "tests/test_run.py", "--collect-only", "--quiet")
    tests = re.findall(r"tests/\S+::.+", tests)
    assert tests
    for test in tests:
        assert sum(f"[{broker}-" in test for broker in matrix["broker"]) == 1, test
