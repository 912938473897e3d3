"""RabbitMQ: confirms of a batch."""

from kombu.exceptions import BatchPublishError
from kombu.transport import pyamqp


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


def extend(transport):
    class Channel(transport.Connection.Channel):
        def create_publish_batch(self, max_size):  # kombu's Producer.batch() calls it
            return Batch(self, max_size)

    connection = type("Connection", (transport.Connection,), {"Channel": Channel})
    return type("Transport", (transport,), {"Connection": connection})
