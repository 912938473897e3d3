"""The manifests of outputs: valid, and each part fits the others, the code and the pages."""

import base64
import json
import re
import subprocess
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml

from harness.bake import (
    CHOICES,
    LIBRARY,
    PINNED,
    STEADY,
    TEMPLATE,
    WITH_JOBS,
    baked,
    chosen,
    covering,
    product,
)
from harness.blocks import code
from harness.containers import docker, options_of
from harness.kustomize import PRODUCTION, autoscaler, manifests, of_kind, only, pods
from harness.project import responds, wait_for
from harness.prometheus import promtool

MONITORING = Path("deploy/monitoring")
OPTIONS = ("broker", "result_backend", "worker_pool", "include_example", "periodic_tasks")
ANSWERS = [
    {"durable_jobs": choice, **each}
    for choice in CHOICES["durable_jobs"]
    for each in covering(product({option: CHOICES[option] for option in OPTIONS}), size=2)
]
TRIGGERS = {  # what we use of KEDA's
    "postgresql": {"connectionFromEnv", "query", "targetQueryValue"},
    "redis": {
        *("addressFromEnv", "passwordFromEnv", "enableTLS", "databaseIndex"),
        *("listName", "listLength"),
    },
    "rabbitmq": {"hostFromEnv", "queueName", "mode", "value"},
    "aws-sqs-queue": {"queueURLFromEnv", "queueLength"},
}
AT_ONCE = {"targetQueryValue", "listLength", "value", "queueLength"}  # tasks for each worker


@pytest.fixture(scope="module")
def render(cookies_session):
    """Return a function: it bakes a project, and returns it and {(kind, name): document}."""

    @cache
    def render(**answers):
        project = baked(cookies_session, {**WITH_JOBS, "deployment": "kubernetes", **answers})
        return project, manifests(project)

    return render


@pytest.mark.parametrize("answers", ANSWERS, ids=lambda answers: "-".join(answers.values()))
def test_the_manifests_are_valid(render, answers):
    project, documents = render(**answers)
    choices, has_jobs = chosen(**answers), answers["durable_jobs"] == "yes"
    for (kind, _), document in documents.items():
        if kind != "TriggerAuthentication":  # KEDA's
            valid = autoscaler(document) if kind == "ScaledObject" else document
            kubernetes_validate.validate(valid, "1.37", strict=True)
        assert has_jobs or "prometheus" not in yaml.safe_dump(document).lower()

    for key, spec in pods(documents).items():
        check_pod(spec, documents, key)
    check_selectors(documents)
    workers = {f"worker-{queue}" for queue in choices.include_example.queues}
    assert of_kind("ScaledObject", documents).keys() == workers
    others = {"web", "beat"} | ({"flower"} if choices.has_flower else set())
    assert of_kind("Deployment", documents).keys() == workers | others
    for worker in workers:
        check_workers(worker, documents, answers)
    beat = documents["Deployment", "beat"]["spec"]
    assert (beat["replicas"], beat["strategy"]) == (1, {"type": "Recreate"})
    [container] = beat["template"]["spec"]["containers"]
    assert "livenessProbe" in container
    [web] = pods(documents)["Deployment", "web"]["containers"]
    paths = {"startupProbe": "live", "livenessProbe": "live", "readinessProbe": "ready"}
    for probe, path in paths.items():  # without a `Host` of ALLOWED_HOSTS
        assert web[probe]["httpGet"] == {"path": f"/health/{path}", "port": 8000}
    check_uploads(documents, workers)
    if has_jobs:  # without them, KEDA reads some that the code does not
        check_variables(project, documents)


