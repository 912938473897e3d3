"""What a job's message may do without. Each broker's module extends celery-steady's transport, for one app."""

from functools import cache
from importlib import import_module

import celery_steady.versions
import kombu
from celery.app import amqp
from kombu import connection

from durable_jobs import versions

STEADY_TRANSPORTS = {  # by kombu's module
    "kombu.transport.redis": ("celery_steady.redis", "Redis"),
    "kombu.transport.SQS": ("celery_steady.sqs", "Amazon SQS"),
}
EXTENSIONS = {
    "kombu.transport.pyamqp": ("rabbitmq", "batched confirms from RabbitMQ"),
    "celery_steady.redis": ("redis", "Redis without copies"),
}


@cache
def extended(transport):
    """Return celery-steady's transport in place of kombu's, with what jobs add. Leave others as they are.

    The package of another broker need not be installed, so its module is not imported.
    """
    module, part = STEADY_TRANSPORTS.get(transport.__module__, (None, None))
    if module and celery_steady.versions.fits(part):
        transport = import_module(module).Transport
    name, part = EXTENSIONS.get(transport.__module__, (None, None))
    if name and versions.fits(part):
        return import_module(f"{__name__}.{name}").extend(transport)
    return transport


class Connection(kombu.Connection):
    def get_transport_cls(self):
        return extended(super().get_transport_cls())

    def Pool(self, limit=None, **kwargs):
        return ConnectionPool(self, limit, **kwargs)


class PooledConnection(Connection, connection.PooledConnection):
    pass


class ConnectionPool(connection.ConnectionPool):
    """What senders use. kombu's makes kombu's own connections."""

    def new(self):
        return PooledConnection(self, **dict(self.connection._info(resolve=False)))


class AMQP(amqp.AMQP):
    Connection = Connection
