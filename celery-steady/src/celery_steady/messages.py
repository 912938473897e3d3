"""Messages of Redis and SQS, which deliver a message again if it isn't acknowledged in time."""

import sys
import uuid
from contextlib import suppress
from logging import getLogger

from amqp.exceptions import RecoverableConnectionError
from kombu.transport import virtual

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


class KeepingChannel:
    """What a channel of Redis or SQS needs for KeepMessages. A subclass has `errors` and renew()."""

    Message = Message
    unacknowledged = None  # of a worker: its set of messages whose acknowledgement failed
    errors = ()  # of the broker's client

    def renew(self):
        """Let the broker wait for this channel's messages as long again as when they were delivered."""
        raise NotImplementedError

    def basic_publish(self, *args, **kwargs):
        """Refuse to send through a closed channel. Then kombu's retry opens a new one.

        If a queue's declaration fails, kombu 5.7 repeats only that, and then sends the task through the
        channel that it has closed: an AttributeError, which loses a retry.
        """
        if self.closed:
            raise RecoverableConnectionError("the channel is closed")
        return super().basic_publish(*args, **kwargs)