def check_pod(spec, documents, key):
    assert spec["securityContext"]["runAsNonRoot"], key
    assert ("ServiceAccount", spec["serviceAccountName"]) in documents, key
    [first] = spec["initContainers"]
    if key[1] == "beat":
        assert first["command"] == ["python", "manage.py", "migrate"]
    else:
        assert "until python manage.py migrate --check" in first["command"][-1], key
    volumes = {volume["name"] for volume in spec["volumes"]}
    for volume in spec["volumes"]:  # none can fill the disk of its node
        assert volume.get("emptyDir", {"sizeLimit": "none"})["sizeLimit"], key
    for container in spec["containers"] + spec.get("initContainers", []):
        assert container["resources"]["requests"] and container["resources"]["limits"], key
        sources = {
            kind: source["name"] for each in container["envFrom"] for kind, source in each.items()
        }
        assert ("ConfigMap", sources["configMapRef"]) in documents, key
        assert ("Secret", sources["secretRef"]) in documents, key
        rights = container["securityContext"]
        assert not rights["allowPrivilegeEscalation"] and rights["readOnlyRootFilesystem"], key
        assert rights["capabilities"] == {"drop": ["ALL"]}, key
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) <= volumes, key
        written = re.findall(r"(?:--schedule |LIVENESS_FILE=)(/\w+)/", said(container, documents))
        assert written and set(written) <= set(mounts), key


def said(container, documents):
    """Return the command of a container and its variables from the ConfigMap, as a text."""
    config = only("ConfigMap", documents)["data"]
    variables = [f"{name}={value}" for name, value in config.items()]
    return " ".join([*container.get("command", []), *variables])


def check_selectors(documents):
    """Check that each selector finds the pods that it is for."""
    labels = {
        name: document["spec"]["template"]["metadata"]["labels"]
        for name, document in of_kind("Deployment", documents).items()
    }
    for (kind, name), document in documents.items():
        spec = document.get("spec")
        if kind == "Deployment":
            assert spec["selector"] == {"matchLabels": {"app": name}}, name
            role = {"role": "worker"} if name.startswith("worker-") else {}
            assert labels[name] == {"app": name, **role}, name
        elif kind == "Service":
            assert spec["selector"] == labels[name]
            [container] = pods(documents)["Deployment", name]["containers"]
            open_ports = {port["containerPort"] for port in container["ports"]}
            assert {port["targetPort"] for port in spec["ports"]} == open_ports
        elif kind == "PodDisruptionBudget":
            assert spec["selector"] == {"matchLabels": labels[name]}
            replicas = documents["Deployment", name]["spec"]["replicas"]
            assert 0 < spec["maxUnavailable"] < replicas  # a node can be drained, and some answer
        elif name == "all":  # each pod of the project, and no solver of cert-manager's challenges
            expressions = {"matchExpressions": [{"key": "app", "operator": "Exists"}]}
            assert spec["podSelector"] == expressions and all(
                "app" in each for each in labels.values()
            )
        elif kind == "NetworkPolicy":
            wanted = spec["podSelector"]["matchLabels"].items()
            assert any(wanted <= each.items() for each in labels.values()), name


def check_uploads(documents, workers):
    """Check that web and workers store files in the volume that they share."""
    claim = only("PersistentVolumeClaim", documents)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name in {"web"} | workers:
        spec = pods(documents)["Deployment", name]
        [container] = spec["containers"]
        place = {"name": "MEDIA_ROOT", "value": "/media"}
        assert place in container["env"]
        [mount] = [each for each in container["volumeMounts"] if each["mountPath"] == "/media"]
        claimed = {"claimName": claim["metadata"]["name"]}
        assert {"name": mount["name"], "persistentVolumeClaim": claimed} in spec["volumes"]
        assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsUser"]


def check_variables(project, documents):
    """Check that the code reads each variable that a manifest sets, or uses in a command."""
    libraries = [file for library in (STEADY, LIBRARY) for file in (library / "src").rglob("*.py")]
    files = [*(project / "config").glob("*.py"), *libraries]
    code = "".join(file.read_text() for file in files)
    known = set(re.findall(r"""(?:env\.\w+|environ\.get)\(\s*["']([A-Z0-9_]+)["']""", code))
    given = set()
    for document in documents.values():
        given |= set(document.get("data", {})) - {"KEDA_DATABASE_URL"}
    assert given and given <= known
    for spec in pods(documents).values():
        for container in spec["containers"]:
            own = {each["name"] for each in container.get("env", [])}
            assert own <= known
            commands = yaml.safe_dump(container)
            assert set(re.findall(r"\$\{?([A-Z_]+)", commands)) <= given | own


