"""The template's own workflow is valid, has few rights, and leaves no test out."""

import re

import pytest
import yaml

from harness.bake import CHOICES, TEMPLATE
from harness.outputs import one_of_each_pair
from harness.project import Project

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


@pytest.mark.parametrize("job", ["run", "faults", "docker"])
def test_each_broker_has_its_job(job):
    workflow = yaml.safe_load((TEMPLATE / WORKFLOW).read_text())
    assert workflow["jobs"][job]["strategy"]["matrix"]["broker"] == CHOICES["broker"]


@pytest.mark.parametrize(
    ("name", "keyword"),
    [("run", "[{}-"), ("hardening", "[{}-"), ("faults", "{}"), ("odds", "{}")],
)
def test_each_test_is_in_the_job_of_one_broker(name, keyword):
    file = f"tests/test_{name}.py"
    assert f" {file} " in (TEMPLATE / WORKFLOW).read_text()
    tests = Project(TEMPLATE).run("pytest", file, "--collect-only", "--quiet")
    tests = re.findall(r"tests/\S+::(.+)", tests)
    assert tests
    for test in tests:
        assert sum(keyword.format(broker) in test for broker in CHOICES["broker"]) == 1, test


def test_each_choice_is_tested_on_each_broker():
    for broker in CHOICES["broker"]:
        for option in ("result_backend", "worker_pool", "periodic_tasks"):
            pairs = (answers for answers in one_of_each_pair() if answers["broker"] == broker)
            assert {answers[option] for answers in pairs} == set(CHOICES[option]), option
