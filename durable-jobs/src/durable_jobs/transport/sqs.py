"""Amazon SQS: a poll that fails, or gets no answer, is not the last one."""

from kombu.asynchronous.aws.connection import AsyncHTTPSConnection
from kombu.log import get_logger
from kombu.transport import SQS, TRANSPORT_ALIASES


class Connection(AsyncHTTPSConnection):
    """A connection that waits 30 seconds for an answer. kombu's waits forever (celery/kombu pull request 2488)."""

    def getrequest(self):
        request = super().getrequest()
        # SQS answers a poll within 20 seconds.
        request.on_prepare = lambda curl: curl.setopt(curl.TIMEOUT, 30)
        return request


class Channel(SQS.Channel):
    """A channel that polls again after a failed poll. kombu's does not (celery/kombu issue 1127)."""

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
        get_logger(__name__).warning("A poll of the SQS queue %s failed: %r", queue, error)
        self.hub.call_later(1, self._schedule_queue, queue)


class Transport(SQS.Transport):
    Channel = Channel


def prepare(app):
    TRANSPORT_ALIASES["sqs"] = f"{__name__}:Transport"