def check_workers(name, documents, answers):
    """Check that the worker of a queue scales with this queue, from one worker on."""
    spec = documents["ScaledObject", name]["spec"]
    assert (spec["scaleTargetRef"], spec["minReplicaCount"]) == ({"name": name}, 1)
    [container] = pods(documents)["Deployment", name]["containers"]
    assert container["command"][-2:] == ["--queues", name.removeprefix("worker-")]
    [trigger] = spec["triggers"]
    metadata, secret = trigger["metadata"], only("Secret", documents)["data"]
    assert (trigger["type"] == "postgresql") == (answers["durable_jobs"] == "yes")
    assert set(metadata) == TRIGGERS[trigger["type"]]
    env = {each["name"]: each["value"] for each in container.get("env", [])}
    named = {value for key, value in metadata.items() if key.endswith("FromEnv")}
    if reference := trigger.get("authenticationRef"):
        authentication = documents["TriggerAuthentication", reference["name"]]["spec"]
        assert authentication["podIdentity"] == {"provider": "aws"}
        [parameter] = authentication["env"]
        assert parameter["parameter"] == "awsRegion"
        assert parameter["containerName"] == container["name"]
        named.add(parameter["name"])
    assert named <= secret.keys() | env.keys()
    [tasks] = (metadata[key] for key in AT_ONCE & metadata.keys())
    expected = {"WORKER_CONCURRENCY": tasks}
    if answers["worker_pool"] == "prefork":  # four children of 200 MB fit into the pod's memory
        expected["WORKER_MAX_KILOBYTES"] = "200000"
    env.pop("QUEUE_URL", None)  # for KEDA
    del env["MEDIA_ROOT"]
    assert env == expected


def test_an_output_has_the_files_of_docker_and_manifests(render, bake):
    """Only pages differ, so the tests of containers prove both choices."""
    project, docker = (bake(durable_jobs="yes", deployment=d) for d in ("kubernetes", "docker"))
    names = {each.relative_to(project) for each in project.files()}
    others = {each.relative_to(docker) for each in docker.files()}
    assert {Path("Dockerfile"), Path("compose.yaml"), Path("compose.dev.yaml")} <= others
    assert names ^ others == {
        name
        for name in names
        if name.is_relative_to("deploy/kubernetes")
        or name in (MONITORING / "kustomization.yaml", MONITORING / "kubernetes.yaml")
        or name in (Path("api/apps.py"), Path("api/checks.py"))
    }
    both = {name: [(each / name).read_bytes() for each in (project, docker)] for name in others}
    changed = [name for name, (one, other) in both.items() if one != other]
    differ = {".env", "docs/jobs.md", "docs/production.md"}
    assert set(map(str, changed)) == differ
    kinds = {"ConfigMap", "Secret", "Service", "Deployment", "NetworkPolicy"}
    kinds |= {"ServiceAccount", "PodDisruptionBudget", "PersistentVolumeClaim"}
    _, documents = render()
    assert {kind for kind, _ in documents} == kinds | {"ScaledObject"}  # KEDA's; no server


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_production_has_every_variable_that_it_needs(render, broker):
    project, documents = render(broker=broker)
    config = only("ConfigMap", documents)["data"]
    secret = only("Secret", documents)["data"]
    assert project.production().keys() <= {*config, *secret}
    assert {"SENTRY_DSN", "S3_BUCKET"} <= {*secret}


def ports(rules):
    return {(port.get("protocol", "TCP"), port["port"]) for rule in rules for port in rule["ports"]}


