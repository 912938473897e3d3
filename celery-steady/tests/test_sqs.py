"""SQS keeps countdowns: 15 minutes when they are sent, 12 hours each time a worker receives them.

Anybody may have sent a message there, such as SNS, or a person in the console.
"""

import time
from datetime import UTC, datetime, timedelta
from unittest.mock import Mock

import pytest
from kombu.transport import SQS

from celery_steady import sqs, versions

pytestmark = pytest.mark.skipif(not versions.fits("Amazon SQS"), reason="kombu has another client")

HOUR = 3600


@pytest.fixture
def channel():
    channel = object.__new__(sqs.Channel)
    channel.sqs = Mock()
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
    channel.sqs.assert_called_once_with("queue")
