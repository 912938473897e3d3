"""RabbitMQ: queues that a worker declares in time, and lost connections that it notices."""

from celery.bootsteps import StartStopStep
from celery.worker.consumer import delayed_delivery
from celery.worker.consumer.tasks import Tasks

from celery_steady.defaults import is_green
from celery_steady.rabbitmq import declare_queues


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
        is_gevent = is_green(consumer.pool)
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
