"""The manifests of outputs: rendered as `kubectl apply -k` does, and held to the schema."""

import itertools
import re
import shutil

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
    """Render the manifests for these answers, {(kind, name): document}."""
    if not shutil.which("kubectl"):
        missing("kubectl is not installed")

    def render(**answers):
        project = bake(deployment="kubernetes", **answers)
        shutil.copy(project / PRODUCTION / ".env.example", project / PRODUCTION / ".env")
        documents = yaml.safe_load_all(project.call("kubectl", "kustomize", PRODUCTION))
        return project, {(each["kind"], each["metadata"]["name"]): each for each in documents}

    return render


def pods(documents):
    """The specifications of all pods, {(kind, name): spec}."""
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
        if kind != "ScaledObject":  # KEDA's own
            kubernetes_validate.validate(document, "1.37", strict=True)

    for key, spec in pods(documents).items():
        check_pod(spec, documents, key)
    queues = re.search("--queues (.*)", project.read("Procfile"))[1].split(",")
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
    """The Deployment of a queue, and that its size follows this queue's jobs."""
    spec = documents["ScaledObject", f"worker-{queue}"]["spec"]
    [container] = pods(documents)["Deployment", spec["scaleTargetRef"]["name"]]["containers"]
    assert container["command"][-2:] == ["--queues", queue]
    [trigger] = spec["triggers"]
    assert f"queue = '{queue}'" in trigger["metadata"]["query"]
    concurrency = {each["name"]: each["value"] for each in container["env"]}
    assert concurrency == {"WORKER_CONCURRENCY": trigger["metadata"]["targetQueryValue"]}


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_production_lacks_no_variable(render, broker):
    project, documents = render(broker=broker)
    [config] = [each["data"] for (kind, _), each in documents.items() if kind == "ConfigMap"]
    [secret] = [each["data"] for (kind, _), each in documents.items() if kind == "Secret"]
    [needed] = re.findall("^# Production needs.*?\n\n", project.read(".env.example"), re.M | re.S)
    assert {"SECRET_KEY", *re.findall("^# ([A-Z_]+)=", needed, re.M)} <= {*config, *secret}


def test_the_probes_ask_for_an_allowed_host(render):
    _, documents = render()
    [config] = [each["data"] for (kind, _), each in documents.items() if kind == "ConfigMap"]
    [web] = pods(documents)["Deployment", "web"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        [header] = web[probe]["httpGet"]["httpHeaders"]
        assert header["name"] == "Host"
        assert header["value"] in config["ALLOWED_HOSTS"].split(",")
