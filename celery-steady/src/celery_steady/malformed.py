"""Messages that end with an error: each is a dead letter, and the worker goes on.

With stock Celery, such a message ends one worker after the other, or occupies a slot forever.
"""

from logging import getLogger

from kombu.utils.encoding import safe_repr

logger = getLogger(__name__)


def handle_or_drop(consumer, handle, message):
    """Call `handle` with this message. An error ends the message only, if it can be the cause."""
    try:
        handle(message)
    except Exception as error:  # whatever a header of a wrong type leads to
        if is_other(error, consumer.connection_errors + consumer.channel_errors):
            raise
        consumer.drop(message, error)


def is_other(error, lost):
    """Return whether this error has another cause: the broker is away, or there is no memory, or no thread."""
    its = isinstance(error, Exception) and type(error) is not RuntimeError
    return not its or isinstance(error, (MemoryError, *lost))


def drop(message, error):
    """Reject this message: the broker keeps it as a dead letter, or deletes it."""
    log(message, error)
    try:
        if not message.acknowledged:
            message.reject()
    except Exception as reason:  # then the worker keeps it until it ends
        logger.error("could not reject the message: %r", reason)


def log(message, error):
    body = getattr(message, "body", message)
    start = body[:200] if isinstance(body, (bytes, str)) else body
    logger.error("rejected a message: %.500s %.200s", safe_repr(error), safe_repr(start))
