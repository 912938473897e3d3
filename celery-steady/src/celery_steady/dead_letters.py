"""Messages that Redis or RabbitMQ gave up, in the queue `dead-letters`."""

from logging import getLogger

from amqp.exceptions import ChannelError

from celery_steady.resend import send_again

logger = getLogger(__name__)


def send_back(app, name="dead-letters"):
    """Send each dead letter to its queue again. Return how many were sent.

    For example, when the code that killed its workers is fixed. What can't be read, or sent, stays, with a
    line in the log. With SQS, use `aws sqs start-message-move-task`.
    """
    count = 0
    with app.connection_for_write() as connection:
        is_rabbitmq = connection.transport.driver_type == "amqp"
        # What stays is given back when the connection is closed, and not before.
        channel, sender = connection.channel(), connection.channel()
        try:
            size = channel.queue_declare(name, passive=True).message_count
        except ChannelError:  # there is no such queue
            return 0
        for _ in range(size):
            try:
                message = channel.basic_get(name)
                if not message:  # Redis had one that can't be read
                    continue
                message = channel.message_to_python(message)
                if message.errors:
                    raise message.errors[0][1]
                queue = message.headers["x-death"][0]["queue"] if is_rabbitmq else None
                send_again(sender, message, message.headers, queue)
            except connection.connection_errors:
                raise
            except Exception as error:
                logger.error("a dead letter stays: %.500r", error)
                if not getattr(sender, "is_open", True):  # RabbitMQ has closed it
                    sender = connection.channel()
            else:
                message.ack()
                count += 1
    return count
