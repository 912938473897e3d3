"""Each fault still exists upstream, and the class of celery-steady cures it.

If a fault has gone after an upgrade, remove its cure from celery-steady. The same function reproduces it
with a class of Celery's or kombu's, and with ours. Real workers show others: see test_worker.py.
"""

import shelve
import sys
from collections import deque
from io import BytesIO
from itertools import chain, repeat
from types import SimpleNamespace
from unittest.mock import DEFAULT, MagicMock, Mock, patch

import pytest
from amqp import RecoverableConnectionError
from billiard.einfo import ExceptionInfo
from billiard.pool import RUN
from celery import Celery, beat
from celery.app import trace
from celery.app.task import Context
from celery.backends.asynchronous import geventDrainer
from celery.backends.base import KeyValueStoreBackend
from celery.backends.dynamodb import DynamoDBBackend
from celery.backends.redis import RedisBackend
from celery.concurrency import asynpool
from celery.concurrency.thread import TaskPool
from celery.worker import worker
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from celery.worker.request import Request
from kombu import Connection, Consumer, Exchange, Queue
from kombu.asynchronous import http
from kombu.asynchronous.aws.connection import AsyncHTTPSConnection
from kombu.exceptions import OperationalError
from kombu.transport import SQS, redis, virtual
from redis.exceptions import ResponseError

from celery_steady import beat as steady_beat
from celery_steady import consumer as steady_consumer
from celery_steady import (
    dynamodb,
    messages,
    rabbitmq,
    rabbitmq_steps,
    renewal,
    shutdown,
    sqs,
    tasks,
)
from celery_steady import redis as steady_redis

QUORUM = Queue(
    "quorum", Exchange("topic", "topic"), "quorum", queue_arguments={"x-queue-type": "quorum"}
)


