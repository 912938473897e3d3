"""The manifests of plain outputs: valid, and KEDA finds the queues of the broker."""

import base64
import re
import subprocess
from functools import cache
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml
from kombu import Connection

from harness import servers
from harness.bake import CHOICES, DEFAULTS, baked, chosen, covering, product
from harness.kustomize import PRODUCTION, autoscaler, manifests, of_kind, only
from harness.outputs import outputs
from harness.project import started

OPTIONS = ("broker", "result_backend", "worker_pool", "include_example", "periodic_tasks")
ANSWERS = covering(product({option: CHOICES[option] for option in OPTIONS}), size=2)
QUEUES = {"yes": {"celery", "cpu", "io"}, "no": {"celery"}}  # with the example, and without
TRIGGERS = {  # what we use of KEDA's
    "redis": {
        *("addressFromEnv", "passwordFromEnv", "enableTLS", "databaseIndex"),
        *("listName", "listLength"),
    },
    "rabbitmq": {"hostFromEnv", "queueName", "mode", "value"},
    "aws-sqs-queue": {"queueURLFromEnv", "queueLength"},
}


@pytest.fixture(scope="module")
def render(cookies_session):
    """Return a function: it bakes a project, and returns {(kind, name): document}."""

    @cache
    def render(**answers):
        return manifests(baked(cookies_session, {"deployment": "kubernetes", **answers}))

    return render


def container_of(deployment):
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize(
    "answers", ANSWERS, ids=lambda answers: "-".join(map(str, answers.values()))
)
def test_the_manifests_are_valid(render, answers):
    documents = render(**answers)
    for (kind, name), document in documents.items():
        if kind == "TriggerAuthentication":
            continue
        kubernetes_validate.validate(
            autoscaler(document) if kind == "ScaledObject" else document, "1.37", strict=True
        )
        assert "prometheus" not in yaml.safe_dump(document).lower(), name

    chose = chosen(**answers)
    deployments, scaled = of_kind("Deployment", documents), of_kind("ScaledObject", documents)
    workers = {f"worker-{queue}" for queue in QUEUES[answers["include_example"]]}
    assert set(scaled) == workers
    others = {"web", "beat", *(["flower"] if chose.has_flower else [])}
    assert set(deployments) == workers | others
    for name in workers:
        check_workers(name, documents)
    for name in deployments:
        check_container(deployments[name])
    beat = deployments["beat"]
    assert (beat["spec"]["replicas"], beat["spec"]["strategy"]) == (1, {"type": "Recreate"})
    # With a schedule in the database, Beat writes no file that would tell that it is alive.
    assert ("livenessProbe" in container_of(beat)) == (not chose.has_schedule_table)


