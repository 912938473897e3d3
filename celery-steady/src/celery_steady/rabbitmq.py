"""RabbitMQ: an app whose countdowns may be short or early. rabbitmq_steps.py is what a worker has."""

from datetime import datetime
from functools import partial

import celery
from amqp.exceptions import NotFound
from celery.utils.quorum_queues import detect_quorum_queues
from kombu.common import ignore_errors
from kombu.transport.native_delayed_delivery import (
    bind_queue_to_native_delayed_delivery_exchange,
    declare_native_delayed_delivery_exchanges_and_queues,
)

from celery_steady import versions


class Celery(celery.Celery):
    """Sends countdowns to quorum queues that Celery 5.7 can't send.

    One of less than a second starts after a second. Celery refuses it, and drops a task that is retried
    with one. Before the first worker has ever started, a countdown fails: workers declare its exchanges.
    """

    def send_task(self, name, args=None, kwargs=None, countdown=None, eta=None, **options):
        seconds = countdown
        if eta:
            due = datetime.fromisoformat(eta) if isinstance(eta, str) else eta
            if due.tzinfo is None:
                due = due.replace(tzinfo=self.now().tzinfo)
            seconds = (due - self.now()).total_seconds()
        if seconds and 0 < seconds < 2 and self._has_quorum_queues():
            countdown, eta = max(seconds, 1), None
        send = partial(super().send_task, name, args, kwargs, countdown=countdown, eta=eta)
        try:
            return send(**options)
        except NotFound:
            if not seconds:
                raise
            declare_delays(self)
            return send(**options)

    def _has_quorum_queues(self):
        driver = self.producer_pool.connections.connection.transport.driver_type
        return detect_quorum_queues(self, driver)[0]


Celery = versions.choose("RabbitMQ", Celery, celery.Celery)


def declare_delays(app):
    """Declare all queues, and the exchanges and queues of countdowns."""
    with app.connection_for_write() as connection:
        declare_queues(app, connection)
        kind = app.conf.broker_native_delayed_delivery_queue_type
        declare_native_delayed_delivery_exchanges_and_queues(connection, kind)
        for queue in app.amqp.queues.values():
            bind_queue_to_native_delayed_delivery_exchange(connection, queue)


def declare_queues(app, connection):
    for queue in app.amqp.queues.values():
        # A queue that exists with other arguments is an error only for the workers that use it.
        with ignore_errors(connection), connection.channel() as channel:
            queue(channel).declare()
