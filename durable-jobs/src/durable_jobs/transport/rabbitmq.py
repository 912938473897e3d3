"""RabbitMQ: queues that exist before they are bound, confirms of a batch, lost connections."""

from celery import bootsteps
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from celery.worker.consumer.tasks import Tasks
from kombu.common import ignore_errors
from kombu.exceptions import BatchPublishError
from kombu.transport import pyamqp

from durable_jobs.worker.pools import IS_GEVENT

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


class Batch:
    """Messages whose confirms are awaited together. py-amqp would wait for each one."""

    def __init__(self, channel, max_size):
        self.channel, self.max_size = channel, max_size
        self.sent, self.unconfirmed = 0, set()
        # On a new channel RabbitMQ numbers the messages from 1.
        self.confirm_channel = channel.connection.channel()
        self.confirm_channel.confirm_select()
        self.confirm_channel.events["basic_ack"].add(self.confirm)
        self.confirm_channel.events["basic_nack"].add(self.refuse)

    def publish(self, message, confirm_timeout, **options):
        self.sent += 1
        self.unconfirmed.add(self.sent)
        pyamqp.Channel.basic_publish(self.confirm_channel, message, **options)
        if len(self.unconfirmed) >= self.max_size:
            self.flush()

    def confirm(self, delivery_tag, multiple):
        self.unconfirmed -= set(range(1, delivery_tag + 1)) if multiple else {delivery_tag}

    def refuse(self, delivery_tag, multiple):
        raise BatchPublishError("RabbitMQ refused a message")

    def flush(self):
        while self.unconfirmed:
            self.confirm_channel.connection.drain_events()

    def discard(self):
        self.unconfirmed.clear()

    def close(self):
        self.confirm_channel.close()


def create_publish_batch(channel, max_size):
    """kombu's Producer.batch() uses this method if a channel has it."""
    return Batch(channel, max_size)


def prepare(app):
    pyamqp.Channel.create_publish_batch = create_publish_batch
    if DeclareQueues not in DelayedDelivery.requires:
        DelayedDelivery.requires += (DeclareQueues,)
    if IS_GEVENT:
        app.steps["consumer"].add(NoticeLostConnection)
