"""Keeps the broker from delivering the messages of a worker again while it is alive."""

import threading
import time
from logging import getLogger

from celery.bootsteps import StartStopStep
from celery.concurrency import solo
from celery.worker import state
from celery.worker.consumer.tasks import Tasks
from kombu.transport import virtual

logger = getLogger(__name__)

VISIBILITY_SECONDS = 120  # until a killed worker's tasks run again, if the settings don't say


def prepare(app, pool):
    """Set what the settings don't say: how soon another worker gets the messages of a dead one."""
    transport = app.connection_for_read().transport
    if not hasattr(getattr(transport, "Channel", None), "renew"):
        return
    # After a lost connection, Celery would take fewer messages. Those of running tasks count already:
    # KeepMessages keeps them.
    app.conf.worker_enable_prefetch_count_reduction = False
    options = {"visibility_timeout": VISIBILITY_SECONDS}
    if transport.driver_type == "redis":
        # KeepMessages looks for messages of dead workers more often than kombu's timer.
        options["unacked_restore_interval"] = 100
        if getattr(pool, "is_green", False):
            # Each greenlet that acknowledges a task takes a connection. With kombu's limit of 10, some fail.
            options["max_connections"] = pool.limit + 100
    app.conf.broker_transport_options = options | app.conf.broker_transport_options


class KeepMessages(StartStopStep):
    """Renews this worker's messages, also after it has connected again.

    Redis and SQS deliver a message again that wasn't acknowledged within the visibility timeout. kombu
    never renews that time, so tasks and countdowns that take longer would run twice (celery issue 5935).
    """

    requires = (Tasks,)
    channel = None

    def __init__(self, consumer, **options):
        self.unacknowledged = set()  # messages whose acknowledgement failed

    def start(self, consumer):
        """The worker has connected. If it isn't the first time, keep what it got before."""
        channel = consumer.task_consumer.channel
        if not hasattr(channel, "renew"):  # of another broker, or stock
            return
        before, self.channel = self.channel, channel
        channel.unacknowledged = self.unacknowledged
        # Otherwise kombu 5.7 would put the messages of running tasks back into their queue.
        channel.do_restore = False
        kept = list(before.qos._delivered.values()) if before else []
        kept = [message for message in kept if not message.acknowledged]
        for message in kept:
            self.take(message)
        self.renew(consumer.timer, channel)
        if isinstance(consumer.pool, solo.TaskPool):
            threading.Thread(target=self.renew_beside, args=(channel,), daemon=True).start()
        # When the event loop has run for a second, it knows which tasks have started or ended meanwhile.
        wait = 1, self.release, (consumer, channel, kept)
        consumer.timer.call_after(0, consumer.timer.call_after, wait)

    def shutdown(self, consumer):
        if self.channel:
            self.channel.do_restore = True  # what hasn't ended is for other workers

    def take(self, message):
        message.channel = self.channel
        virtual.QoS.append(self.channel.qos, message, message.delivery_tag)

    def renew(self, timer, channel):
        if channel.closed:
            return  # the next one has a round of its own
        timer.call_after(pause(channel), self.renew, (timer, channel))
        # If ack() fails again, it adds the message again.
        failed = set(self.unacknowledged)
        self.unacknowledged -= failed
        for message in failed:
            self.take(message)
            message.ack()
        channel.renew()

    def renew_beside(self, channel):
        """Solo: while a task runs, no timer does."""
        while not channel.closed:
            try:
                channel.renew()
            except channel.errors as error:
                logger.warning("Could not renew messages: %r", error)
            time.sleep(pause(channel))

    def release(self, consumer, channel, messages):
        """Put back what was still waiting when the connection was lost: Celery has dropped it."""
        if self.channel is not channel:
            return  # it was lost again
        consumer.perform_pending_operations()  # with gevent, Celery 5.6 acknowledges there
        running = {request.message for request in tuple(state.active_requests)}
        for message in messages:
            if not message.acknowledged and message not in running | self.unacknowledged:
                message.requeue()


def pause(channel):
    """Return the seconds between two rounds: three of them may fail."""
    return channel.visibility_timeout / 5
