"""Amazon SQS: a poll that fails, or gets no answer, is not the last one."""

from logging import getLogger

from kombu.asynchronous.aws.connection import AsyncHTTPSConnection
from kombu.transport import SQS

from durable_jobs.malformed import Message

logger = getLogger(__name__)


class Connection(AsyncHTTPSConnection):
    """A connection that waits 30 s for an answer. kombu's waits forever (kombu pull 2488)."""

    def getrequest(self):
        request = super().getrequest()
        # SQS answers a poll within 20 seconds.
        request.on_prepare = lambda curl: curl.setopt(curl.TIMEOUT, 30)
        return request


class Channel(SQS.Channel):
    """A channel that polls again after a failed poll. kombu's does not (kombu issue 1127)."""

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
        logger.warning("A poll of the SQS queue %s failed: %r", queue, error)
        self.hub.call_later(1, self._schedule_queue, queue)

    def _restore(self, message):
        """Give an unfinished task's message back at once, not after 20 s (kombu pull 2049)."""
        info = message.delivery_info
        self.sqs(info["routing_key"]).change_message_visibility(
            QueueUrl=info["sqs_queue"], ReceiptHandle=message.delivery_tag, VisibilityTimeout=0
        )


class Transport(SQS.Transport):
    """Tries to send a task as often as the retry policy says. kombu 5.7 tries twice."""

    Channel = Channel
    recoverable_connection_errors = SQS.Transport.connection_errors + SQS.Transport.channel_errors


def extend(transport):
    channel = type("Channel", (Channel,), {"Message": Message})
    return type("Transport", (Transport,), {"Channel": channel})