@pytest.mark.parametrize("result_backend", CHOICES["result_backend"])
@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_the_network_policies_open_only_needed_ports(render, broker, result_backend):
    _, documents = render(broker=broker, result_backend=result_backend)
    policies = {name: each["spec"] for (kind, name), each in documents.items() if "Policy" in kind}

    everybody = policies["all"]
    assert set(everybody["podSelector"]) == {"matchExpressions"}
    assert set(everybody["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in everybody
    # The ports of the servers in .env. Amazon's services have no URL there: they use 443.
    secret = only("Secret", documents)["data"]
    values = {name: base64.b64decode(value).decode() for name, value in secret.items()}
    urls = {name: urlsplit(value) for name, value in values.items() if "://" in value}
    needed = {("TCP", url.port or 443) for url in urls.values()}
    needed |= {("TCP", 443)} if any(name.startswith("AWS_") for name in values) else set()
    credentials = [rule for rule in everybody["egress"] if ports([rule]) == {("TCP", 80)}]
    others = [rule for rule in everybody["egress"] if rule not in credentials]
    assert ports(others) == needed | {("UDP", 53), ("TCP", 53)}
    if {broker, result_backend} & {"sqs", "dynamodb"}:  # of a role: of EKS, or of the node
        [rule] = credentials
        addresses = {place["ipBlock"]["cidr"] for place in rule["to"]}
        assert addresses == {"169.254.170.23/32", "169.254.169.254/32"}
    else:
        assert not credentials
    [names] = [rule for rule in everybody["egress"] if ("UDP", 53) in ports([rule])]
    assert names["to"]

    [ingress] = [spec["ingress"] for spec in policies.values() if "ingress" in spec]
    assert policies["web"]["podSelector"] == {"matchLabels": {"app": "web"}}
    [rule] = ingress
    [origin] = rule["from"]
    names = {"kubernetes.io/metadata.name": "INGRESS"}
    assert origin == {"namespaceSelector": {"matchLabels": names}}
    assert ports([rule]) == {("TCP", 8000)}

    assert policies["workers"]["podSelector"] == {"matchLabels": {"role": "worker"}}
    assert ports(policies["workers"]["egress"]) == {("TCP", 587)}  # EMAIL_PORT


def test_the_io_queue_reaches_other_services_over_https(render):
    _, documents = render()
    policy = documents["NetworkPolicy", "worker-io"]["spec"]
    assert policy["podSelector"] == {"matchLabels": {"app": "worker-io"}}
    assert ports(policy["egress"]) == {("TCP", 443)}
    _, documents = render(include_example="no")
    assert ("NetworkPolicy", "worker-io") not in documents


def add_monitoring(project):
    """Do step 4 of the page. Return the manifests before and after, and {kind: document added}."""
    before = manifests(project)
    project.edit(f"{PRODUCTION}/kustomization.yaml", "# (?=- ../../../monitoring)", "")
    after = manifests(project)
    added = {key[0]: after[key] for key in after.keys() - before.keys()}
    assert len(added) == len(after) - len(before)  # one of each kind
    return before, after, added


def without_namespace(rules):
    """Return the rules of a PrometheusRule as of Compose: each selector loses the namespace.

    Otherwise, metrics of a second project, such as staging, would hide what this one lacks.
    """
    name, spec = rules["metadata"]["namespace"], json.dumps(rules["spec"])
    for rule in [rule for group in rules["spec"]["groups"] for rule in group["rules"]]:
        assert f'{{namespace="{name}"' in rule["expr"]
    selector = f'{{namespace=\\"{name}\\"'
    return json.loads(spec.replace(f"{selector},", "{").replace(f"{selector}}}", ""))


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_the_operator_finds_flower_and_the_alerts_of_a_plain_project(bake, broker):
    project = bake(broker=broker, deployment="kubernetes")
    before, after, added = add_monitoring(project)
    assert set(added) == {"PodMonitor", "PrometheusRule", "NetworkPolicy"}
    alerts = yaml.safe_load((project / MONITORING / "alerts.yml").read_text())
    for group in alerts["groups"]:  # the pods' own probes watch the web server
        group["rules"] = [rule for rule in group["rules"] if 'job="web"' not in rule["expr"]]
    assert without_namespace(added["PrometheusRule"]) == alerts
    kubernetes_validate.validate(added["NetworkPolicy"], "1.37", strict=True)

    flower = after["Deployment", "flower"]["spec"]["template"]
    [container] = flower["spec"]["containers"]
    [port] = container["ports"]
    assert container["env"] == [{"name": "FLOWER_ADDRESS", "value": "0.0.0.0"}]
    spec, policy = added["PodMonitor"]["spec"], added["NetworkPolicy"]["spec"]
    assert (
        spec["selector"] == policy["podSelector"] == {"matchLabels": flower["metadata"]["labels"]}
    )
    assert flower["metadata"]["labels"][spec["jobLabel"]] == "flower"  # as the alerts call it
    assert [each["port"] for each in spec["podMetricsEndpoints"]] == [port["name"]]
    assert [ports([rule]) for rule in policy["ingress"]] == [{("TCP", port["containerPort"])}]
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {("Deployment", "flower")}


def test_pods_have_the_certificate_authority_of_the_overlay(bake):
    project = bake(deployment="kubernetes")
    lines = "# (- name: ca) .*\n  #   (files.*)\n"
    project.edit(f"{PRODUCTION}/kustomization.yaml", lines, r"\1\n    \2\n")
    (project / PRODUCTION / "ca.crt").write_text("a certificate")
    documents = manifests(project)
    config = of_kind("ConfigMap", documents)
    [name] = [name for name, each in config.items() if "ca.crt" in each["data"]]
    for key, spec in pods(documents).items():
        [volume] = [each for each in spec["volumes"] if "configMap" in each]
        assert volume["configMap"]["name"] == name, key
        for container in spec["containers"] + spec["initContainers"]:
            assert {"name": volume["name"], "mountPath": "/ca"} in container["volumeMounts"], key


@pytest.fixture(scope="module")
def monitored(cookies_session):
    """A project after step 4 of the page, and what only this step adds: {kind: document}."""
    project = baked(cookies_session, {**WITH_JOBS, "deployment": "kubernetes"})
    before, after, added = add_monitoring(project)
    assert before.items() <= after.items()
    return project, added, {kind: each for (kind, _), each in before.items()}


# What we use of the operator's resources; their schemas are not in kubernetes-validate.
ENDPOINT = {"port", "path", "interval", "authorization", "relabelings"}


def test_the_operator_finds_the_metrics_and_the_alerts(monitored):
    project, added, documents = monitored
    assert set(added) == {"ServiceMonitor", "PrometheusRule", "NetworkPolicy", "ConfigMap"}
    [namespace] = {each["metadata"]["namespace"] for each in added.values()}
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert added[kind]["apiVersion"] == "monitoring.coreos.com/v1"
    for kind in ("NetworkPolicy", "ConfigMap"):
        kubernetes_validate.validate(added[kind], "1.37", strict=True)

    spec, service = added["ServiceMonitor"]["spec"], documents["Service"]
    assert set(spec) == {"selector", "endpoints"}
    assert spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    [endpoint] = spec["endpoints"]
    assert set(endpoint) == ENDPOINT and endpoint["path"] == "/metrics"
    [port] = service["spec"]["ports"]
    assert endpoint["port"] == port["name"]
    assert endpoint["authorization"]["type"] == "Token"
    credentials = endpoint["authorization"]["credentials"]
    page = project.read("docs/production.md")
    stored = re.search("create secret generic (.+?) .* --from-literal=(.+?)=TOKEN", page)
    assert credentials == {"name": stored[1], "key": stored[2]}

    policy, web = added["NetworkPolicy"]["spec"], {"matchLabels": {"app": "web"}}
    [rule] = policy["ingress"]
    assert policy["podSelector"] == web and ports([rule]) == {("TCP", port["targetPort"])}
    assert rule["from"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    ]
    alerts = yaml.safe_load((project / MONITORING / "alerts.yml").read_text())
    assert without_namespace(added["PrometheusRule"]) == alerts
    assert added["ConfigMap"]["metadata"]["labels"] == {"grafana_dashboard": "1"}
    [(name, text)] = added["ConfigMap"]["data"].items()
    assert text == (project / MONITORING / name).read_text()


def test_prometheus_asks_the_service_and_not_each_pod(monitored, tmp_path):
    """Its name is an allowed host, a pod's address is none; and each pod has the same numbers."""
    _, added, documents = monitored
    [endpoint] = added["ServiceMonitor"]["spec"]["endpoints"]
    names = {"targetLabel": "target_label", "sourceLabels": "source_labels"}
    rules = [
        {names.get(key, key): value for key, value in rule.items()}
        for rule in endpoint["relabelings"]
    ]
    namespace = added["ServiceMonitor"]["metadata"]["namespace"]
    pods = [  # as the operator lets Prometheus find them
        {
            "targets": [f"10.0.0.{number}:8000"],
            "labels": {
                "__meta_kubernetes_namespace": namespace,
                "namespace": namespace,
                "service": "web",
                "pod": f"web-{number}",
                "container": "app",
            },
        }
        for number in (1, 2)
    ]
    job = {"job_name": "web", "static_configs": pods, "relabel_configs": rules}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [job]}))
    printed = promtool("check", "service-discovery", "prometheus.yml", "web", cwd=tmp_path)
    found = [each["labels"] for each in json.loads(printed)]
    assert len(found) == 2 and found[0] == found[1]  # so Prometheus has one target
    host, port = found[0]["instance"].split(":")
    [service_port] = documents["Service"]["spec"]["ports"]
    assert int(port) == service_port["port"]
    assert host.split(".") == [documents["Service"]["metadata"]["name"], namespace, "svc"]


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_flower_has_no_default_password(render, broker):
    _, documents = render(broker=broker)
    secret = only("Secret", documents)["data"]
    has_flower = ("Deployment", "flower") in documents
    assert secret.get("FLOWER_BASIC_AUTH") == ("" if has_flower else None)


