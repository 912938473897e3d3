"""Plain tasks, which have no row: what the broker delivers again, and what becomes a dead letter.

test_workers.py kills and stops workers that run plain tasks, on each broker.
"""

from harness.blocks import code
from harness.faults import on_rabbitmq, on_sqs
from harness.project import wait_for

# The task kills its whole worker every time


@on_sqs
def test_ten_deliveries_make_a_dead_letter(stack):
    """No worker reads the queue `test`. Here the visibility timeout of a delivery is 0."""
    task = stack.send("plain.wait", ".", queue="test")
    code = """
import boto3
from django.conf import settings
sqs, messages = boto3.client("sqs"), []
queue = settings.CELERY_BROKER_TRANSPORT_OPTIONS["predefined_queues"]["test"]["url"]
while found := sqs.receive_message(QueueUrl=queue, VisibilityTimeout=0).get("Messages"):
    messages += found
dead = sqs.receive_message(QueueUrl=queue[:-4] + "dead").get("Messages", [])
result = [len(messages), [message["Body"] == messages[0]["Body"] for message in dead]]
"""
    assert task and stack.ask(code) == [10, [True]]


@on_rabbitmq
def test_a_dead_letter_is_kept_and_can_be_sent_again(stack):
    """With rabbitmq.json, which names no queue of tasks, and the code in docs/production.md."""
    page = stack.project.read("docs/production.md")
    again = code(page, "send_back")
    file = stack.project / "rabbitmq.json"
    with stack.broker.policy("dead-letters", "import_definitions", file):
        stack.send("plain.circle", ".", 0, queue="reports")
        deliver = """
from config.celery import app
with app.connection_for_write() as broker:
    channel = broker.default_channel
    if message := channel.basic_get("reports"):
        channel.basic_reject(message.delivery_tag, requeue=True)
result = bool(message)
"""
        deliveries = sum(stack.ask(deliver) for _ in range(30))
        assert deliveries == 21
        wait_for(lambda: stack.messages_in("dead-letters") == 1)
        assert stack.messages_in("reports") == 0
        stack.ask(again)
        assert (stack.messages_in("dead-letters"), stack.messages_in("reports")) == (0, 1)


@on_rabbitmq
def test_the_policy_for_dead_letters_covers_the_queues_of_tasks_and_no_others(stack):
    """The others are Celery's, for countdowns, events and remote control, and the dead letters."""
    declare = """
from config.celery import app
with app.connection_for_write() as broker:
    app.amqp.queues["reports"](broker.default_channel).declare()
"""
    stack.ask(declare)
    file = stack.project / "rabbitmq.json"
    with stack.broker.policy("dead-letters", "import_definitions", file):
        printed = stack.broker.control("list_queues", "--silent", "name", "policy")
    policies = dict(line.split("\t") for line in printed.splitlines())
    covered = {name for name, policy in policies.items() if policy == "dead-letters"}
    assert {"celery", "cpu", "io", "reports"} <= covered
    assert [name for name in covered if "celery" in name or "dead" in name] == ["celery"]
    for part in ["dead-letters", "celery_delayed_0", "celeryev.", ".celery.pidbox"]:
        assert any(part in name for name in policies), part
