"""SQS keeps countdowns: 15 minutes when they are sent, 12 hours each time a worker receives them.

Anybody may have sent a message there, such as SNS, or a person in the console.
"""

import time
import uuid
from datetime import UTC, datetime, timedelta
from inspect import signature
from unittest.mock import Mock

import pytest
from kombu import Exchange, Queue
from kombu.transport import SQS

from celery_steady import Celery, sqs, versions

pytestmark = pytest.mark.skipif(not versions.fits("Amazon SQS"), reason="kombu has another client")

HOUR = 3600


@pytest.fixture
def channel():
    channel = object.__new__(sqs.Channel)
    channel.sqs = Mock()
    channel.predefined_queues = {}
    channel.connection = Mock(_noack_queues=set())
    return channel


@pytest.mark.parametrize(
    ("queue", "seconds", "sent"),
    [
        ("queue", -10, None),
        ("queue", 0.5, 1),
        ("queue", 100, 100),
        ("queue", 20 * HOUR, 900),
        ("queue.fifo", 100, None),
    ],
)
def test_a_countdown_is_sent_with_a_delay(channel, monkeypatch, queue, seconds, sent):
    put = Mock()
    monkeypatch.setattr(SQS.Channel, "_put", put)
    due = datetime.now(UTC) + timedelta(seconds=seconds)
    channel._put(queue, {"headers": {"eta": due.isoformat()}, "properties": {}})
    assert put.call_args.args[1]["properties"].get("DelaySeconds") == sent


@pytest.mark.parametrize(("seconds", "hidden"), [(100, 100), (20 * HOUR, 12 * HOUR - 60)])
def test_a_countdown_that_a_worker_receives_is_hidden_again(channel, seconds, hidden):
    info = {"routing_key": "queue", "sqs_queue": "url"}
    payload = {"properties": {"delivery_tag": "tag", "delivery_info": info}}
    assert channel.delay("queue", payload, time.time() + seconds)
    [call] = channel.sqs.return_value.change_message_visibility.call_args_list
    assert call.kwargs == {"QueueUrl": "url", "ReceiptHandle": "tag", "VisibilityTimeout": hidden}


@pytest.mark.parametrize(
    "body",
    ["hello", '{"Type": "Notification"}', "[1, 2]", "aGVsbG8=", '{"properties": 5}']
    + ['{"properties": {"delivery_info": null}}', '{"properties": {"delivery_info": {}}}'],
)
def test_a_message_that_is_no_tasks_keeps_its_queue(channel, body):
    message = {"Body": body, "ReceiptHandle": "tag"}
    properties = channel._message_to_python(message, "queue", "url")["properties"]
    assert properties["delivery_tag"] == "tag"
    channel._change_visibility(properties, 0)
    [call] = channel.sqs.return_value.change_message_visibility.call_args_list
    assert call.kwargs["QueueUrl"] == "url"


@pytest.mark.parametrize(
    ("name", "prefix", "predefined", "routing_key"),
    [
        ("plain", "", False, None),
        ("with.dots", "", True, None),
        ("with.dots.fifo", "prefix.", True, None),
        ("plain", "prefix.", False, None),
        ("plain", "", True, "another.key"),
    ],
)
def test_a_message_of_any_queue_is_renewed_delayed_and_given_back(
    name, prefix, predefined, routing_key, request
):
    sqs = request.getfixturevalue("sqs")
    name = f"{uuid.uuid4()}-{name}"
    app = Celery(broker=sqs.url, set_as_current=False)
    options = {**sqs.transport_options, "visibility_timeout": HOUR, "queue_name_prefix": prefix}
    exchange = Exchange("exchange" if routing_key else "", durable=True)
    queue = Queue(name, exchange, routing_key or name)

    def connect(**own):
        return app.connection_for_write(transport_options={**options, **own})

    if predefined:  # kombu makes the queue first
        with connect() as connection, connection.channel() as channel:
            url = queue(channel).declare() and channel._resolve_queue_url(name)
            options["predefined_queues"] = {channel.canonical_queue_name(name): {"url": url}}
    with connect() as connection, connection.channel() as channel:
        properties = {"MessageGroupId": "1", "MessageDeduplicationId": str(uuid.uuid4())}
        fifo = properties if name.endswith(".fifo") else {}
        producer = connection.Producer(channel)
        producer.publish(
            "text", exchange=exchange, routing_key=queue.routing_key, declare=[queue], **fifo
        )
        message = queue(channel).get()
        for _ in range(2):
            channel.renew(*[[message]] * (len(signature(channel.renew).parameters)))
        url = message.delivery_info["sqs_queue"]
        assert channel.delay(name, {"properties": message.properties}, time.time() + 100)
        channel._restore(message)  # it is visible again
        again = queue(channel).get()
        assert again.body == message.body and again.delivery_info["sqs_queue"] == url
