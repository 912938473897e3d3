"""Messages that are no task's: a worker drops them. Celery would end, as would each worker that gets them next."""

import sys
import uuid
from contextlib import suppress
from functools import partial
from logging import getLogger

from celery.bootsteps import Step
from kombu.transport import virtual

logger = getLogger(__name__)


class DropMalformed(Step):
    def create(self, consumer):
        create = consumer.create_task_handler
        consumer.create_task_handler = lambda: partial(handle_or_drop, consumer, create())
        consumer.on_decode_error = partial(drop, consumer)


def handle_or_drop(consumer, handle, message):
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


class Message(virtual.Message):
    """A message of Redis or SQS. If it is malformed, it has `errors`. kombu would raise them in the worker's loop."""

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