def test_each_process_has_the_same_time_to_stop(render):
    """In a pod, in a container and under a supervisor: more than the process itself takes."""
    project, documents = render()
    soft = re.search(r'"SOFT_SHUTDOWN_SECONDS", (\d+)', project.read("config/settings.py"))
    page = (TEMPLATE / "templates/deployment/none.md").read_text()
    seconds = int(re.search(r"TimeoutStopSec=(\d+)", page)[1])
    assert seconds >= int(soft[1]) + 10
    compose = yaml.safe_load(project.read("compose.yaml"))["x-app"]
    assert compose["stop_grace_period"] == f"{seconds}s"
    for key, spec in pods(documents).items():
        assert spec["terminationGracePeriodSeconds"] == seconds, key
    [web] = pods(documents)["Deployment", "web"]["containers"]
    graceful = 30  # gunicorn's default
    assert web["lifecycle"]["preStop"]["sleep"]["seconds"] + graceful < seconds


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_the_commands_of_the_page_name_what_exists(render, broker):
    project, documents = render(broker=broker)
    commands = re.findall("kubectl [^`\n]+", project.read("docs/production.md"))
    assert commands
    [namespace] = {each["metadata"]["namespace"] for each in documents.values()}
    for command in commands:
        for named in re.findall("namespace ([a-z-]+)", command):
            assert named == namespace, command
        for kind, name in re.findall("(deployment|job)[/ ]([a-z-]+)", command):
            assert (kind.capitalize(), name) in documents, command
        for folder in re.findall(" -k (.+)", command):
            assert folder == PRODUCTION
        if port := re.search("port-forward .* ([0-9]+)$", command):
            [flower] = pods(documents)["Deployment", "flower"]["containers"]
            assert [int(port[1])] == [each["containerPort"] for each in flower["ports"]]


