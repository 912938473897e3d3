"""A message that is no task's is dropped: it ends no worker."""

import json
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import kombu
import pytest
from kombu.transport import memory

from celery_steady import malformed
from celery_steady.messages import KeepingChannel, Message

TYPES = {"content_type": "application/json", "content_encoding": "utf-8"}
TASK = {"task": "add", "id": "1"}


@pytest.fixture
def consumer():
    """A worker's consumer, whose handler was prepared."""
    consumer = SimpleNamespace(connection_errors=(), handled=[])
    handle = partial(malformed.handle_or_drop, consumer, consumer.handled.append)
    consumer.create_task_handler = lambda: handle
    consumer.on_decode_error = partial(malformed.drop, consumer)
    return consumer


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, "[[], {}, {}]"),
        ({"task": "add"}, "[[], {}, {}]"),
        ({**TASK, "task": ["add"]}, "[[], {}, {}]"),
        (TASK, "{"),
        (TASK, "5"),
        (TASK, "[[], {}]"),
    ],
)
def test_a_malformed_message_is_dropped_with_one_line(consumer, headers, body, caplog):
    message = kombu.Message(body, headers=headers, channel=Mock(no_ack_consumers=None), **TYPES)
    consumer.create_task_handler()(message)
    assert message.acknowledged and not consumer.handled
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("headers", "body"), [(TASK, "[[], {}, {}]"), ({}, json.dumps({**TASK, "args": []}))]
)
def test_the_message_of_a_task_is_handled(consumer, headers, body):
    message = kombu.Message(body, headers=headers, channel=Mock(), **TYPES)
    consumer.create_task_handler()(message)
    assert consumer.handled == [message]


class Channel(KeepingChannel, memory.Channel):
    pass


@pytest.mark.parametrize(
    "payload", [[1], 5, {}, {"properties": {"body_encoding": "base64"}, "body": "abc"}]
)
def test_what_is_no_message_has_an_error(payload, consumer, caplog):
    channel = Channel(kombu.Connection("memory://").transport)
    message = Message(payload, channel)
    assert message.errors and message.delivery_tag
    channel.qos.append(message, message.delivery_tag)
    consumer.on_decode_error(message, message.errors[0][1])
    assert message.acknowledged and len(caplog.records) == 1
