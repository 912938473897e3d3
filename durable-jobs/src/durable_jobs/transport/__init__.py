"""What kombu and Celery lack, for the broker in use only: each broker has a module of its own."""

from importlib import import_module

from kombu.transport import TRANSPORT_ALIASES

MODULES = {"pyamqp": "rabbitmq", "redis": "redis", "SQS": "sqs"}  # by the name of kombu's module


def prepare(app, url):
    """Let `app` use the broker at this address, before it opens a connection.

    The package of another broker need not be installed, so its module is not imported.
    """
    address = url if isinstance(url, str) else next(iter(url or []), "")
    path = TRANSPORT_ALIASES.get(address.partition(":")[0], "")  # kombu.transport.redis:Transport
    if name := MODULES.get(path.partition(":")[0].rpartition(".")[2]):
        import_module(f"{__name__}.{name}").prepare(app)
