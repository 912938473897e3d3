"""What kombu's transports lack. Each broker's module extends its transport, for the connections of one app."""

from functools import cache
from importlib import import_module

import kombu
from celery.app import amqp

from durable_jobs import versions

EXTENSIONS = {  # by kombu's module
    "kombu.transport.pyamqp": ("rabbitmq", "batched confirms from RabbitMQ"),
    "kombu.transport.redis": ("redis", "Redis without copies"),
    "kombu.transport.SQS": ("sqs", "repairs for SQS"),
}


@cache
def extended(transport):
    """Return a subclass of this transport, or the transport itself.

    The package of another broker need not be installed, so its module is not imported.
    """
    name, extension = EXTENSIONS.get(transport.__module__, (None, None))
    if name and versions.fits(extension):
        return import_module(f"{__name__}.{name}").extend(transport)
    return transport


class Connection(kombu.Connection):
    def get_transport_cls(self):
        return extended(super().get_transport_cls())


class AMQP(amqp.AMQP):
    Connection = Connection
