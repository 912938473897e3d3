"""Keeps the broker from delivering the messages of a worker again while it is alive."""

import _thread
import sys
import time
from functools import partial
from logging import getLogger

from celery.bootsteps import StartStopStep
from celery.worker import state
from celery.worker.consumer.tasks import Tasks
from kombu.transport import virtual

from celery_steady.waiting import log_waiting

logger = getLogger(__name__)

# gevent's own wait for its loop, and a process that ends meanwhile crashes.
start_thread, sleep = _thread.start_new_thread, time.sleep
if gevent := sys.modules.get("gevent.monkey"):
    start_thread = gevent.get_original("_thread", "start_new_thread")
    sleep = gevent.get_original("time", "sleep")


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
        channel.unacknowledged, channel.renews = self.unacknowledged, True
        # Otherwise kombu 5.7 would put the messages of running tasks back into their queue.
        channel.do_restore = False
        kept = list(before.qos._delivered.values()) if before else []
        kept = [message for message in kept if not message.acknowledged]
        for message in kept:
            self.take(message)
        self.renew(consumer.timer, channel)
        self.restore(consumer.timer, channel)
        if not consumer.is_prefork:
            connection = consumer.connection.clone()
            start_thread(partial(self.renew_beside, connection, channel), ())
        # When the event loop has run for a second, it knows which tasks have started or ended meanwhile.
        wait = 1, self.release, (consumer, channel, kept)
        consumer.timer.call_after(0, consumer.timer.call_after, wait)

    def shutdown(self, consumer):
        if self.channel:
            self.channel.ends_by_error = consumer.ends_by_error
            self.channel.do_restore = True  # what hasn't ended is for other workers

    def take(self, message):
        message.channel = self.channel
        virtual.QoS.append(self.channel.qos, message, message.delivery_tag)

    def renew(self, timer, channel):
        if channel.closed:
            return  # the next one has a round of its own
        timer.call_after(channel.pause, self.renew, (timer, channel))
        # If ack() fails again, it adds the message again.
        failed = set(self.unacknowledged)
        self.unacknowledged -= failed
        for message in failed:
            self.take(message)
            message.ack()
        channel.renew(messages_of(channel))

    def restore(self, timer, channel):
        """Put back messages of dead workers, but let this one do something else now and then."""
        if channel.closed:
            return
        may_be_more = False
        try:
            may_be_more = channel.restore_lapsed()
        finally:
            seconds = 0.2 if may_be_more else channel.pause
            timer.call_after(seconds, self.restore, (timer, channel))

    def renew_beside(self, connection, channel):
        """All but prefork: no timer runs while a task blocks the event loop, or a worker that stops waits for threads."""
        while not channel.closed:
            try:
                connection.default_channel.renew(messages_of(channel))
            except Exception as error:
                log_waiting(logger, "renew messages", error)
                connection.collapse()
            sleep(channel.pause)
        connection.release()

    def release(self, consumer, channel, messages):
        """Put back what was still waiting when the connection was lost: Celery has dropped it."""
        if self.channel is not channel:
            return  # it was lost again
        consumer.perform_pending_operations()  # with gevent, Celery 5.6 acknowledges there
        running = {request.message for request in tuple(state.active_requests)}
        for message in messages:
            if not message.acknowledged and message not in running | self.unacknowledged:
                message.requeue()


def messages_of(channel):
    return list(channel.qos._delivered.values())
