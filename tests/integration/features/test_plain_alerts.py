"""The alerts of plain outputs fire and resolve when they should.

test_plain_docker.py provokes each of them once.
"""

import shutil

import pytest
import yaml

from harness.bake import CHOICES, TEMPLATE
from harness.prometheus import promtool

TESTS = {"redis": "plain_alerts.yml", "rabbitmq": "plain_alerts_rabbitmq.yml"}  # where they differ


@pytest.fixture(params=TESTS)
def prometheus(request, bake, tmp_path):
    """A folder with the configuration, the alerts and the tests that Prometheus gets."""
    shutil.copy(TEMPLATE / "tests" / TESTS[request.param], tmp_path / "tests.yml")
    folder = bake(broker=request.param) / "deploy/monitoring"
    return shutil.copytree(folder, tmp_path, dirs_exist_ok=True)


def test_prometheus_accepts_its_configuration(prometheus):
    promtool("check", "config", "prometheus.yml", cwd=prometheus)


def test_each_alert_fires_and_resolves_when_it_should(prometheus):
    promtool("test", "rules", "tests.yml", cwd=prometheus)


@pytest.mark.parametrize("prometheus", ["redis"], indirect=True)
def test_each_alert_has_a_test_in_which_it_is_quiet_and_one_in_which_it_resolves(prometheus):
    [group] = yaml.safe_load((prometheus / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for rule in group["rules"] if "alert" in rule}
    quiet, *others = yaml.safe_load((prometheus / "tests.yml").read_text())["tests"]
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