def test_the_ingress_of_the_page_finds_the_web_server(bake):
    """In the overlay, as the page says; the policy admits its controller."""
    project = bake(deployment="kubernetes")
    (project / PRODUCTION / "ingress.yaml").write_text(
        code(project.read("docs/production.md"), "kind: Ingress")
    )
    project.append(f"{PRODUCTION}/kustomization.yaml", "resources: [../../base, ingress.yaml]\n")
    listed = project.read(f"{PRODUCTION}/kustomization.yaml")
    listed = listed.replace("resources:\n  - ../../base\n", "")
    (project / PRODUCTION / "kustomization.yaml").write_text(listed)
    documents = manifests(project)
    ingress = only("Ingress", documents)
    kubernetes_validate.validate(ingress, "1.37", strict=True)
    [rule] = ingress["spec"]["rules"]
    [path] = rule["http"]["paths"]
    backend = path["backend"]["service"]
    service = documents["Service", backend["name"]]["spec"]
    assert backend["port"]["name"] in {port["name"] for port in service["ports"]}
    assert f"ALLOWED_HOSTS={rule['host']}" in listed


def test_the_image_and_the_hosts_are_in_one_file(bake):
    """And the values of the Secret in another one, which Git ignores.

    A changed value changes the name of its ConfigMap or Secret, and so restarts all pods.
    """
    project = bake(durable_jobs="yes", deployment="kubernetes")
    overlay, before = project / PRODUCTION, manifests(project)
    text = (overlay / "kustomization.yaml").read_text()
    image = re.search("newName: (.+)\n.*newTag: (.+)\n", text)
    text = text.replace(image[1], "ghcr.io/tea/shop").replace(image[2], "'7'")
    (overlay / "kustomization.yaml").write_text(text.replace("=example.com", "=tea.example"))
    values = (overlay / ".env.example").read_text()
    (overlay / ".env").write_text(values.replace("SECRET_KEY=", "SECRET_KEY=tea"))
    documents = manifests(project)
    for spec in pods(documents).values():
        containers = spec["containers"] + spec.get("initContainers", [])
        assert {each["image"] for each in containers} == {"ghcr.io/tea/shop:7"}
    assert {kind for kind, name in documents.keys() - before.keys()} == {"ConfigMap", "Secret"}
    data = {kind: each["data"] for (kind, _), each in documents.items() if "data" in each}
    assert data["ConfigMap"]["ALLOWED_HOSTS"] == "tea.example"
    assert base64.b64decode(data["Secret"]["SECRET_KEY"]) == b"tea"

    project.call("git", "init", "--quiet")
    tracked = project.call("git", "ls-files", "--others", "--exclude-standard").split()
    assert f"{PRODUCTION}/.env.example" in tracked
    assert f"{PRODUCTION}/.env" not in tracked


