"""What a job's message may do without. Each broker's module extends celery-steady's transport, for one app."""

from functools import cache
from importlib import import_module

import celery_steady.versions
import kombu
from celery.app import amqp

from durable_jobs import versions

STEADY = {  # by kombu's module
    "kombu.transport.redis": ("celery_steady.redis", "Redis"),
    "kombu.transport.SQS": ("celery_steady.sqs", "Amazon SQS"),
}
OWN = {
    "kombu.transport.pyamqp": ("rabbitmq", "batched confirms from RabbitMQ"),
    "celery_steady.redis": ("redis", "Redis without copies"),
}


@cache
def extended(transport):
    """Return celery-steady's transport in place of kombu's, with what jobs add. Leave others as they are.

    The package of another broker need not be installed, so its module is not imported.
    """
    module, part = STEADY.get(transport.__module__, (None, None))
    if module and celery_steady.versions.fits(part):
        transport = import_module(module).Transport
    name, part = OWN.get(transport.__module__, (None, None))
    if name and versions.fits(part):
        return import_module(f"{__name__}.{name}").extend(transport)
    return transport


class Connection(kombu.Connection):
    def get_transport_cls(self):
        return extended(super().get_transport_cls())


class AMQP(amqp.AMQP):
    Connection = Connection
