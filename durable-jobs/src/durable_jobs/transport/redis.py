"""Redis: the message of a job needs no copy."""

from celery_steady.redis import QoS
from kombu.transport import virtual

from durable_jobs.messages import HEADER, fields_in


def is_job(message):
    return message is not None and fields_in(message.headers) is not None


class JobQoS(QoS):
    """What a worker's connection does with a job's message, of which Redis has no copy.

    celery-steady notes others in a hash and a sorted set, and removes them there again. If the worker of
    a job is killed, Beat sends its message again.
    """

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


def extend(transport):
    class Transport(transport):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)  # chooses the channel: Redis's or Sentinel's
            attributes = {"QoS": JobQoS, "without_copy": HEADER}
            self.Channel = type("Channel", (self.Channel,), attributes)

    return Transport