# Makes jobs in every state, more for each next queue, and prints the metrics. A limit blocks
# some of them, and one of their tasks is paused.
JOBS = """
from datetime import timedelta
from uuid import uuid4
from django.utils import timezone
from durable_jobs import pauses
from durable_jobs.contrib.prometheus import Collector
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from orders.tasks import mail_summary, write_report
blocked, paused = {"times_sent": 0, "send_at": None}, {"task": mail_summary.name}
running = {"state": "running", "run_token": uuid4(), "send_at": None}
running["lease_ends_at"] = timezone.now() + timedelta(seconds=30)
for number, queue in enumerate(["celery", "cpu", "io", "unknown"], start=1):
    for _ in range(number):
        for countdown in (0, 3600):
            enqueue(write_report, [1], queue=queue, countdown=countdown)
        for changes in (
            {"times_sent": 0, "send_at": timezone.now() - timedelta(seconds=9)},  # a due countdown
            running,
            {**blocked, "blocked_by": "tenant:7"},
            {**paused, **blocked, "blocked_by": "tenant:7"},
            paused,
            {**paused, "times_sent": 0, "send_at": timezone.now() - timedelta(seconds=9)},
            {**paused, **running},
            *({"state": state, "send_at": None, "finished_at": timezone.now()}
              for state in ("succeeded", "failed", "cancelled")),
        ):
            job = enqueue(write_report, [1], queue=queue)
            Job.objects.filter(pk=job.pk).update(**changes)
pauses.pause(mail_summary.name)
for family in Collector().collect():
    for sample in family.samples:
        print(sample.name, *sample.labels.values(), sample.value)
"""


