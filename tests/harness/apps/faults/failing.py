"""For celery -A: the project, with a worker that does not survive the loss of its broker.

Celery has had errors there, such as one of Gossip while a connection was lost.
"""

from celery.worker.consumer import Consumer

from .quick_heartbeat import app  # noqa: F401


def fail(consumer, error):
    raise RuntimeError("an error of Celery")


Consumer.on_connection_error_after_connected = fail
