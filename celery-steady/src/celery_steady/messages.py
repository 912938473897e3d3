"""Messages of Redis and SQS, which deliver a message again if it isn't acknowledged in time."""

import sys
import time
import uuid
from contextlib import suppress
from datetime import datetime
from logging import getLogger

from amqp.exceptions import RecoverableConnectionError
from kombu.transport import virtual

from celery_steady.waiting import log_waiting

logger = getLogger(__name__)


class Message(virtual.Message):
    """A message whose acknowledgement is repeated if it fails: renewal.KeepMessages does so.

    kombu 5.7 only logs the failure, and the task runs again.
    If the message is malformed, it has `errors`. kombu would raise them in the worker's event loop.
    """

    def __init__(self, payload, channel=None, **options):
        try:
            super().__init__(payload, channel, **options)
        except Exception:
            self.errors = [sys.exc_info()]
            properties = {"delivery_tag": str(uuid.uuid4())}
            properties["delivery_info"] = {"exchange": "", "routing_key": ""}
            with suppress(Exception):
                properties |= payload["properties"]
            super().__init__({"body": "", "properties": properties}, channel, **options)

    def ack(self, multiple=False):
        if self.channel.unacknowledged is None:  # nobody would repeat it
            return super().ack(multiple)
        try:
            if not self.channel.closed:
                return super().ack(multiple)
        except self.channel.errors as error:
            logger.warning("Could not acknowledge a message: %r", error)
        self.channel.unacknowledged.add(self)


def due_time(payload):
    """Return when this message's task may start, as a timestamp, or 0 if it doesn't say."""
    try:
        eta = datetime.fromisoformat(payload["headers"]["eta"])
        return eta.timestamp() if eta.tzinfo else 0
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0


class KeepingChannel:
    """What a channel of Redis or SQS needs for KeepMessages. A subclass has `errors`, renew(), delay()."""

    Message = Message
    unacknowledged = None  # of a worker: its set of messages whose acknowledgement failed
    errors = ()  # of the broker's client
    renews = False  # whether a worker renews what this channel takes
    ends_by_error = False  # whether the worker does: then its messages count as if it was killed

    @property
    def pause(self):
        """The seconds between two renewals: three of them may fail."""
        return min(self.visibility_timeout / 5, 24)

    def renew(self, messages):
        """Let the broker wait for these messages as long again as when they were delivered."""
        raise NotImplementedError

    def restore_lapsed(self):
        """Put back messages of dead workers. Return whether there may be more."""
        return False

    def delay(self, queue, payload, due):
        """Let the broker keep this message until that time. Return whether it does."""
        raise NotImplementedError

    def basic_consume(self, queue, no_ack, *args, **kwargs):
        """Consume the queue, but let the broker keep countdowns that stock senders sent."""
        super().basic_consume(queue, no_ack, *args, **kwargs)
        deliver = self.connection._callbacks[queue]

        def deliver_or_delay(payload):
            due = due_time(payload)
            try:
                if due > time.time() and self.delay(queue, payload, due):
                    return
            except Exception as error:  # then the worker waits
                log_waiting(logger, f"let a countdown of {queue} wait in the broker", error)
            deliver(payload)

        if not no_ack:
            self.connection._callbacks[queue] = deliver_or_delay

    def basic_publish(self, *args, **kwargs):
        """Refuse to send through a closed channel. Then kombu's retry opens a new one.

        If a queue's declaration fails, kombu 5.7 repeats only that, and then sends the task through the
        channel that it has closed: an AttributeError, which loses a retry.
        """
        if self.closed:
            raise RecoverableConnectionError("the channel is closed")
        return super().basic_publish(*args, **kwargs)
