"""The manifests of plain outputs: KEDA finds the queues of the broker."""

import base64
import re
import subprocess
from urllib.parse import urlsplit

import pytest
from kombu import Connection

from harness import servers
from harness.bake import CHOICES, DEFAULTS
from harness.kustomize import PRODUCTION, manifests, only, pods
from harness.outputs import outputs
from harness.project import started


def variables(container, documents):
    """Return the variables of a container, as KEDA and a kubelet read them."""
    secret, config = only("Secret", documents)["data"], only("ConfigMap", documents)["data"]
    found = {name: base64.b64decode(value).decode() for name, value in secret.items()} | config
    for each in container["env"]:
        found[each["name"]] = re.sub(r"\$\((\w+)\)", lambda name: found[name[1]], each["value"])
    return found


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_a_cluster_without_keda_needs_only_one_line_less(bake, broker):
    project = bake(broker=broker, deployment="kubernetes")
    with_keda = manifests(project)
    project.edit(f"{PRODUCTION}/kustomization.yaml", "  - ../../keda .*\n", "")
    without = manifests(project)
    assert {key: with_keda[key] for key in without} == without
    kinds = {each["apiVersion"].split("/")[0] for each in without.values()}
    assert "keda.sh" not in kinds
    left_out = [each["apiVersion"] for key, each in with_keda.items() if key not in without]
    assert left_out and set(left_out) == {"keda.sh/v1alpha1"}


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
    url = urlsplit(found["CELERY_BROKER_URL"])
    assert found[metadata["addressFromEnv"]] == f"{url.hostname}:{url.port}"
    assert found[metadata["passwordFromEnv"]] == url.password
    assert metadata["enableTLS"] == str(url.scheme == "rediss").lower()
    assert metadata["databaseIndex"] == url.path.strip("/")
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


@outputs(*({**KUBERNETES, "broker": broker} for broker in CHOICES["broker"]))
def test_keda_finds_the_tasks_that_wait_in_each_queue(project, tmp_path):
    """On a real broker, asked as KEDA does. No worker runs."""
    used, documents = servers.servers_of(project, tmp_path), manifests(project)
    with started(*used):
        here = servers.variables_of(used, project)
        project.manage("shell", "-v0", "-c", SEND, **here)
        for number, queue in enumerate(["celery", "cpu", "io"], 1):
            [container] = pods(documents)["Deployment", f"worker-{queue}"]["containers"]
            [trigger] = documents["ScaledObject", f"worker-{queue}"]["spec"]["triggers"]
            metadata, found = trigger["metadata"], variables(container, documents)
            count = COUNTS[trigger["type"]]
            assert count(project, {**metadata, "queue": queue}, found, here) == number, queue
