"""Tasks that a worker's code doesn't know, because it is older or newer than the sender's.

Celery rejects such a message, and the task is lost. Here the broker keeps it for a while: by then, a worker
that knows it may have started. After an hour, Celery's way.
"""

import time
from datetime import UTC, datetime
from logging import getLogger

from amqp.exceptions import ChannelError
from celery.exceptions import InvalidTaskError
from kombu import Queue

from celery_steady.messages import due_time
from celery_steady.resend import send_again

logger = getLogger(__name__)

HEADER = "unknown_since"  # when a worker first got the message, as a timestamp
GIVE_UP = 3600  # seconds


def pause(age):
    """Return how many seconds to wait, so that many such tasks leave time for others."""
    return 10 if age < 60 else 60 if age < 600 else 300


def keep(consumer, message):
    """Let the broker deliver this message again later. Return whether it will."""
    now = time.time()
    since = message.headers.get(HEADER)
    if not isinstance(since, (int, float)) or not since <= now:
        since = now
    if now - since > GIVE_UP or "task" not in message.headers:
        return False
    name = message.headers["task"]
    if not isinstance(name, str):
        raise InvalidTaskError(f"The name of its task is no text: {name!r}")
    seconds = pause(now - since)
    headers, queue = {**message.headers, HEADER: since}, None
    try:
        with consumer.app.producer_pool.acquire(block=True) as producer:
            if producer.connection.transport.driver_type == "amqp":
                queue = declare_pause(consumer, message, producer.channel, seconds)
            elif hasattr(message.channel, "delay"):
                due = max(due_time({"headers": message.headers}), now + seconds)
                headers["eta"] = datetime.fromtimestamp(due, UTC).isoformat()
            else:  # a broker that can't wait
                return False
            send_again(producer.channel, message, headers, queue)
    except ChannelError as error:  # no right to declare the queue, for example
        logger.error("could not keep an unknown task: %r", error)
        return False
    logger.error("unknown task %s: a worker may know it in %d s", name, seconds)
    message.ack_log_error(logger, consumer.connection_errors)
    return True


def declare_pause(consumer, message, channel, seconds):
    """Declare RabbitMQ's queue whose messages return to this one after so many seconds."""
    tag = message.delivery_info["consumer_tag"]
    tags = consumer.task_consumer._active_tags
    name = next(queue for queue, active in tags.items() if active == tag)
    arguments = {
        "x-queue-type": "quorum",
        "x-message-ttl": seconds * 1000,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": name,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        "x-expires": GIVE_UP * 1000,  # an unused one
    }
    queue = Queue(
        f"celery_delayed_unknown_{seconds}_{name}", queue_arguments=arguments, durable=True
    )
    queue(channel).declare()
    return queue.name