def test_the_queries_that_scale_workers_count_waiting_and_running_jobs(render, database):
    """Each counts those of its queue that a worker can run now, as the metrics do."""
    project, documents = render()
    project.install()
    url = database.create(f"keda_{uuid4().hex}")
    variables = {"DATABASE_URL": url, "CELERY_BROKER_URL": "memory://"}
    project.manage("migrate", "-v0", **variables)
    printed = project.manage("shell", "-v0", "-c", JOBS, **variables)
    metrics = re.findall(r"^(durable_jobs_(?:waiting|running)) (\w+) (\d+)", printed, re.M)
    queries = {
        name: each["spec"]["triggers"][0]["metadata"]["query"]
        for name, each in of_kind("ScaledObject", documents).items()
    }
    psql = [database.binaries / "psql", "-tA", url, "-c"]
    for number, queue in enumerate(("celery", "cpu", "io"), start=1):
        command = [*psql, queries[f"worker-{queue}"]]
        count = int(subprocess.run(command, capture_output=True, check=True).stdout)
        assert count == sum(int(value) for _, name, value in metrics if name == queue)
        assert count == 4 * number
    printed = project.manage("durable_jobs", "pause", "io", "--reason", "SMTP is down", **variables)
    assert re.search(r"^io: Paused since .*: SMTP is down$", printed, re.M)
    counts = subprocess.run([*psql, queries["worker-io"]], capture_output=True, check=True).stdout
    assert int(counts) == 2 * 3  # those that run


UPLOAD = """
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
print("stored as", default_storage.save("tea.csv", ContentFile("Assam")))
"""
READ = """
from django.core.files.storage import default_storage
print(default_storage.open("tea.csv").read())
"""
BUCKET = "import boto3; boto3.client('s3').create_bucket(Bucket='uploads')"


@pytest.fixture
def moto(engine):
    """A stand-in for SQS and S3, in a container; its address there."""
    container = docker("run", "--detach", PINNED.moto)
    address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    url = f"http://{docker('inspect', '--format', address, container)}:5000"
    try:
        wait_for(lambda: responds(f"{url}/moto-api/data.json"))
        yield url
    finally:
        docker("rm", "--force", container)


@pytest.fixture(params=CHOICES["durable_jobs"])
def uploading(request, engine, bake):
    """A project on SQS with the package and the settings that the page names for S3, built."""
    answers = {"broker": "sqs", "result_backend": "none", "deployment": "kubernetes"}
    slug = f"uploads_{request.param}"
    project = bake(durable_jobs=request.param, project_slug=slug, **answers)
    page = project.read("docs/production.md")
    project.run(
        "uv", "add", "--quiet", "--frozen", re.search('uv add "(django-storages.+?)"', page)[1]
    )
    if request.param == "no":  # with durable jobs, the settings have it
        project.edit("config/settings.py", r"(?=^# Database)", code(page, "S3_BUCKET"))
    project.call("docker", "build", "--quiet", "--tag", slug, ".")
    yield project
    docker("image", "rm", "--force", slug)
    docker("volume", "rm", "--force", f"{slug}-media")


def test_pods_store_uploads_in_their_volume_or_in_s3(uploading, moto):
    """With the rights and the volumes of the manifests: the root of a container is read-only."""
    documents = manifests(uploading)
    config, secret = (only(kind, documents)["data"] for kind in ("ConfigMap", "Secret"))
    secret = {name: base64.b64decode(value).decode() for name, value in secret.items()}
    variables = {**config, **secret, "SECRET_KEY": uuid4().hex * 2}
    variables |= {"AWS_ENDPOINT_URL": moto, "AWS_DEFAULT_REGION": "us-east-1"}
    variables |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

    def run(pod, python, bucket):
        spec = pods(documents)["Deployment", pod]
        [container] = spec["containers"]
        options = ["--rm", *options_of(spec, container, uploading.name)]
        own = {each["name"]: each["value"] for each in container.get("env", [])}
        for name, value in {**variables, **own, "S3_BUCKET": bucket}.items():
            options += ["--env", f"{name}={value}"]
        shell = "python", "manage.py", "shell", "-v0", "-c", python
        return docker("run", *options, uploading.name, *shell)

    assert run("web", UPLOAD, bucket="") == "stored as tea.csv"
    assert run("worker-celery", READ, bucket="") == "b'Assam'"
    uploading.edit(f"{PRODUCTION}/kustomization.yaml", "  - ../../uploads.*\n", "")
    documents = manifests(uploading)
    with pytest.raises(AssertionError, match="Read-only file system"):
        run("web", UPLOAD, bucket="")
    assert run("web", BUCKET + UPLOAD, bucket="uploads") == "stored as tea.csv"
    assert run("worker-celery", READ, bucket="uploads") == "b'Assam'"
