"""Amazon SQS: a failed poll is not the last one."""

from kombu.log import get_logger
from kombu.transport import SQS, TRANSPORT_ALIASES


class Channel(SQS.Channel):
    """A channel that polls again after a failed poll. kombu's does not (celery/kombu issue 1127)."""

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
