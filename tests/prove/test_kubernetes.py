"""The manifests of outputs, rendered as by `kubectl apply -k` and validated by the schema."""

import base64
import itertools
import re
import shutil
import subprocess
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from harness import missing
from harness.bake import CHOICES

PRODUCTION = "deploy/kubernetes/overlays/production"
OPTIONS = ("broker", "result_backend", "worker_pool", "include_example")
ANSWERS = [
    dict(zip(OPTIONS, values, strict=True))
    for values in itertools.product(*(CHOICES[option] for option in OPTIONS))
]


@pytest.fixture
def render(bake):
    """Return a function: it bakes a project, and returns it and {(kind, name): document}."""
    if not shutil.which("kubectl"):
        missing("kubectl is not installed")

    def render(**answers):
        project = bake(deployment="kubernetes", **answers)
        shutil.copy(project / PRODUCTION / ".env.example", project / PRODUCTION / ".env")
        documents = yaml.safe_load_all(project.call("kubectl", "kustomize", PRODUCTION))
        return project, {(each["kind"], each["metadata"]["name"]): each for each in documents}

    return render


def pods(documents):
    """Return the specifications of all pods, {(kind, name): spec}."""
    return {
        key: document["spec"]["template"]["spec"]
        for key, document in documents.items()
        if key[0] in ("Deployment", "Job")
    }


@pytest.mark.parametrize(
    "answers", ANSWERS, ids=lambda answers: "-".join(map(str, answers.values()))
)
def test_the_manifests_are_valid(render, answers):
    project, documents = render(**answers)
    for (kind, _), document in documents.items():
        if kind != "ScaledObject":  # KEDA's own, not in the schema
            kubernetes_validate.validate(document, "1.37", strict=True)

    for key, spec in pods(documents).items():
        check_pod(spec, documents, key)
    queues = re.search(r"WORKER_QUEUES = \[(.*)\]", project.read("config/settings.py"))[1]
    queues = re.findall(r"\w+", queues)
    assert {f"worker-{queue}" for queue in queues} == {
        name for kind, name in documents if kind == "ScaledObject"
    }
    for queue in queues:
        check_workers(queue, documents)
    beat = documents["Deployment", "beat"]["spec"]
    assert (beat["replicas"], beat["strategy"]) == (1, {"type": "Recreate"})
    assert ("Deployment", "flower") in documents or "flower" not in project.read("Procfile")


def check_pod(spec, documents, key):
    assert spec["securityContext"]["runAsNonRoot"], key
    assert spec["terminationGracePeriodSeconds"] > 30, key
    for container in spec["containers"]:
        assert container["resources"]["requests"] and container["resources"]["limits"], key
    for container in spec["containers"] + spec.get("initContainers", []):
        sources = {
            kind: source["name"] for each in container["envFrom"] for kind, source in each.items()
        }
        assert ("ConfigMap", sources["configMapRef"]) in documents, key
        assert ("Secret", sources["secretRef"]) in documents, key
        rights = container["securityContext"]
        assert not rights["allowPrivilegeEscalation"] and rights["readOnlyRootFilesystem"], key
        assert rights["capabilities"] == {"drop": ["ALL"]}, key
        assert container["image"].startswith("registry.example.com/"), key


def check_workers(queue, documents):
    """Check that this queue has a Deployment, which scales with the jobs of this queue."""
    spec = documents["ScaledObject", f"worker-{queue}"]["spec"]
    [container] = pods(documents)["Deployment", spec["scaleTargetRef"]["name"]]["containers"]
    assert container["command"][-2:] == ["--queues", queue]
    [trigger] = spec["triggers"]
    assert f"queue = '{queue}'" in trigger["metadata"]["query"]
    concurrency = {each["name"]: each["value"] for each in container["env"]}
    assert concurrency == {"WORKER_CONCURRENCY": trigger["metadata"]["targetQueryValue"]}


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_production_has_every_variable_that_it_needs(render, broker):
    project, documents = render(broker=broker)
    [config] = [each["data"] for (kind, _), each in documents.items() if kind == "ConfigMap"]
    [secret] = [each["data"] for (kind, _), each in documents.items() if kind == "Secret"]
    [needed] = re.findall("^# Production needs.*?\n\n", project.read(".env.example"), re.M | re.S)
    assert {"SECRET_KEY", *re.findall("^# ([A-Z_]+)=", needed, re.M)} <= {*config, *secret}


