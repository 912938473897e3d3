"""The connections of an app have what kombu's transports lack. Those of others do not change."""

import kombu
import pytest
from celery import current_app as app

BROKERS = {
    "amqp://": lambda transport: hasattr(transport.Connection.Channel, "create_publish_batch"),
    "redis://": lambda transport: transport.Channel.QoS.__module__.startswith("durable_jobs."),
    "sentinel://": lambda transport: transport.Channel.QoS.__module__.startswith("durable_jobs."),
    "sqs://": lambda transport: hasattr(transport.Channel, "_poll_later"),
    "memory://": lambda transport: False,
}


@pytest.mark.parametrize("url", BROKERS)
def test_only_connections_of_the_app_are_extended(url):
    is_extended = BROKERS[url]
    for connection in app.connection_for_read(url), app.connection_for_write(url).clone():
        assert is_extended(connection.get_transport_cls()) == (url != "memory://")
    assert not is_extended(kombu.Connection(url).get_transport_cls())


def test_a_connection_that_fails_over_is_extended_too():
    with app.connection_for_write("redis://one;redis://two") as connection:
        connection.switch("redis://two")
        assert BROKERS["redis://"](connection.transport)