def fails(error, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except error:
        return True
    return False


def make(kind, **attributes):
    """Return an object of this class that has these attributes, and no connection."""
    return object.__new__(type(kind.__name__, (kind,), attributes))


# The broker


def an_acknowledgement_that_fails_is_not_repeated(kind, redis):
    channel = Mock(basic_ack=Mock(side_effect=[ResponseError, None]), errors=(ResponseError,))
    channel.configure_mock(closed=False, unacknowledged=set(), qos=Mock(_delivered={}), pause=9)
    message = kind({"body": "", "properties": {"delivery_tag": "tag"}}, channel)
    message.ack_log_error(Mock(), (ResponseError,))
    step = renewal.KeepMessages(Mock())
    step.channel, step.unacknowledged = channel, channel.unacknowledged
    step.renew(Mock(), channel)
    return not message.acknowledged


def redis_redelivers_what_its_own_worker_has(transport, redis):
    """A message that was delivered long ago is in its queue again, though its worker is alive."""
    options = {"visibility_timeout": 600}
    with Connection(redis.url, transport=transport, transport_options=options) as connection:
        channel = connection.default_channel
        queue = Queue("queue")(channel)
        queue.declare()
        connection.Producer().publish("", routing_key="queue")
        message = queue.get()
        redis.client.zadd("unacked_index", {message.delivery_tag: 1})
        step = renewal.KeepMessages(Mock(timer=Mock()))
        step.start(Mock(task_consumer=Mock(channel=channel), pool=None))
        channel.qos.restore_visible(interval=1)
        return redis.client.llen("queue") == 1


def a_full_redis_loses_a_message(transport, redis):
    """BRPOP has removed it from its queue, but a full Redis refuses the copy."""
    with Connection(redis.url, transport=transport) as connection:
        queue = Queue("queue")(connection.default_channel)
        queue.declare()
        connection.Producer().publish("", routing_key="queue")
        redis.client.config_set("maxmemory", 1)
        fails(ResponseError, queue.get)
        redis.client.config_set("maxmemory", 0)
        return not redis.client.llen("queue") and not redis.client.hlen("unacked")


def redis_refuses_a_task_after_two_tries(transport, redis):
    return is_sent_twice(Connection(redis.url, transport=transport), ResponseError)


def sqs_refuses_a_task_after_two_tries(transport, redis):
    queues = {"queue": {"url": "http://127.0.0.1"}}
    options = {"region": "eu-central-1", "predefined_queues": queues}
    url = "sqs://name:password@"
    return is_sent_twice(Connection(url, transport=transport, transport_options=options), OSError)


def is_sent_twice(connection, error):
    send = Mock(__name__="send", side_effect=[error, error, error, "sent"])
    with connection:
        send = connection.ensure(Mock(), send, max_retries=9, interval_start=0, interval_step=0)
        return fails((OperationalError, error), send)


def a_task_is_sent_through_a_closed_channel(transport, redis):
    """After a declaration that failed once, kombu repeats only that."""
    closed = []
    declare = Mock(side_effect=chain([RecoverableConnectionError], repeat(DEFAULT)))

    def publish(channel, *args, **kwargs):
        closed.append(channel.closed)

    with (
        Connection(redis.url, transport=transport) as connection,
        patch.object(virtual.Channel, "basic_publish", publish),
        patch.object(virtual.Channel, "queue_declare", declare),
    ):
        connection.Producer().publish("", declare=[Queue("queue")], retry=True)
    return closed != [False]


def an_idle_connection_that_is_lost_is_not_noticed(channel, redis):
    return not channel.socket_keepalive


def a_poll_of_sqs_waits_forever(kind, redis):
    import pycurl  # not in all versions
    from kombu.asynchronous.http.curl import CurlClient

    curl, request = Mock(TIMEOUT=pycurl.TIMEOUT), kind(http_client=Mock()).getrequest()
    CurlClient._setup_request(Mock(), curl, request, BytesIO(), http.Headers())
    options = {call.args[0] for call in curl.setopt.call_args_list}
    return pycurl.URL in options and not options & {pycurl.TIMEOUT, pycurl.TIMEOUT_MS}


def a_poll_of_sqs_that_fails_is_the_last(kind, redis):
    hub = Mock()
    poll = {"_active_queues": ["queue"], "_get_bulk_async": Mock(side_effect=OSError)}
    fails(OSError, make(kind, hub=hub, qos=Mock(), **poll)._schedule_queue, "queue")
    return not hub.mock_calls


def sqs_gets_a_message_back_after_a_poll(kind, redis):
    """A worker that stops releases a message, but no other gets it for 20 seconds."""
    client = Mock()
    info = {"routing_key": "queue", "sqs_queue": "url", "exchange": ""}
    message = {"properties": {"delivery_tag": "tag", "delivery_info": info}}
    parts = {"serializable.return_value": message}
    message = Mock(
        delivery_info=info, delivery_tag="tag", properties=message["properties"], **parts
    )
    methods = {"_lookup": lambda *args: ["queue"], "_new_queue": lambda *args: "url"}
    channel = make(kind, sqs=Mock(return_value=client), transport_options={}, **methods)
    with patch.multiple(type(channel), sqs_base64_encoding=False, wait_time_seconds=20):
        channel._restore(message)
    [call] = client.change_message_visibility.call_args_list
    return call.kwargs["VisibilityTimeout"] > 0


def no_queue_is_declared_before_it_is_bound(step, redis):
    """RabbitMQ can't bind a queue that doesn't exist: its countdowns are lost."""
    app = Celery(broker="pyamqp://", set_as_current=False)
    app.conf.task_queues = [QUORUM]
    order = []
    with (
        patch.object(Queue, "declare", lambda queue, **options: order.append("declare")),
        patch.object(step, "_setup_delayed_delivery", lambda *args: order.append("bind")),
    ):
        step(Mock()).start(MagicMock(app=app))
    return order[0] == "bind"


def a_lost_connection_is_replaced_by_one_that_consumes_nothing(is_cured, redis):
    """A greenlet that acknowledges finds the connection lost. The event loop doesn't."""
    import gevent.event

    checks, errors, lost = [], [], gevent.event.Event()
    with Connection("memory://") as connection:
        Consumer(connection.default_channel, [Queue("queue")], on_message=print).consume()
        timer = Mock(call_repeatedly=lambda seconds, check: checks.append(check) or Mock())
        if is_cured:
            step = rabbitmq_steps.NoticeLostConnection(Mock())

        def loop():
            if is_cured:
                step.start(Mock(connection=connection, timer=timer))
            try:
                lost.wait()
                connection.drain_events(timeout=0.1)
            except (ConnectionResetError, TimeoutError) as error:
                errors.append(type(error))

        greenlet = gevent.spawn(loop)
        gevent.sleep(0)
        connection.connection.connected = False
        connection.collect()  # as if it were lost
        for check in checks:
            check()
        lost.set()
        greenlet.join()
    return errors == [TimeoutError]


def a_countdown_under_a_second_is_refused_for_quorum_queues(kind, redis):
    app = kind(broker="pyamqp://", set_as_current=False)
    app.conf.update(task_queues=[QUORUM], task_default_queue="quorum")
    app.conf.update(task_default_exchange="topic", task_default_exchange_type="topic")
    with patch.object(app.amqp, "send_task_message", create=True):
        options = {"countdown": 0.5, "producer": MagicMock(), "ignore_result": True}
        return fails(ValueError, app.send_task, "name", **options)


# Results


def a_result_is_not_stored_after_an_error_of_dynamodb(kind, redis):
    from botocore.exceptions import EndpointConnectionError

    error = EndpointConnectionError(endpoint_url="http://127.0.0.1")
    return not make(kind).exception_safe_to_retry(error)


def a_chord_does_not_get_an_ignored_result(kind, redis):
    backend = make(kind, store_result=Mock())
    with patch.object(KeyValueStoreBackend, "on_chord_part_return"):
        backend.mark_as_done("id", 1, Context(ignore_result=True, chord={"task": "sum"}))
    return not backend.store_result.called


def the_state_retry_replaces_a_result(kind, redis):
    backend = kind(app=Celery(set_as_current=False), url=redis.url)
    backend.mark_as_failure("id", ValueError(), call_errbacks=False)
    backend.mark_as_retry("id", ValueError())
    return backend.get_state("id") == "RETRY"


def greenlets_get_no_result_after_an_error(kind, redis):
    drainer = kind(Mock())
    drainer._shutdown.set()
    fails(Exception, drainer._ensure_not_shut_down)  # tells those who wait
    return fails(Exception, drainer._ensure_not_shut_down)


# The worker


def an_error_of_one_step_ends_the_shutdown(kind, redis):
    """Such as of a channel that is closed in two threads. The connection then gives back no tasks."""
    connection, control = Mock(), Mock(shutdown=Mock(side_effect=OSError))
    consumer = make(kind, hub=Mock(), steps=[connection, control], blueprint=kind.Blueprint())
    fails(OSError, consumer.shutdown)
    return not connection.shutdown.called


def a_soft_shutdown_takes_its_whole_time(is_cured, redis):
    """No task runs any more, but the worker goes on waiting."""
    conf = Celery(set_as_current=False).conf
    conf.worker_soft_shutdown_timeout = 20
    controller = Mock(app=Mock(conf=conf))
    if is_cured:
        step = shutdown.SoftStop(Mock())
        step.timer, step.deadline = Mock(), 1e12
        with patch.object(shutdown.signal, "raise_signal") as end:
            step.check(Mock(app=Mock(conf=conf), **{"pool._pool._pool": []}))
        if not end.called:
            return True
    busy = SimpleNamespace(active_requests={Mock()})
    with patch.object(worker, "sleep") as sleep, patch.object(worker, "state", busy):
        worker.WorkController.wait_for_soft_shutdown(controller)
    return sleep.called


def a_thread_cannot_be_ended(is_cured, redis):
    if is_cured:
        start = patch.object(shutdown._thread, "start_new_thread", lambda end, args: end())
        with start, patch.object(shutdown.os, "_exit") as end:
            shutdown.limit(Mock(), 0, 0)
        return not end.called
    return fails(NotImplementedError, TaskPool.terminate_job, Mock(), 1)


def a_task_that_raises_a_system_exit_never_ends(is_cured, redis):
    app = Celery(set_as_current=False)

    @app.task
    def task():
        sys.exit()

    if is_cured:
        tasks.let_fail(task)
    return fails(SystemExit, trace.build_tracer("task", task, app=app), "id", [], {}, {})


def a_memory_error_ends_the_worker(kind, redis):
    request = MagicMock(spec=kind)
    try:
        raise MemoryError
    except MemoryError:
        return fails(MemoryError, kind.on_failure, request, ExceptionInfo())


# Beat


def beat_does_not_start_with_a_schedule_whose_class_is_gone(kind, redis):
    app = Celery(broker="memory://", set_as_current=False)
    file = redis.popen["cwd"] / "schedule"
    for old in file.parent.glob("schedule*"):
        old.unlink()
    with shelve.open(str(file)) as opened:
        opened["entries"] = {}
        opened.dict[b"entries"] = b"cgone\nSchedule\n."
    return fails(ImportError, kind, app=app, schedule_filename=str(file))


def a_task_that_a_child_has_just_got_is_forgotten(kind, redis):
    """The connection is lost before the child has said so. The task ends, but is never acknowledged."""
    job = Mock(_accepted=False, _write_to=Mock(), _writer=lambda: None)
    children = Mock(_cache={1: job}, _state=RUN, synack=False, outbound_buffer=deque())
    children.configure_mock(_active_writers=set(), _active_writes=set(), _busy_workers=set())
    pool = Mock(_pool=children, flush=lambda: asynpool.AsynPool.flush(children))
    consumer = object.__new__(kind)
    vars(consumer).update(controller=None, task_buckets={}, timer=None, pool=pool, is_prefork=True)
    consumer.on_close()
    return job.discard.called


REDIS = redis.Transport, steady_redis.Transport
CONSUMERS = steady_consumer.StockConsumer, steady_consumer.Consumer
FAULTS = {  # {reproduction: (Celery's or kombu's part, ours)}
    an_acknowledgement_that_fails_is_not_repeated: (virtual.Message, messages.Message),
    redis_redelivers_what_its_own_worker_has: REDIS,
    a_full_redis_loses_a_message: REDIS,
    redis_refuses_a_task_after_two_tries: REDIS,
    sqs_refuses_a_task_after_two_tries: (SQS.Transport, sqs.Transport),
    a_task_is_sent_through_a_closed_channel: REDIS,
    an_idle_connection_that_is_lost_is_not_noticed: (redis.Channel, steady_redis.Channel),
    a_poll_of_sqs_waits_forever: (AsyncHTTPSConnection, sqs.Connection),
    a_poll_of_sqs_that_fails_is_the_last: (SQS.Channel, sqs.Channel),
    sqs_gets_a_message_back_after_a_poll: (SQS.Channel, sqs.Channel),
    no_queue_is_declared_before_it_is_bound: (DelayedDelivery, rabbitmq_steps.DelayedDelivery),
    a_lost_connection_is_replaced_by_one_that_consumes_nothing: (False, True),
    a_countdown_under_a_second_is_refused_for_quorum_queues: (Celery, rabbitmq.Celery),
    a_result_is_not_stored_after_an_error_of_dynamodb: (DynamoDBBackend, dynamodb.DynamoDBBackend),
    a_chord_does_not_get_an_ignored_result: (DynamoDBBackend, dynamodb.DynamoDBBackend),
    the_state_retry_replaces_a_result: (RedisBackend, steady_redis.RedisBackend),
    greenlets_get_no_result_after_an_error: (geventDrainer, steady_redis.results.Drainer),
    a_task_that_a_child_has_just_got_is_forgotten: CONSUMERS,
    an_error_of_one_step_ends_the_shutdown: CONSUMERS,
    a_soft_shutdown_takes_its_whole_time: (False, True),
    a_thread_cannot_be_ended: (False, True),
    a_task_that_raises_a_system_exit_never_ends: (False, True),
    a_memory_error_ends_the_worker: (Request, tasks.failing(Request)),
    beat_does_not_start_with_a_schedule_whose_class_is_gone: (
        beat.PersistentScheduler,
        steady_beat.Scheduler,
    ),
}


@pytest.mark.parametrize(
    ("reproduce", "stock"),
    [
        pytest.param(reproduce, stock, id=reproduce.__name__)
        for reproduce, (stock, _) in FAULTS.items()
    ],
)
def test_the_fault_is_still_there(reproduce, stock, redis):
    assert reproduce(stock, redis), "upstream has cured it: remove the cure"


@pytest.mark.parametrize(
    ("reproduce", "ours"),
    [
        pytest.param(reproduce, ours, id=reproduce.__name__)
        for reproduce, (_, ours) in FAULTS.items()
    ],
)
def test_the_fault_is_cured(reproduce, ours, redis):
    assert not reproduce(ours, redis)
