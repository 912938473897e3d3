"""Messages: what is sent after the commit, and no message that cannot be sent delays others."""

import time
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from unittest.mock import Mock

import pytest
from celery import current_app as app
from celery import signals
from celery.app import routes
from django.db import OperationalError, transaction
from helpers import add, deliver, of_job, requeue, run_of, seconds_until_due

from durable_jobs import batches, messages, publish, transitions
from durable_jobs.actions import cancel, run_all_again
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.models import Job

pytestmark = pytest.mark.django_db


@pytest.fixture
def sent_messages(broker, monkeypatch):
    """The options of each message."""
    sent = []
    monkeypatch.setattr(
        "kombu.Producer.publish", lambda self, body, **options: sent.append(options)
    )
    return sent


def test_a_job_is_sent_as_a_celery_message(broker):
    job = enqueue(add, [1], {"y": 2}, queue="cpu")
    job.retries = 3
    with app.connection_for_write("memory://") as broker:
        messages.send_one(job, app.amqp.Producer(broker, auto_declare=False))
        message = app.amqp.queues["cpu"](broker.default_channel).get()
    assert message.payload[:2] == [[1], {"y": 2}]
    kept = {name: message.headers[name] for name in ("id", "task", "retries", "durable_job")}
    assert kept == {"id": str(job.pk), "task": add.name, "retries": 3, **of_job()}


def test_messages_sent_together_declare_their_queue_once(broker, monkeypatch):
    sent, producer = [], Mock(batch=Mock(side_effect=nullcontext))
    producer.publish = lambda body, **options: sent.append(options)
    monkeypatch.setattr(app, "producer_or_acquire", lambda: nullcontext(producer))
    jobs = [Job(task=add.name, queue=queue) for queue in ("a", "a", "b")]
    messages.send(jobs[:2])
    messages.send(jobs[2:])
    declared = [[queue.name for queue in message["declare"]] for message in sent]
    assert declared == [["a"], [], ["b"]]
    assert [message["routing_key"] for message in sent] == ["a", "a", "b"]
    assert producer.batch.call_count == 1


def test_a_job_is_sent_by_a_process_that_does_not_know_its_task(sent_messages):
    """In a deploy, Beat may run older code than the workers."""
    messages.send([Job(task="to.be.deployed", queue="a"), Job(task=add.name, queue="a")])
    assert [message["headers"]["task"] for message in sent_messages] == ["to.be.deployed", add.name]


def test_flower_shows_the_beginning_of_large_arguments(sent_messages):
    messages.send([Job(task=add.name, args=["x" * 5000], kwargs={"y": "z" * 5000}, queue="a")])
    [message] = sent_messages
    assert [len(message["headers"][name]) for name in ("argsrepr", "kwargsrepr")] == [1000, 1000]


def test_the_priority_of_a_route_reaches_the_broker(sent_messages, monkeypatch):
    monkeypatch.setattr(app.amqp.router, "routes", routes.prepare({add.name: {"priority": 7}}))
    messages.send([enqueue(add, [1, 2], countdown=9)])
    assert (sent_messages[0]["priority"], sent_messages[0]["routing_key"]) == (7, "celery")


@pytest.mark.parametrize("store", [enqueue_many, batches.enqueue])
@pytest.mark.parametrize("looks", [True, False])
def test_each_job_of_many_has_the_queue_of_its_route(monkeypatch, store, looks):
    """A route that is a dictionary is asked once, a function with the arguments of each job."""
    asked = []

    def route(name, args, kwargs, options, **more):
        asked.append(args[0])
        return {"queue": f"q{args[0]}"}

    route = route if looks else {add.name: {"queue": "q7"}}
    monkeypatch.setattr(app.amqp.router, "routes", routes.prepare(route))
    store([add.s(n, n) for n in range(3)] + [add.using(queue="own").s(9, 9)])
    queues = list(Job.objects.order_by("created_at").values_list("queue", flat=True))
    assert queues == [*(["q0", "q1", "q2"] if looks else ["q7"] * 3), "own"]
    assert asked == ([0, 1, 2] if looks else [])


def test_receivers_and_routers_get_the_arguments_of_the_caller(sent_messages, monkeypatch):
    got, when = [], datetime.now(UTC)

    def receive(body, **kwargs):
        got.append(body[0][0])

    def route(name, args, kwargs, options, **more):
        got.append(args[0])

    monkeypatch.setattr(app.amqp.router, "routes", routes.prepare(route))
    signals.before_task_publish.connect(receive)
    messages.send([enqueue(add, [when, 2])])
    signals.before_task_publish.disconnect(receive)
    assert got == [when] * 3  # enqueue() routes and calls the receiver, send() routes again


