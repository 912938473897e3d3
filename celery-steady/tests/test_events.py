"""Events: Flower gets all of them, many in one message."""

from types import SimpleNamespace
from unittest.mock import Mock

import celery
import pytest
from kombu import Connection

from celery_steady import events, versions

is_on = pytest.mark.skipif(not versions.fits("batched events"), reason="the part is off")
app = celery.Celery("events", broker="memory://", set_as_current=False)


def start_batches(dispatcher):
    """Make a worker send its events in batches.

    Returns the boot step, the consumer, the function that sends a batch, and the list of what is
    published.
    """
    published, consumer = [], SimpleNamespace(event_dispatcher=dispatcher, timer=Mock())
    dispatcher.producer = Mock(publish=lambda event, **options: published.append(event))
    dispatcher.on_send_buffered = lambda: published.append("at once")
    step = events.BatchedEvents(consumer)
    step.start(consumer)
    [[_, flush]] = [call.args for call in consumer.timer.call_repeatedly.call_args_list]
    return step, consumer, flush, published


@is_on
def test_a_worker_sends_its_task_events_in_batches():
    """Flower receives the same events, but many of them in one message."""
    _, _, flush, published = start_batches(app.events.Dispatcher(Connection("memory://")))
    dispatcher = flush.__self__
    for number in range(30):
        dispatcher.send("task-succeeded", uuid=number)
    assert not published
    dispatcher.send("worker-heartbeat")
    flush()
    heartbeat, batch = published
    assert heartbeat["type"] == "worker-heartbeat"
    assert [event["uuid"] for event in batch] == list(range(30))


def test_a_worker_that_never_reached_its_broker_stops_without_an_error():
    events.BatchedEvents(SimpleNamespace()).stop(SimpleNamespace())


@is_on
def test_events_survive_a_lost_connection_and_a_shutdown():
    dispatcher = app.events.Dispatcher(Connection("memory://"))
    step, consumer, _, published = start_batches(dispatcher)
    dispatcher.send("task-succeeded", uuid=1)
    step.stop(consumer)
    assert [event["uuid"] for event in published[0]] == [1]
    consumer.timer.call_repeatedly.return_value.cancel.assert_called_once_with()

    dispatcher.producer.publish = Mock(side_effect=ConnectionError)
    dispatcher.send("task-succeeded", uuid=2)
    step.stop(consumer)
    following = app.events.Dispatcher(Connection("memory://"))
    _, _, flush, published = start_batches(following)
    following.extend_buffer(dispatcher)  # as Celery does
    flush()
    assert [event["uuid"] for event in published[0]] == [2]


def test_a_worker_without_events_has_no_batches():
    consumer = SimpleNamespace(event_dispatcher=None, timer=Mock())
    step = events.BatchedEvents(consumer)
    step.start(consumer)
    step.stop(consumer)
    assert not consumer.timer.mock_calls
