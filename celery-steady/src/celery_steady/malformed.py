"""Messages that are no task's: a worker drops them. Celery would end, as would each worker that gets them next."""

from logging import getLogger

logger = getLogger(__name__)


def handle_or_drop(consumer, handle, message):
    """Call `handle` with this message, if it is a task's."""
    try:
        # The headers of Celery 3 are in the payload.
        fields = message.headers if "task" in message.headers else message.payload
        fields["task"] + fields["id"]  # texts
        if "args" not in message.payload:
            _, _, _ = message.payload
    except Exception as error:  # kombu's payload raises various ones
        drop(consumer, message, error)
    else:
        handle(message)


def drop(consumer, message, error):
    logger.error("dropped a message that is no task's: %r %.200r", error, message.body)
    message.ack_log_error(logger, consumer.connection_errors)
