"""RabbitMQ: countdowns that are short or early, queues that are declared in time, lost connections.

An app of this class is needed for the countdowns; the worker's consumer brings the rest.
"""

from datetime import datetime
from functools import partial

import celery
from amqp.exceptions import NotFound
from celery.bootsteps import StartStopStep
from celery.utils.quorum_queues import detect_quorum_queues
from celery.worker.consumer import delayed_delivery
from celery.worker.consumer.tasks import Tasks
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


class DelayedDelivery(delayed_delivery.DelayedDelivery):
    """Declares all queues before it binds them to the exchange of countdowns.

    Otherwise RabbitMQ drops the countdowns of a queue whose own worker has not yet started
    (celery issue 9960).
    """

    name = delayed_delivery.DelayedDelivery.name  # replaces it

    def start(self, consumer):
        declare_queues(consumer.app, consumer.connection)
        super().start(consumer)


class NoticeLostConnection(StartStopStep):
    """Reconnects if a greenlet that acknowledged a task found the connection lost.

    The event loop would wait forever: kombu opens it another connection, which consumes no queue
    (celery issue 3377).
    """

    requires = (Tasks,)
    timer = None  # Celery also stops steps that a failed connection did not let start

    def include_if(self, consumer):
        is_gevent = getattr(consumer.pool, "is_green", False)
        return is_gevent and consumer.conninfo.transport.driver_type == "amqp"

    def start(self, consumer):
        import gevent  # installed, because the pool is gevent's

        loop, connection = gevent.getcurrent(), consumer.connection
        self.opened = opened = connection.connection

        def check():
            if self.opened is opened and not (opened.connected and connection.connected):
                self.opened = None
                gevent.kill(loop, ConnectionResetError("noticed in a greenlet"))

        self.timer = consumer.timer.call_repeatedly(1, check)

    def stop(self, consumer):
        self.opened = None
        if self.timer:
            self.timer.cancel()