def test_the_probes_send_an_allowed_host(render):
    _, documents = render()
    [config] = [each["data"] for (kind, _), each in documents.items() if kind == "ConfigMap"]
    [web] = pods(documents)["Deployment", "web"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        [header] = web[probe]["httpGet"]["httpHeaders"]
        assert header["name"] == "Host"
        assert header["value"] in config["ALLOWED_HOSTS"].split(",")


def ports(rules):
    return {(port.get("protocol", "TCP"), port["port"]) for rule in rules for port in rule["ports"]}


@pytest.mark.parametrize("result_backend", CHOICES["result_backend"])
@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_the_network_policies_open_only_needed_ports(render, broker, result_backend):
    _, documents = render(broker=broker, result_backend=result_backend)
    policies = {name: each["spec"] for (kind, name), each in documents.items() if "Policy" in kind}

    everybody = policies["all"]
    assert everybody["podSelector"] == {}
    assert set(everybody["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in everybody
    # The ports of the servers in .env. Amazon's services have no URL there: they use 443.
    [secret] = [each["data"] for (kind, _), each in documents.items() if kind == "Secret"]
    values = {name: base64.b64decode(value).decode() for name, value in secret.items()}
    urls = {name: urlsplit(value) for name, value in values.items() if "://" in value}
    mail = urls.pop("EMAIL_URL")
    needed = {("TCP", url.port or 443) for url in urls.values()}
    needed |= {("TCP", 443)} if any(name.startswith("AWS_") for name in values) else set()
    assert ports(everybody["egress"]) == needed | {("UDP", 53), ("TCP", 53)}
    [names] = [rule for rule in everybody["egress"] if ("UDP", 53) in ports([rule])]
    assert names["to"]

    [ingress] = [spec["ingress"] for spec in policies.values() if "ingress" in spec]
    assert policies["web"]["podSelector"] == {"matchLabels": {"app": "web"}}
    [rule] = ingress
    assert rule["from"] and ports([rule]) == {("TCP", 8000)}
    [service] = [each["spec"] for (kind, _), each in documents.items() if kind == "Service"]
    assert service["ports"][0]["targetPort"] == 8000

    [workers] = policies["workers"]["podSelector"]["matchExpressions"]
    assert {f"worker-{queue}" for queue in ("celery", "cpu", "io")} == set(workers["values"])
    assert ports(policies["workers"]["egress"]) == {("TCP", mail.port)}


def test_the_io_queue_reaches_other_services_over_https(render):
    _, documents = render()
    assert ports(documents["NetworkPolicy", "worker-io"]["spec"]["egress"]) == {("TCP", 443)}
    _, documents = render(include_example="no")
    assert ("NetworkPolicy", "worker-io") not in documents


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_flower_has_no_default_password(render, broker):
    _, documents = render(broker=broker)
    [secret] = [each["data"] for (kind, _), each in documents.items() if kind == "Secret"]
    if ("Deployment", "flower") not in documents:
        assert "FLOWER_BASIC_AUTH" not in secret
        return
    assert not secret["FLOWER_BASIC_AUTH"]
    [container] = pods(documents)["Deployment", "flower"]["containers"]
    shell, option, script = container["command"]
    assert "--address=127.0.0.1" in script
    for password, starts in (("", False), ("admin:secret", True)):
        script = script.replace("exec celery", "echo started")
        result = subprocess.run([shell, option, script], env={"FLOWER_BASIC_AUTH": password})
        assert (result.returncode == 0) == starts


def test_no_pod_can_fill_the_disk_of_its_node(render):
    _, documents = render()
    for key, spec in pods(documents).items():
        for volume in spec["volumes"]:
            assert volume["emptyDir"]["sizeLimit"], key
