"""The alerts of outputs fire and resolve when they should.

test_operation.py and test_plain_docker.py provoke them in a real Prometheus.
"""

import shutil

import pytest
import yaml

from harness.bake import CHOICES, TEMPLATE, WITH_JOBS
from harness.prometheus import promtool

TESTS = {  # {file with promtool's tests: answers}
    "alerts.yml": WITH_JOBS,
    "plain_alerts.yml": {"broker": "redis"},
    "plain_alerts_rabbitmq.yml": {"broker": "rabbitmq"},  # where it differs
}


@pytest.fixture(params=TESTS)
def folder(request, bake, tmp_path):
    """A folder with the configuration, the alerts and the tests that Prometheus gets."""
    shutil.copy(TEMPLATE / "tests" / request.param, tmp_path / "tests.yml")
    baked = bake(**TESTS[request.param]) / "deploy/monitoring"
    return shutil.copytree(baked, tmp_path, dirs_exist_ok=True)


# That of a project with jobs names a file for its token, which is not there.
@pytest.mark.parametrize("folder", [*TESTS][1:], indirect=True)
def test_prometheus_accepts_its_configuration(folder):
    promtool("check", "config", "prometheus.yml", cwd=folder)


def test_each_alert_fires_and_resolves_when_it_should(folder):
    promtool("test", "rules", "tests.yml", cwd=folder)


@pytest.mark.parametrize("folder", [*TESTS][:2], indirect=True)
def test_each_alert_has_a_test_in_which_it_is_quiet_and_one_in_which_it_resolves(folder):
    [group] = yaml.safe_load((folder / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for rule in group["rules"] if "alert" in rule}
    quiet, *others = yaml.safe_load((folder / "tests.yml").read_text())["tests"]
    assert {test["alertname"] for test in quiet["alert_rule_test"]} == alerts
    resolved = set()
    for each in others:
        firing = {}
        for test in each["alert_rule_test"]:
            firing.setdefault(test["alertname"], []).append(bool(test["exp_alerts"]))
        resolved |= {name for name, states in firing.items() if (*states,)[-2:] == (True, False)}
    assert resolved == alerts


def test_the_profile_monitoring_is_only_where_flower_is(bake):
    for broker in CHOICES["broker"]:
        project = bake(broker=broker)
        services = project.services()
        has_files = (project / "deploy/monitoring/alerts.yml").exists()
        assert ("prometheus" in services) == ("flower" in services) == has_files
