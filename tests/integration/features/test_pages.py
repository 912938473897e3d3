"""A reader can type what the output's pages show: each block runs as it stands there."""

from functools import partial

import pytest

from harness.bake import CHOICES, DEFAULTS, WITH_JOBS, render
from harness.blocks import Reader, code
from harness.outputs import outputs
from harness.project import connects, free_ports, started

# Makes queues with the template, then the rest as `make queues` does, which must not change these.
QUEUES = """
import json
import os
import boto3
import dev

sqs = boto3.client("sqs")

def queues():
    found = {}
    for url in sqs.list_queues()["QueueUrls"]:
        known = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        redrive = json.loads(known.get("RedrivePolicy", "{}"))
        found[url] = known["VisibilityTimeout"], known["MessageRetentionPeriod"], redrive
    return found

formation = boto3.Session().client("cloudformation")  # without the time limits of the project
formation.create_stack(StackName="pages", TemplateBody=os.environ["TEMPLATE"])
made = queues()
dev.create_queues()
own = queues()
assert made == {url: own[url] for url in made}, f"{made}, {own}"
names = [sorted(url.rsplit("-")[-1] for url in urls) for urls in (made, own.keys() - made.keys())]
print("/".join(map(",".join, names)))
"""
# Makes the table with the template, and keeps a result in it. Prints the actions that this needs.
TABLE = """
import os
import re
import boto3
import yaml
from celery.result import AsyncResult
from config.celery import app

template = os.environ["TEMPLATE"]
dynamodb = boto3.client("dynamodb")
boto3.Session().client("cloudformation").create_stack(StackName="pages", TemplateBody=template)
[name] = dynamodb.list_tables()["TableNames"]
[ttl] = re.findall("TimeToLiveSpecification: (.+)", template)  # moto ignores it in a template
dynamodb.update_time_to_live(TableName=name, TimeToLiveSpecification=yaml.safe_load(ttl))
actions = set()  # of the clients that are made from here on: the result backend's
note = lambda model, **kwargs: actions.add(f"dynamodb:{model.name}")
boto3.DEFAULT_SESSION.events.register("before-call.dynamodb", note)
app.backend.store_result("some-id", 3, "SUCCESS")
assert AsyncResult("some-id").get(timeout=10) == 3
table = dynamodb.describe_table(TableName=name)["Table"]
assert table["BillingModeSummary"]["BillingMode"] == "PAY_PER_REQUEST", table
print(",".join(sorted(actions)))
"""
WITHOUT = {**DEFAULTS, "include_example": "no"}
aws_output = outputs({**DEFAULTS, **WITH_JOBS, "broker": "sqs", "result_backend": "dynamodb"})


@outputs(DEFAULTS, {**WITHOUT, **WITH_JOBS}, {**WITHOUT, "periodic_tasks": "admin"})
def test_a_reader_can_type_what_the_pages_show(broker, project):
    pages = sorted(page.relative_to(project) for page in project.glob("docs/*.md"))
    with Reader(project, **broker) as reader:
        for page in ("README.md", "AGENTS.md", *pages):
            reader.read(page)
    project.manage("check", **broker)  # the settings and tasks after the last command of a page
    project.call(".venv/bin/pytest", "-m", "not live", **broker)


@pytest.fixture
def aws(project, tmp_path):
    """A stand-in for AWS with nothing in it; the variables that name it."""
    [port] = free_ports(1)
    command, log = f"python -m moto.server --port {port}", tmp_path / "moto.log"
    with started(project.process(command, log, is_ready=partial(connects, port))):
        yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


def template(project, words, **answers):
    """Return the CloudFormation template of docs/production.md that has these words."""
    page = render("docs/production.md", project_slug=project.name, **WITH_JOBS, **answers)
    return code(page, words)


@aws_output
@pytest.mark.parametrize("example", CHOICES["include_example"])
def test_the_template_makes_the_queues_of_the_project(project, aws, example):
    queues = template(project, "AWS::SQS::Queue", broker="sqs", include_example=example)
    made = project.shell(QUEUES, TEMPLATE=queues, **aws)
    assert made == ("celery,cpu,dead,io/test" if example == "yes" else "celery,dead/cpu,io,test")


@aws_output
def test_the_template_makes_a_table_that_keeps_results(project, aws):
    """Its policy allows what this needs."""
    table = template(project, "AWS::DynamoDB::Table", result_backend="dynamodb")
    needed = project.shell(TABLE, TEMPLATE=table, **aws).split(",")
    assert {"dynamodb:DescribeTable", "dynamodb:PutItem", "dynamodb:GetItem"} <= set(needed)
    assert all(f"- {action}\n" in table for action in needed), needed
