"""Tasks that a worker's code doesn't know, because it is older or newer than the sender's.

Celery rejects such a message, and the task is lost. Here the broker keeps it for a while: by then, a worker
that knows it may have started. After an hour, Celery's way.
"""

import time
from datetime import UTC, datetime, timedelta
from logging import getLogger

from kombu import Queue

from celery_steady.messages import send_again

logger = getLogger(__name__)

HEADER = "unknown_since"  # when a worker first got the message, as a timestamp
GIVE_UP = 3600  # seconds


def pause(age):
    """Return how many seconds to wait, so that many such tasks leave time for others."""
    return 10 if age < 60 else 60 if age < 600 else 300


def keep(consumer, message):
    """Let the broker deliver this message again later. Return whether it will."""
    now = time.time()
    headers = {HEADER: now, **message.headers}
    age = now - headers[HEADER]
    if age > GIVE_UP or "task" not in message.headers:
        return False
    seconds = pause(age)
    logger.error("unknown task %s: a worker may know it in %d s", message.headers["task"], seconds)
    queue = None
    with consumer.app.producer_pool.acquire(block=True) as producer:
        if producer.connection.transport.driver_type == "amqp":
            queue = declare_pause(consumer, message, producer.channel, seconds)
        else:
            due = datetime.now(UTC) + timedelta(seconds=seconds)
            headers["eta"] = due.isoformat()
        send_again(producer, message, headers, queue)
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
