

class Channel(SQS.Channel):
    """Polls on after a poll that failed; kombu's stays deaf (its issue 1127)."""

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
        get_logger(__name__).warning("SQS does not answer for the queue %s: %r", queue, error)
        self.hub.call_later(self.connection.polling_interval, self._schedule_queue, queue)


class Transport(SQS.Transport):
    Channel = Channel


TRANSPORT_ALIASES["sqs"] = f"{__name__}:Transport"
