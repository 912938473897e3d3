"""Sends a worker's task events to Flower in batches. One by one, they take a sixth of a task's CPU time."""

from celery.bootsteps import StartStopStep
from celery.worker.consumer.events import Events

from celery_steady import versions

FLUSH_INTERVAL = 0.2  # seconds between two batches
MAX_EVENTS = 1000  # events in a batch


class BatchedEvents(StartStopStep):
    """A bootstep that starts with each connection to the broker, when Celery has made a new dispatcher."""

    requires = (Events,)
    dispatcher = None  # Celery also stops steps that a failed connection did not let start

    def include_if(self, consumer):
        return versions.fits("batched events")

    def start(self, consumer):
        self.dispatcher = consumer.event_dispatcher
        if self.dispatcher:
            self.dispatcher.buffer_group = {"task"}
            self.dispatcher.buffer_limit = MAX_EVENTS
            # Celery's would flush in each turn of the event loop.
            self.dispatcher.on_send_buffered = None
            self.timer = consumer.timer.call_repeatedly(FLUSH_INTERVAL, self.dispatcher.flush)

    def stop(self, consumer):
        if self.dispatcher:
            self.timer.cancel()
            self.dispatcher.flush()  # without a connection, Celery keeps the events for the next one