# The broker refuses, or is unavailable


def test_a_job_stays_queued_and_due_while_the_broker_is_down(broker_down):
    job = enqueue(add, [1, 2])
    assert not publish.publish([job])
    assert seconds_until_due(job) <= 0
    assert (job.state, job.times_sent) == ("queued", 0)


def test_publishing_pauses_after_the_broker_was_found_down(broker_down, monkeypatch):
    first, second = enqueue(add, [1, 2]), enqueue(add, [3, 4])
    publish.publish([first])
    publish.publish([second])
    assert broker_down == [str(first.pk)]
    assert seconds_until_due(second) <= 0
    publish.next_tries.clear()
    publish.publish([second])
    assert broker_down == [str(first.pk), str(second.pk)]


def test_a_message_that_the_broker_refuses_delays_no_other(monkeypatch):
    """The connection works, so the next message is sent at once."""
    monkeypatch.setattr(messages, "send_one", Mock(side_effect=[ValueError("too large"), None]))
    refused, other = enqueue(add, [1, 2]), enqueue(add, [3, 4])
    publish.publish([refused])
    publish.publish([other])
    assert seconds_until_due(refused) <= 0 < seconds_until_due(other)


def test_an_unavailable_queue_does_not_stop_publishing_to_others(broker_down):
    jobs = [enqueue(add, [1, 2], queue=queue) for queue in ["cpu", "cpu", "io"]]
    for job in jobs:
        publish.publish([job])
    assert broker_down == [str(jobs[0].pk), str(jobs[2].pk)]


def test_an_unavailable_queue_does_not_delay_jobs_of_others_that_run_again(commit, published):
    jobs = [enqueue(add, [1, 2], queue=queue) for queue in ("down", "up")]
    cancel(Job.objects.all())
    publish.next_tries["down"] = time.monotonic() + 60
    with commit():
        again = run_all_again(Job.objects.filter(pk__in=[job.pk for job in jobs]))
    del publish.next_tries["down"]
    assert published == [str(job.pk) for job in again if job.queue == "up"]


def test_a_job_with_an_unknown_task_stays_queued_and_delays_no_other():
    job, other = enqueue(add, [1, 2]), enqueue(add, [1, 2])
    job.task = "to.be.deployed"
    assert deliver(job).state == "queued"
    assert deliver(other).state == "succeeded"


def test_many_jobs_wait_for_the_broker_or_for_their_countdown(commit, broker_down, monkeypatch):
    monkeypatch.setattr("durable_jobs.enqueue.CHUNK", 2)
    with commit():
        late = enqueue_many([add.using(countdown=60).s(1, 2)] * 3)
        jobs = enqueue_many([add.s(1, 2)] * 5)
    assert broker_down == [str(jobs[0].pk)]
    assert all(seconds_until_due(job) <= 0 and not job.times_sent for job in jobs)
    assert all(seconds_until_due(job) == pytest.approx(60, abs=5) for job in late)


def test_a_caller_sees_no_error_if_the_database_fails_after_the_broker(broker_down, monkeypatch):
    """Its job is stored, or has succeeded and handed its slot over: the sweeper sends the message."""
    job = enqueue(add, [1, 2])
    fails = Mock(side_effect=OperationalError("away"))
    monkeypatch.setattr(transitions, "take_back", fails)
    publish.publish([job])
    assert fails.called and seconds_until_due(job) > 0


@pytest.mark.django_db(transaction=True)  # the test needs real commits
def test_an_error_of_publishing_is_not_raised_to_the_caller(monkeypatch):
    """A caller that sees an error enqueues again, and then has each job twice."""
    monkeypatch.setattr("durable_jobs.enqueue.publish", lambda jobs: 1 / 0)
    with transaction.atomic():
        enqueue_many([add.s(1, 2)] * 3)
    assert Job.objects.count() == 3


def test_a_failed_publish_does_not_change_a_job_that_waits_for_its_retry(broker_down):
    """Publishing may report an error although the broker has taken the message."""
    job = enqueue(add, [1, 2])
    requeue(run_of(job).row)
    Job.objects.filter(pk=job.pk).update(times_sent=0, send_at=Now() + timedelta(seconds=600))
    assert not publish.publish([job])
    assert seconds_until_due(job) > 500
