"""What kombu and Celery lack, for the broker in use only: each broker has a module of its own."""

from importlib import import_module

MODULES = {
    "amqp": "rabbitmq",
    "amqps": "rabbitmq",
    "pyamqp": "rabbitmq",
    "redis": "redis",
    "rediss": "redis",
    "sentinel": "redis",
    "sqs": "sqs",
}


def prepare(app, url):
    """Let `app` use the broker at this address, before it opens a connection.

    The package of another broker need not be installed, so its module is not imported.
    """
    address = url if isinstance(url, str) else next(iter(url or []), "")
    if name := MODULES.get(address.partition(":")[0]):
        import_module(f"{__name__}.{name}").prepare(app)
