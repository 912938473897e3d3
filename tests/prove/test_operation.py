"""The output's docs/operation.md: its alerts use existing metrics, and fire when they should."""

import re
import shutil
import subprocess

import pytest
import yaml

from harness import missing
from harness.bake import CHOICES, render
from harness.pages import blocks

TEXT = render("docs/operation.md")
CODE = {block.heading: block.code for block in blocks("docs/operation.md", TEXT) if block.code}
CONFIG, RULES = CODE["Prometheus"], CODE["Alerts"]
ALERTS = {rule["alert"]: rule["expr"] for rule in yaml.safe_load(RULES)["groups"][0]["rules"]}
PROMQL = {"absent", "avg_over_time", "by", "count_over_time", "increase", "max", "max_over_time"}
PROMQL |= {"scalar", "sum", "sum_over_time"}
LABELS = {"name", "queue", "state", "task"}
# What Prometheus scrapes every minute, and the alerts that fire after 15 minutes.
SITUATIONS = {
    "all is well": (
        {
            'jobs_oldest_wait_seconds{queue="celery"}': "0+1x20",
            'jobs_ended_last_minute{task="mail",state="succeeded"}': "99x20",
            'jobs_ended_last_minute{task="mail",state="cancelled"}': "99x20",
            'jobs_ended_last_minute{task="mail",state="failed"}': "1x20",
            'jobs_ended_last_minute_crashes{task="mail",state="failed"}': "0x20",
            "jobs_sweep_age_seconds": "5x20",
        },
        [],
    ),
    "jobs wait": (
        {
            'jobs_oldest_wait_seconds{queue="celery"}': "0+60x20",
            'jobs_oldest_wait_seconds{queue="io"}': "0x20",
            "jobs_sweep_age_seconds": "5x20",
        },
        [("JobsWait", {"queue": "celery"})],
    ),
    "jobs are held by a limit and by a short pause": (
        {
            'jobs_held{queue="celery"}': "0+1000x20",
            'jobs_waiting{queue="celery"}': "0x20",
            'jobs_oldest_wait_seconds{queue="celery"}': "0x20",
            'jobs_pause_seconds{name="io"}': "0+60x20",
            "jobs_sweep_age_seconds": "5x20",
        },
        [],
    ),
    "a pause was forgotten": (
        {
            'jobs_pause_seconds{name="io"}': "3000+60x20",
            'jobs_pause_seconds{name="cpu"}': "60+60x20",
            "jobs_sweep_age_seconds": "5x20",
        },
        [("PauseForgotten", {"name": "io"})],
    ),
    "jobs fail and kill": (
        {
            'jobs_ended_last_minute{task="mail",state="succeeded"}': "4x20",
            'jobs_ended_last_minute{task="mail",state="failed"}': "_x10 1x10",
            'jobs_ended_last_minute_crashes{task="mail",state="failed"}': "_x10 3 _x9",
            "jobs_sweep_age_seconds": "5x20",
        },
        [("JobsFail", {"task": "mail"}), ("JobsKillWorkers", {"task": "mail"})],
    ),
    "Beat never ran": (
        {"jobs_sweep_age_seconds": 20 * "Inf ", "jobs_beat_late_seconds": 20 * "Inf "},
        [("SweepSilent", {}), ("BeatHangs", {})],
    ),
    "Beat hangs": (
        {"jobs_sweep_age_seconds": "5x20", "jobs_beat_late_seconds": "0+60x20"},
        [("BeatHangs", {})],
    ),
    "Beat could not start a task, before it was restarted": (
        {"jobs_schedule_errors_total": "2x8 3x12", "jobs_sweep_age_seconds": "5x20"},
        [("ScheduleErrors", {})],
    ),
    "Beat could not start a task an hour ago": (
        {"jobs_schedule_errors_total": "3x20", "jobs_sweep_age_seconds": "5x20"},
        [],
    ),
    "nothing is scraped": ({}, [("NoMetrics", {})]),
}


def metrics_named(expression):
    """Return the names in an expression that belong neither to PromQL nor to labels."""
    words = re.sub(r'"[^"]*"|\[\w+\]', "", expression)
    return set(re.findall(r"\b[a-z_]\w*", words)) - PROMQL - LABELS


def test_the_page_names_the_metrics_that_an_output_has(bake):
    exposed = set(re.findall('^    "(jobs_[a-z_]+)": ', bake().read("jobs/metrics.py"), re.M))
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert set(rows) == exposed and len(rows) == len(exposed)
    dashboard = re.findall(r"^\| .* \| `(sum .*)` \|$", TEXT, re.MULTILINE)
    assert len(ALERTS) == 8 and len(dashboard) == 2
    for expression in [*ALERTS.values(), *dashboard]:
        assert metrics_named(expression) <= exposed, expression


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_the_page_of_each_broker_names_only_metrics_that_its_output_has(bake, broker):
    project = bake(broker=broker)
    exposed = set(re.findall('^    "(jobs_[a-z_]+)": ', project.read("jobs/metrics.py"), re.M))
    named = set(re.findall(r"`(jobs_\w+)", project.read("docs/operation.md")))
    assert named and named <= exposed


def promtool(*arguments, cwd):
    if not shutil.which("promtool"):
        missing("promtool is not installed: sudo apt install prometheus, which has it")
    result = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_prometheus_accepts_the_configuration(tmp_path):
    (tmp_path / "prometheus.yml").write_text(CONFIG)
    (tmp_path / "jobs.yml").write_text(RULES)
    promtool("check", "config", "--syntax-only", "prometheus.yml", cwd=tmp_path)
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", "jobs.yml", cwd=tmp_path)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_alerts_fire_when_they_should(tmp_path, situation):
    series, alerts = SITUATIONS[situation]
    firing = []
    for alert, labels in alerts:
        labels = {"alertname": alert, "alertstate": "firing", **labels}
        pairs = ", ".join(f'{name}="{value}"' for name, value in labels.items())
        firing.append({"labels": f"ALERTS{{{pairs}}}", "value": 1})
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": "ALERTS", "eval_time": "15m", "exp_samples": firing}],
    }
    (tmp_path / "jobs.yml").write_text(RULES)
    tests = {"rule_files": ["jobs.yml"], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(tests))
    promtool("test", "rules", "test.yml", cwd=tmp_path)
