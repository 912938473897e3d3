"""Which transport a connection has: its URL says so. No client of another broker is imported."""

import re
from functools import cache
from importlib import import_module
from logging import getLogger

import kombu
from celery.app import amqp
from celery.exceptions import ImproperlyConfigured
from celery.utils.imports import symbol_by_name
from kombu import connection

from celery_steady import versions

logger = getLogger(__name__)

KINDS = {
    "redis": ["redis", "rediss", "sentinel", "valkey", "valkeys"],
    "sqs": ["sqs"],
    "amqp": ["amqp", "amqps", "pyamqp", "librabbitmq"],
    "memory": ["memory"],
    "filesystem": ["filesystem"],
}
STEADY = {  # by kombu's module
    "kombu.transport.redis": ("celery_steady.redis", "Redis"),
    "kombu.transport.SQS": ("celery_steady.sqs", "Amazon SQS"),
}


def kind(url):
    """Return which broker or result backend a URL is of: a key of KINDS, or its scheme."""
    if not isinstance(url, str):
        url = url[0] if url else ""
    scheme, found, _ = url.partition("://")
    scheme = scheme.split("+")[0].lower() if found else "amqp"  # as kombu reads it
    return next((kind for kind, schemes in KINDS.items() if scheme in schemes), scheme)


def as_redis(url):
    """Return this URL, or several, with redis:// in place of valkey://, and rediss:// of valkeys://."""
    if not isinstance(url, str):
        return url and [as_redis(each) for each in url]
    return re.sub(r"(^|;)valkey(?=s?[:+])", r"\1redis", url, flags=re.IGNORECASE)


def by_url(url, transport):
    """Return the transport to ask kombu for, or None if it should go by the URL.

    The setting broker_transport would replace the URL's scheme: rediss:// would not be encrypted.
    """
    is_steady = isinstance(transport, str) and transport.startswith("celery_steady.")
    if not is_steady or not url or (isinstance(url, str) and "://" not in url):
        return transport
    if transport.split(":")[0].split(".")[1] != kind(url):
        raise ImproperlyConfigured(
            f"broker_transport is {transport!r}, but broker_url begins with"
            f" {str(url).partition('://')[0]}://. Remove broker_transport, and use celery_steady.Celery."
        )
    return None


def check(app):
    """Before a worker starts, refuse a broker_transport that doesn't fit the URL, and name an unknown broker."""
    setting = app.conf.broker_transport
    for url in app.conf.broker_read_url, app.conf.broker_write_url:
        fitting = by_url(url, setting) is None and setting
        used = app.connection(url).get_transport_cls()
        if fitting and not issubclass(used, symbol_by_name(setting)):
            raise ImproperlyConfigured(
                f"With {str(url).partition('://')[0]}://, kombu doesn't use broker_transport."
                " Remove it, and use celery_steady.Celery."
            )
        if kind(url) not in KINDS:
            logger.warning(
                "celery-steady doesn't know %s:// brokers: kombu's is as it is", kind(url)
            )


@cache
def steady(transport):
    """Return celery-steady's transport in place of kombu's. Leave others as they are."""
    module, part = STEADY.get(transport.__module__, (None, None))
    return import_module(module).Transport if module and versions.fits(part) else transport


class Connection(kombu.Connection):
    def __init__(self, hostname="localhost", *args, transport=None, **options):
        transport = by_url(hostname, transport)
        super().__init__(as_redis(hostname), *args, transport=transport, **options)

    def switch(self, conn_str):
        """Take the next URL of several."""
        super().switch(as_redis(conn_str))

    def get_transport_cls(self):
        return steady(super().get_transport_cls())

    def Pool(self, limit=None, **kwargs):
        return ConnectionPool(self, limit, **kwargs)


class ConnectionPool(connection.ConnectionPool):
    """What senders use. kombu's makes kombu's own connections."""

    def new(self):
        kind = pooled(type(self.connection))
        return kind(self, **dict(self.connection._info(resolve=False)))


@cache
def pooled(kind):
    return type("PooledConnection", (connection.PooledConnection, kind), {})


class AMQP(amqp.AMQP):
    Connection = Connection
