"""Events: Flower gets all of them, many in one message."""

import uuid
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from celery import current_app as app
from helpers import CLAIM, add
from kombu import Connection

from durable_jobs import transitions
from durable_jobs.actions import cancel
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from durable_jobs.publish import publish
from durable_jobs.tasks import JobTask
from durable_jobs.worker import events

pytestmark = pytest.mark.django_db


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


@pytest.mark.parametrize(("state", "ends"), [("queued", True), ("running", False)])
def test_flower_is_told_that_a_cancelled_job_has_ended(monkeypatch, state, ends):
    """If another run has the job, no event is sent: that run reports how the job ends."""
    sent = []
    monkeypatch.setattr(JobTask, "send_event", lambda self, name, **fields: sent.append(name))
    monkeypatch.setitem(app.conf, "worker_send_task_events", True)
    job = enqueue(add, [1, 2])
    if ends:
        cancel(Job.objects.filter(pk=job.pk))
    else:
        transitions.claim(id=job.pk, run_token=uuid.uuid4(), **CLAIM)
    publish([job])
    assert sent == (["task-revoked"] if ends else [])
