"""The alerts of projects with jobs: their metrics, their page, and a real Prometheus.

test_alerts.py proves when each one fires.
"""

import re

import pytest
import yaml

from harness.bake import LIBRARY, WITH_JOBS, render
from harness.blocks import code
from harness.faults import ONE, stacks
from harness.project import started, wait_for
from harness.prometheus import Prometheus, promtool

TEXT = (LIBRARY / "docs/operations.md").read_text("utf-8")
CONFIG = code(render("docs/production.md", **WITH_JOBS), "scrape_configs:")
RULES = render("deploy/monitoring/alerts.yml", **WITH_JOBS)
ALERTS = {rule["alert"]: rule["expr"] for rule in yaml.safe_load(RULES)["groups"][0]["rules"]}
PROMQL = {"absent", "by", "increase", "max", "sum", "unless"}
LABELS = {"name", "queue", "state", "task"}


def metrics_named(expression):
    """Return the names in an expression that belong neither to PromQL nor to labels."""
    words = re.sub(r'"[^"]*"|\[\w+\]', "", expression)
    return set(re.findall(r"\b[a-z_]\w*", words)) - PROMQL - LABELS


def test_the_page_and_the_alerts_name_the_metrics_of_the_library():
    source = (LIBRARY / "src/durable_jobs/contrib/prometheus.py").read_text("utf-8")
    found = set(re.findall(r'^    "(durable_jobs_\w+)": ', source, re.M))
    assert set(re.findall(r"`(durable_jobs_\w+)`", TEXT)) <= found
    assert ALERTS
    for expression in ALERTS.values():
        assert metrics_named(expression) <= found, expression


def test_the_page_says_of_each_alert_what_to_do():
    assert [name for name in ALERTS if f"`{name}`" not in TEXT] == []


# A real Prometheus, which scrapes a real project

SHORTER = {"for: 1m": "for: 2s", "for: 2m": "for: 3s"}
SHORTER |= {"> 300": "> 3", "> 3600": "> 3", "> 60": "> 4"}


class Alerts(Prometheus):
    """Prometheus with the page's configuration and the alerts, both with shorter times."""

    def __init__(self, stack, folder):
        super().__init__(folder)
        token = folder / "token"
        token.write_text(stack.add_user("prometheus", is_staff=True))
        config = CONFIG.replace("scrape_interval: 30s", "scrape_interval: 1s")
        config = config.replace("scheme: https", "scheme: http")
        config = config.replace("example.com", f"127.0.0.1:{stack.port}")
        config = re.sub("credentials_file: .*", f"credentials_file: {token}", config)
        (folder / "prometheus.yml").write_text(f"global: {{evaluation_interval: 1s}}\n{config}")
        rules = RULES
        for time_, shorter in SHORTER.items():
            assert time_ in RULES
            rules = re.sub(re.escape(time_) + r"(?!\d)", shorter, rules)
        (folder / "alerts.yml").write_text(rules)

    def firing(self):
        """Return the alerts that fire now."""
        alerts = [each for each in self.ask("alerts")["alerts"] if each["state"] == "firing"]
        return {each["labels"]["alertname"] for each in alerts}

    def wait_for(self, *alerts):
        self.wait_until(lambda: self.firing() >= {*alerts})

    def wait_until_quiet(self):
        self.wait_until(lambda: not self.ask("alerts")["alerts"])

    def wait_until(self, condition):
        try:
            wait_for(condition)
        except AssertionError as error:
            raise AssertionError(self.ask("alerts")) from error


@pytest.fixture
def prometheus(stack, tmp_path):
    with started(Alerts(stack, tmp_path)) as [prometheus]:
        yield prometheus


# The alerts look at jobs of the last five minutes.
LATER = """
from datetime import timedelta
from django.db.models import F
ended = Job.objects.filter(finished_at__isnull=False)
ended.update(finished_at=F("finished_at") - timedelta(minutes=5))
"""


@stacks(**ONE, sqlite=True)
def test_a_real_prometheus_sees_each_alert_fire_and_resolve(stack, prometheus, gate):
    """Four minutes. Each alert is provoked with real processes."""
    stack.ask(LATER)  # jobs of other tests
    prometheus.wait_until_quiet()
    stack.web.stop()
    prometheus.wait_for("NoMetrics")
    stack.web.start()
    prometheus.wait_until_quiet()

    stack.other.stop()
    waiting = stack.enqueue("quick", queue="io")
    stack.ask("pauses.pause('cpu')")
    for _ in range(3):
        stack.enqueue("run", "raise ValueError")
    stack.enqueue("die")
    prometheus.wait_for("JobsWait", "NoWorker", "PauseForgotten")
    prometheus.wait_for("JobsFail", "JobsKillWorkers")
    # Beat was replaced, and a worker died: on a busy machine, these may have fired for a moment.
    others = {"SweeperDown", "BeatHangs", "JobsStalled", "NoMetrics"}
    prometheus.wait_until(lambda: not prometheus.firing() & others)
    stack.other.start()
    stack.ask("pauses.resume('cpu')")
    stack.wait_until_final(waiting)
    check_counts(stack, prometheus)
    stack.ask(LATER)
    prometheus.wait_until_quiet()

    # Without a schedule, Beat's next tick is due in five minutes, and it is not late before.
    beat = stack.replace_beat(FAULT="every_second")
    ticks = "result = Job.objects.filter(task='faults.tasks.tick').count()"
    wait_for(lambda: stack.ask(ticks) > 2)
    lost = stack.enqueue("hold", gate)
    stack.wait_until_started(lost)
    stack.kill(beat, *stack.workers)
    prometheus.wait_for("SweeperDown", "BeatHangs", "JobsStalled")
    gate.touch()
    for process in beat, *stack.workers:
        process.start()
    stack.wait_until_final(lost)
    prometheus.wait_until_quiet()

    beat.stop()
    stack.beat.start()
    token = stack.add_user("reader", is_staff=True)
    metrics = stack.request("/metrics", Authorization=f"Token {token}")[2]
    promtool("check", "metrics", input=metrics)


def check_counts(stack, prometheus):
    """Assert that the metrics know the jobs that ended."""

    def counted(metric, **labels):
        labels = ",".join(f'{name}="{value}"' for name, value in labels.items())
        return [value for _, value in prometheus.value(f"{metric}{{{labels}}}")]

    failed = {"task": "faults.tasks.run", "state": "failed"}
    prometheus.wait_until(lambda: counted("durable_jobs_ended", **failed) == [3])
    assert counted("durable_jobs_crashes", task="faults.tasks.die") == [3]
