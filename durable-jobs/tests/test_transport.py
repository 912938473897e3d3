"""The connections of an app have what kombu's transports lack. Those of others do not change."""

from collections import defaultdict
from unittest.mock import MagicMock

import celery_steady.redis
import celery_steady.sqs
import kombu
import pytest
from celery import current_app as app
from kombu.transport.redis import SentinelChannel

from durable_jobs.messages import HEADER


def keeps_no_jobs(transport):
    return getattr(transport.Channel, "without_copy", None) == HEADER


BROKERS = {
    "amqp://": lambda transport: hasattr(transport.Connection.Channel, "create_publish_batch"),
    "redis://": keeps_no_jobs,
    "sentinel://": keeps_no_jobs,
    "sqs://": lambda transport: isinstance(transport, celery_steady.sqs.Transport),
    "memory://": lambda transport: False,
}


@pytest.mark.parametrize("url", BROKERS)
def test_only_connections_of_the_app_are_extended(url):
    is_extended, is_sentinel = BROKERS[url], url == "sentinel://"
    options = {"transport_options": {"master_name": "one"} if is_sentinel else {}}
    own = app.connection_for_read(url, **options)
    pooled = own.Pool(1).acquire()
    for connection in own, pooled, app.connection_for_write(url, **options).clone():
        assert is_extended(connection.transport) == (url != "memory://")
        channel = getattr(connection.transport, "Channel", object)
        assert issubclass(channel, SentinelChannel) == is_sentinel
    assert not is_extended(kombu.Connection(url, **options).transport)


@pytest.mark.parametrize("kind", ["celery_steady.redis:Transport", "redis"])
def test_a_transport_of_celery_steady_keeps_no_copies_of_jobs_either(monkeypatch, kind):
    monkeypatch.setitem(app.conf, "broker_transport", kind)
    transport = app.connection_for_read("redis://").transport
    assert isinstance(transport, celery_steady.redis.Transport) and keeps_no_jobs(transport)


@pytest.mark.parametrize("is_pooled", [False, True])
def test_a_connection_that_fails_over_is_extended_too(is_pooled):
    connection = app.connection_for_write("redis://one;redis://two")
    if is_pooled:
        connection = connection.Pool(1).acquire()
    with connection:
        connection.switch("redis://two")
        assert BROKERS["redis://"](connection.transport)


def rabbitmq_batch(answer):
    """Publish three messages in a batch of the app. `answer` is RabbitMQ's, for each that it waits for."""
    transport = app.connection_for_write("amqp://").transport
    channel = transport.Connection.Channel.__new__(transport.Connection.Channel)
    channel.connection = connection = MagicMock()
    confirming = connection.channel.return_value
    confirming.connection, confirming.events, sent = connection, defaultdict(set), iter([2, 3])

    def drain_events():
        for receive in confirming.events[answer]:
            receive(next(sent), True)

    connection.drain_events, connection.client_properties = drain_events, {}
    batch = channel.create_publish_batch(max_size=100)
    for _ in range(3):
        batch.publish("message", None, exchange="", routing_key="celery")
    assert confirming.send_method.call_count == 3
    batch.flush()
    assert next(sent, None) is None


def test_rabbitmq_confirms_a_batch_of_messages_together():
    from kombu.exceptions import BatchPublishError  # since kombu 5.7

    rabbitmq_batch("basic_ack")
    with pytest.raises(BatchPublishError):
        rabbitmq_batch("basic_nack")