def check_container(deployment):
    container = container_of(deployment)
    rights = container["securityContext"]
    assert deployment["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]
    assert deployment["spec"]["template"]["spec"]["serviceAccountName"] == "my-project"
    assert not rights["allowPrivilegeEscalation"] and rights["readOnlyRootFilesystem"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["requests"] and container["resources"]["limits"]


def check_workers(name, documents):
    """Check that the worker of a queue scales with this queue, from one worker on."""
    spec = documents["ScaledObject", name]["spec"]
    assert spec["scaleTargetRef"] == {"name": name}
    assert spec["minReplicaCount"] == 1
    queue = name.removeprefix("worker-")
    container = container_of(documents["Deployment", name])
    assert container["command"][-2:] == ["--queues", queue]
    [trigger] = spec["triggers"]
    metadata = trigger["metadata"]
    assert set(metadata) == TRIGGERS[trigger["type"]]
    [concurrency] = [e["value"] for e in container["env"] if e["name"] == "WORKER_CONCURRENCY"]
    [tasks] = [metadata[key] for key in ("listLength", "value", "queueLength") if key in metadata]
    assert tasks == concurrency
    if reference := trigger.get("authenticationRef"):
        authentication = documents["TriggerAuthentication", reference["name"]]["spec"]
        assert authentication["podIdentity"] == {"provider": "aws"}
        [parameter] = authentication["env"]
        assert parameter["parameter"] == "awsRegion"
        assert parameter["containerName"] == container["name"]
        assert parameter["name"] in variables(container, documents)
    for key, value in metadata.items():
        if key.endswith("FromEnv"):
            assert value in variables(container, documents)


def variables(container, documents):
    """Return the variables of a container, as KEDA and a kubelet read them."""
    secret, config = only("Secret", documents)["data"], only("ConfigMap", documents)["data"]
    found = {name: base64.b64decode(value).decode() for name, value in secret.items()} | config
    for each in container["env"]:
        found[each["name"]] = re.sub(r"\$\((\w+)\)", lambda name: found[name[1]], each["value"])
    return found


def test_kedas_variables_name_the_redis_of_the_broker(render):
    documents = render(broker="redis")
    container = container_of(documents["Deployment", "worker-celery"])
    [trigger] = documents["ScaledObject", "worker-celery"]["spec"]["triggers"]
    metadata, found = trigger["metadata"], variables(container, documents)
    url = urlsplit(found["CELERY_BROKER_URL"])
    assert found[metadata["addressFromEnv"]] == f"{url.hostname}:{url.port}"
    assert found[metadata["passwordFromEnv"]] == url.password
    assert metadata["enableTLS"] == str(url.scheme == "rediss").lower()
    assert metadata["databaseIndex"] == url.path.strip("/")


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_a_cluster_without_keda_needs_only_one_line_less(bake, broker):
    project = bake(broker=broker, deployment="kubernetes")
    with_keda = manifests(project)
    project.edit(f"{PRODUCTION}/kustomization.yaml", "^components: .*\n", "")
    without = manifests(project)
    assert {key: with_keda[key] for key in without} == without
    kinds = {each["apiVersion"].split("/")[0] for each in without.values()}
    assert "keda.sh" not in kinds
    left_out = [each["apiVersion"] for key, each in with_keda.items() if key not in without]
    assert left_out and set(left_out) == {"keda.sh/v1alpha1"}


UPLOAD = """
from django.db import models
from django.test import override_settings
from api.checks import check_uploads

class Report(models.Model):
    file = models.FileField()

    class Meta:
        app_label = "users"

for folder in "", "media", "/srv/media":
    with override_settings(MEDIA_ROOT=folder):
        print("found", len([*check_uploads(None)]))
Report._meta.get_field("file").storage = type("S3", (), {"location": ""})()
print("found", len([*check_uploads(None)]))
"""


SEND = """
from orders.tasks import forecast_demand
for number, queue in enumerate(["celery", "cpu", "io"], 1):
    for _ in range(number):
        forecast_demand.apply_async(["Tea", "root@example.com"], queue=queue)
"""
ADDRESS = """
from django.conf import settings
print(settings.CELERY_BROKER_TRANSPORT_OPTIONS["predefined_queues"]["{queue}"]["url"])
"""
MESSAGES = """
import boto3
url = "{url}"
attributes = "ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"
found = boto3.client("sqs").get_queue_attributes(QueueUrl=url, AttributeNames=attributes)
print(sum(map(int, found["Attributes"].values())))
"""


def in_redis(project, metadata, found, here):
    place = f"-p {urlsplit(here['CELERY_BROKER_URL']).port} -n {metadata['databaseIndex']}"
    command = ["redis-cli", *place.split(), "llen", metadata["listName"]]
    return int(subprocess.check_output(command, text=True))


def in_rabbitmq(project, metadata, found, here):
    assert metadata["mode"] == "QueueLength"
    with Connection(here[metadata["hostFromEnv"]]) as connection:
        queue = connection.default_channel.queue_declare(metadata["queueName"], passive=True)
        return queue.message_count


def in_sqs(project, metadata, found, here):
    """Of the queue that production's settings name. moto has it at another host."""
    url, queue = found[metadata["queueURLFromEnv"]], metadata["queue"]
    aws = {name: value for name, value in found.items() if name.startswith("AWS_")}
    code = ADDRESS.format(queue=queue)
    assert project.shell(code, **{**here, **aws, "AWS_ENDPOINT_URL": ""}) == url
    address = project.shell(code, **here)
    assert address.rsplit("/")[-1] == url.rsplit("/")[-1]
    return int(project.shell(MESSAGES.format(url=address), **here))


COUNTS = {"redis": in_redis, "rabbitmq": in_rabbitmq, "aws-sqs-queue": in_sqs}


KUBERNETES = {**DEFAULTS, "result_backend": "none", "deployment": "kubernetes"}


@outputs({**KUBERNETES, "broker": "redis"})
def test_uploads_that_the_read_only_root_refuses_are_found(project):
    printed = project.manage("shell", "-v0", "-c", UPLOAD)
    assert re.findall("found ([0-9])", printed) == ["1", "1", "0", "0"]


@outputs(*({**KUBERNETES, "broker": broker} for broker in CHOICES["broker"]))
def test_keda_finds_the_tasks_that_wait_in_each_queue(project, tmp_path):
    """On a real broker, asked as KEDA does. No worker runs."""
    used, documents = servers.servers_of(project, tmp_path), manifests(project)
    with started(*used):
        here = servers.variables_of(used, project)
        project.manage("shell", "-v0", "-c", SEND, **here)
        for number, queue in enumerate(["celery", "cpu", "io"], 1):
            container = container_of(documents["Deployment", f"worker-{queue}"])
            [trigger] = documents["ScaledObject", f"worker-{queue}"]["spec"]["triggers"]
            metadata, found = trigger["metadata"], variables(container, documents)
            count = COUNTS[trigger["type"]]
            assert count(project, {**metadata, "queue": queue}, found, here) == number, queue
