"""The setting broker_transport for Amazon SQS: "celery_steady.sqs:Transport"."""

import time
from logging import getLogger
from math import ceil

from botocore.exceptions import BotoCoreError, ClientError
from kombu.asynchronous.aws.connection import AsyncHTTPSConnection
from kombu.transport import SQS

from celery_steady import versions
from celery_steady.messages import KeepingChannel, due_time
from celery_steady.waiting import log_waiting

logger = getLogger(__name__)

MAX_DELAY = 15 * 60  # seconds for which SQS keeps back a message that is sent
# And one that was received. A minute less, because the time since it was received counts, too.
MAX_VISIBILITY = 12 * 60 * 60 - 60


class Connection(AsyncHTTPSConnection):
    """A connection that waits 30 s for an answer. kombu's waits forever (kombu pull 2488)."""

    def getrequest(self):
        request = super().getrequest()
        # SQS answers a poll within 20 seconds.
        request.on_prepare = lambda curl: curl.setopt(curl.TIMEOUT, 30)
        return request


class Channel(KeepingChannel, SQS.Channel):
    """A channel that polls again after a failed poll. kombu's does not (kombu issue 1127)."""

    errors = (BotoCoreError, ClientError)

    def asynsqs(self, queue=None):
        connection = super().asynsqs(queue)
        connection.get_http_connection = Connection
        return connection

    def _schedule_queue(self, queue):
        try:
            super()._schedule_queue(queue)
        except Exception as error:
            self._poll_later(queue, error)

    def _get_async(self, queue, count=1, callback=None):
        polled = super()._get_async(queue, count, callback)
        polled.on_error = lambda *args: self._poll_later(queue, args[-1])
        return polled

    def _poll_later(self, queue, error):
        log_waiting(logger, f"poll the SQS queue {queue}", error)
        self.hub.call_later(1, self._schedule_queue, queue)

    def _message_to_python(self, message, queue_name, q_url):
        """Return a message that is no task's, too: the consumer drops it. kombu fails, or loses its queue."""
        try:
            payload = super()._message_to_python(message, queue_name, q_url)
            payload["properties"]["delivery_info"].setdefault("routing_key", queue_name)
        except Exception:  # a property may be anything
            info = {"routing_key": queue_name, "sqs_queue": q_url, "sqs_message": message}
            properties = {"delivery_tag": message["ReceiptHandle"], "delivery_info": info}
            payload = {"body": message["Body"], "properties": properties}
        return payload

    def _put(self, queue, message, **kwargs):
        seconds = ceil(due_time(message) - time.time())
        if seconds > 0 and not queue.endswith(".fifo"):  # which refuse it
            message["properties"].setdefault("DelaySeconds", min(seconds, MAX_DELAY))
        super()._put(queue, message, **kwargs)

    def delay(self, queue, payload, due):
        seconds = min(ceil(due - time.time()), MAX_VISIBILITY)
        self._change_visibility(payload["properties"], seconds)
        return True

    def sqs(self, queue=None):
        """Return boto's client for a queue. kombu also asks by a name that isn't in predefined_queues."""
        if queue and queue not in self.predefined_queues:
            queue = self.canonical_queue_name(queue)
        return super().sqs(queue)

    def client_of(self, url):
        """Return boto's client for the queue with this URL. predefined_queues may have several."""
        queues = self.predefined_queues.items()
        return self.sqs(next((name for name, queue in queues if queue["url"] == url), None))

    def _change_visibility(self, properties, seconds):
        info = properties["delivery_info"]
        self.client_of(info["sqs_queue"]).change_message_visibility(
            QueueUrl=info["sqs_queue"],
            ReceiptHandle=properties["delivery_tag"],
            VisibilityTimeout=seconds,
        )

    def _restore(self, message):
        """Release an unfinished task's message immediately, not after 20 s (kombu pull 2049)."""
        self._change_visibility(message.properties, 0)

    def renew(self, messages):
        queues = {}
        for message in messages:
            info = message.delivery_info
            queues.setdefault(info["sqs_queue"], []).append(message.delivery_tag)
        for url, handles in queues.items():
            for first in range(0, len(handles), 10):  # as many as a request may have
                entries = [
                    {
                        "Id": str(id),
                        "ReceiptHandle": handle,
                        "VisibilityTimeout": self.visibility_timeout,
                    }
                    for id, handle in enumerate(handles[first : first + 10])
                ]
                try:
                    # The answer lists those that failed, because they have just been acknowledged.
                    self.client_of(url).change_message_visibility_batch(
                        QueueUrl=url, Entries=entries
                    )
                except self.errors as error:  # the next round may succeed
                    log_waiting(logger, f"renew messages of {url}", error)


class Transport(SQS.Transport):
    """Tries to send a task as often as the retry policy says. kombu 5.7 tries twice."""

    Channel = Channel
    recoverable_connection_errors = SQS.Transport.connection_errors + SQS.Transport.channel_errors


Transport = versions.choose("Amazon SQS", Transport, SQS.Transport)
