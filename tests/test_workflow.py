"""The template's own workflow is valid, has few permissions, and runs every test."""

import re

import pytest
import yaml

from harness.bake import CHOICES, TEMPLATE
from harness.outputs import one_of_each_pair
from harness.project import Project

WORKFLOW = ".github/workflows/ci.yml"
JOBS = yaml.safe_load((TEMPLATE / WORKFLOW).read_text())["jobs"]


@pytest.mark.parametrize(
    "command",
    [
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows"],
        ["zizmor", "--offline", "--persona", "pedantic"],
    ],
    ids=" ".join,
)
def test_the_workflow_passes_its_linters(command):
    Project(TEMPLATE).call(*command, WORKFLOW)


def test_each_test_of_make_prove_is_in_one_job():
    """If the job has one run for each broker, the test is in one of them or in all."""
    collected = Project(TEMPLATE).run("pytest", "tests/prove", "--collect-only", "--quiet")
    tests = re.findall(r"^(tests/prove/\w+\.py)::(.+)", collected, re.MULTILINE)
    assert tests
    for file, test in tests:
        [job] = [job for job in JOBS.values() if file in job["steps"][-1]["run"]]
        brokers = job.get("strategy", {"matrix": {"broker": [""]}})["matrix"]["broker"]
        assert brokers in ([""], CHOICES["broker"])
        [words] = re.findall("-k '(.+)'", job["steps"][-1]["run"]) or [""]
        runs = [
            any(word.replace("$BROKER", broker) in test for word in words.split(" or "))
            for broker in brokers
        ]
        assert sum(runs) == 1 or all(runs), (test, runs)


def test_each_choice_is_tested_on_each_broker():
    for broker in CHOICES["broker"]:
        for option in ("result_backend", "worker_pool", "periodic_tasks"):
            pairs = (answers for answers in one_of_each_pair() if answers["broker"] == broker)
            assert {answers[option] for answers in pairs} == set(CHOICES[option]), option
