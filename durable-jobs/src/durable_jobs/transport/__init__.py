"""What a job's message may do without. Each broker's module extends celery-steady's transport, for one app."""

from functools import cache
from importlib import import_module

from celery_steady import transports

from durable_jobs import versions

EXTENSIONS = {
    "kombu.transport.pyamqp": ("rabbitmq", "batched confirms from RabbitMQ"),
    "celery_steady.redis.transport": ("redis", "Redis without copies"),
}


@cache
def extended(transport):
    """Return this transport with what jobs add. Leave others as they are."""
    name, part = EXTENSIONS.get(transport.__module__, (None, None))
    if name and versions.fits(part):
        return import_module(f"{__name__}.{name}").extend(transport)
    return transport


class Connection(transports.Connection):
    def get_transport_cls(self):
        return extended(super().get_transport_cls())


class AMQP(transports.AMQP):
    Connection = Connection
