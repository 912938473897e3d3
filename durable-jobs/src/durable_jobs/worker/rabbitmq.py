"""What a worker with RabbitMQ does besides: it declares its queues, and notices lost connections."""

from celery import bootsteps
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from celery.worker.consumer.tasks import Tasks
from kombu.common import ignore_errors

from durable_jobs.pools import IS_GEVENT

if IS_GEVENT:
    import gevent


class DeclareQueues(bootsteps.StartStopStep):
    """Declare all queues, so that DelayedDelivery, the next step, can bind them.

    Otherwise RabbitMQ drops the countdowns of a queue whose own worker has not yet started
    (celery issue 9960).
    """

    requires = (Tasks,)

    def start(self, consumer):
        for queue in consumer.app.amqp.queues.values():
            # A queue that exists with other arguments is an error only for the workers that use it.
            with ignore_errors(consumer.connection), consumer.connection.channel() as channel:
                queue(channel).declare()


class NoticeLostConnection(bootsteps.StartStopStep):
    """Reconnect if a greenlet that acknowledged a task found the connection lost.

    The event loop would wait forever: kombu opens it another connection, which consumes no queue
    (celery issue 3377).
    """

    requires = (Tasks,)
    timer = None  # Celery also stops steps that a failed connection did not let start

    def start(self, consumer):
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


def prepare(app):
    if app.connection_for_read().transport.driver_type != "amqp":
        return
    if DeclareQueues not in DelayedDelivery.requires:
        DelayedDelivery.requires += (DeclareQueues,)
    if IS_GEVENT:
        app.steps["consumer"].add(NoticeLostConnection)
