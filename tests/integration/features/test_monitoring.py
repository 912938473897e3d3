"""Prometheus and Grafana of the output: each question of the dashboard gets an answer.

Grafana is not started here. Its part is read: what is in the files must fit together.
integration/docker/test_docker.py runs `docker compose --profile monitoring`, with Grafana if there
is an image of it.
"""

import itertools
import json
import math
import re
import shutil
import subprocess

import pytest
import yaml

from harness.faults import on_one
from harness.project import started, wait_for
from harness.prometheus import Prometheus

FOLDER = "deploy/monitoring"
UNITS = {"short", "s", "percentunit"}
VARIABLES = {"$queue": ".*", "$task": ".*"}  # as Grafana replaces them
# Jobs for each number of the dashboard: some end, some retry, some wait, one kills its worker.
JOBS = """
for task, args in [(quick, []), (fail_twice, []), (run, ["raise self.retry(countdown=0)"])]:
    enqueue(task, args, queue="cpu")
result = str(enqueue(die, queue="cpu").pk)
enqueue(quick, countdown=600)
batches.enqueue([quick.using(countdown=600).s()])
pauses.pause("faults.tasks.tick", "SMTP is down")
"""


def dashboard(project):
    """Return the dashboard and its panels, without the rows that group them."""
    found = json.loads(project.read(f"{FOLDER}/dashboard.json"))
    return found, [panel for panel in found["panels"] if panel["type"] != "row"]


def queries(panels):
    for panel in panels:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def read(project, file):
    return yaml.safe_load(project.read(file))


def test_grafana_finds_the_data_source_and_the_dashboard(bake):
    project = bake(durable_jobs="yes")
    about, panels = dashboard(project)
    files = "grafana.yml", "prometheus.yml"
    provisioned, prometheus = (read(project, f"{FOLDER}/{file}") for file in files)
    services = project.services()
    mounts = [mount.split(":")[:2] for mount in services["grafana"]["volumes"]]
    targets = {target: source for source, target in mounts}
    for folder in ("datasources", "dashboards"):
        assert targets[f"/etc/grafana/provisioning/{folder}/jobs.yml"] == f"./{FOLDER}/grafana.yml"
    [provider], [source] = provisioned["providers"], provisioned["datasources"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.startswith(provider["options"]["path"])
    assert targets[home] == f"./{FOLDER}/dashboard.json"

    interval = prometheus["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval
    assert source["url"] == "http://prometheus:9090" and source["isDefault"]
    used = {"type": source["type"], "uid": source["uid"]}
    for each in panels + about["templating"]["list"]:
        assert each["datasource"] == used, each


def test_the_dashboard_can_be_read(bake):
    about, panels = dashboard(bake(durable_jobs="yes"))
    assert about["uid"] and about["schemaVersion"] >= 41
    for names in ("id", "title"):
        values = [panel[names] for panel in about["panels"]]
        assert len(set(values)) == len(values)
    cells = set()
    for panel in about["panels"]:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        covered = set(itertools.product(range(x, x + w), range(y, y + h)))
        assert x + w <= 24 and not covered & cells, panel["title"]
        cells |= covered
    assert len(cells) == 24 * (1 + max(y for _, y in cells)), "there are holes"
    for panel in panels:
        assert panel["title"].endswith("?") and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(set(refs)) == len(refs)
        for target in panel["targets"]:
            labels = re.findall(r"{{(\w+)}}", target["legendFormat"])
            grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
            assert all(label in grouped[0] for label in labels), panel["title"]
            assert labels or not grouped or panel["type"] == "stat", panel["title"]
            assert bool(target.get("instant")) == (panel["type"] == "stat")
    asked = {name for _, expr in queries(panels) for name in re.findall(r"\$(\w+)", expr)}
    assert asked == {each["name"] for each in about["templating"]["list"]}


def test_the_dashboard_shows_the_projects_own_alerts(bake):
    """Not those of a cluster, of which some always fire."""
    project = bake(durable_jobs="yes")
    _, panels = dashboard(project)
    [expr] = [expr for _, expr in queries(panels) if "ALERTS" in expr]
    [group] = read(project, f"{FOLDER}/alerts.yml")["groups"]
    names = re.search('alertname=~"(.*?)"', expr)[1].split("|")
    assert names == [rule["alert"] for rule in group["rules"]]


def test_grafana_does_not_start_without_a_password(bake):
    """Its own default is "admin". Everything else starts without this password."""
    project = bake(durable_jobs="yes")
    grafana = project.services()["grafana"]
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "${GRAFANA_PASSWORD:-}"
    assert re.search("^GRAFANA_PASSWORD=[0-9a-f]{24}$", project.read(".env"), re.M)
    shell, option, script = grafana["entrypoint"]
    script = script.replace("$$", "$").replace("exec /run.sh", "echo started")
    for password, starts in (("", False), ("secret", True)):
        variables = {"GF_SECURITY_ADMIN_PASSWORD": password}
        result = subprocess.run([shell, option, script], env=variables, capture_output=True)
        assert (result.stdout == b"started\n") == starts == (result.returncode == 0)
        assert (b"set GRAFANA_PASSWORD in .env" in result.stderr) != starts


@pytest.fixture
def prometheus(stack, tmp_path):
    """Prometheus with the configuration of the output, which scrapes the stack each second."""
    process, project, token = Prometheus(tmp_path), stack.project, tmp_path / "token"
    service = project.services()["prometheus-token"]
    make_token = service["command"][-1].replace("/token/prometheus", str(token))
    project.manage("shell", "-v0", "-c", make_token, **stack.variables)
    config = project.read(f"{FOLDER}/prometheus.yml")
    for old, new in {
        "/token/prometheus": token,
        "web:8000": f"127.0.0.1:{stack.port}",
        "_interval: 15s": "_interval: 1s",
    }.items():
        assert old in config
        config = config.replace(old, str(new))
    (tmp_path / "prometheus.yml").write_text(config)
    shutil.copy(project / FOLDER / "alerts.yml", tmp_path)
    with started(process):
        yield process
    print(process.printed[-2000:])


def answer(prometheus, expression):
    """Return the samples of an expression of the dashboard, [(labels, value)]."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return prometheus.value(expression)


@on_one
def test_each_question_of_the_dashboard_gets_an_answer(stack, prometheus):
    """From a project that ran jobs. The dashboard asks for each metric that the project has."""
    _, panels = dashboard(stack.project)
    stack.ask(JOBS)
    unanswered = dict(enumerate(queries(panels)))

    def all_answered():
        stack.enqueue("quick", queue="io")
        for key, (_, expression) in list(unanswered.items()):
            if any(math.isfinite(value) for _, value in answer(prometheus, expression)):
                del unanswered[key]
        return not unanswered

    try:
        wait_for(all_answered)
    except AssertionError:
        raise AssertionError(unanswered) from None
    asked = " ".join(expression for _, expression in queries(panels))
    scraped = {
        labels["__name__"] for labels, _ in prometheus.value('{__name__=~"durable_jobs_.*"}')
    }
    shown = {name for name in scraped if name.removesuffix("_created") in asked}
    assert scraped and shown == scraped
