"""Redis: the message of a job needs no copy, and what is no JSON is dropped."""

import time
from json import JSONDecodeError
from logging import getLogger

from kombu.transport import redis, virtual
from redis.exceptions import ResponseError

from durable_jobs.malformed import Message
from durable_jobs.messages import fields_in

logger = getLogger(__name__)


class QoS(redis.QoS):
    """Lets all workers reconnect before it looks for messages of dead ones.

    Waits while Redis refuses to write, for example because it is full or a replica: the message is
    already off its queue, and would be lost if no copy of it were stored (kombu 5.7).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.connected_at = time.monotonic()

    def restore_visible(self, *args, **kwargs):
        # Workers try to reconnect at least every 30 seconds, and renew their messages then.
        if time.monotonic() > self.connected_at + self.visibility_timeout / 3:
            super().restore_visible(*args, **kwargs)

    def append(self, message, delivery_tag):
        while True:
            try:
                return super().append(message, delivery_tag)
            except ResponseError as error:
                logger.warning("Redis refuses to write: %r", error)
                time.sleep(1)


def is_job(message):
    return message is not None and fields_in(message.headers) is not None


class JobQoS(QoS):
    """What kombu does with a message from when a worker takes it until it is acknowledged.

    kombu copies it into a hash and a sorted set, and deletes it there again: four of six commands of
    Redis. The message of a job needs no copy: if the worker is killed, Beat sends it again.
    """

    def append(self, message, delivery_tag):
        kept = virtual.QoS if is_job(message) else QoS
        kept.append(self, message, delivery_tag)

    def ack(self, delivery_tag):
        kept = virtual.QoS if is_job(self._delivered.get(delivery_tag)) else QoS
        kept.ack(self, delivery_tag)

    def restore_by_tag(self, tag, client=None, leftmost=False):
        """Put a message back into its queue, because the worker stops or rejects it."""
        message = self._delivered.get(tag)
        if not is_job(message):
            super().restore_by_tag(tag, client, leftmost)
            return
        queue = message.delivery_info["exchange"], message.delivery_info["routing_key"]
        with self.channel.conn_or_acquire(client) as client:
            self.channel._do_restore_message(message._raw, *queue, client, leftmost)


class Channel(redis.Channel):
    QoS, Message = JobQoS, Message

    def _brpop_read(self, **options):
        try:
            return super()._brpop_read(**options)
        except JSONDecodeError as error:
            logger.error("dropped a message that is no JSON: %r", error)


def extend(transport):
    channel = type("Channel", (Channel, transport.Channel), {})
    return type("Transport", (transport,), {"Channel": channel})
