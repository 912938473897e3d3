"""Whatever a message contains: its task runs or fails, or it is a dead letter. The worker goes on."""

import base64
import json
import logging
import re
import signal
import struct
import uuid
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import kombu
import pytest
from amqp.exceptions import FrameSyntaxError
from billiard.pool import ApplyResult
from celery import Celery
from celery.concurrency import prefork, thread
from celery.exceptions import InvalidTaskError
from celery.worker.request import create_request_cls
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu import Queue
from redis.exceptions import ResponseError
from servers import until
from workers import in_thread

from celery_steady import children, malformed, tasks

DEEP, TOO_DEEP = ("[" * depth + "]" * depth for depth in (480, 100_000))
ROW = '[[2, 3], {}, {"callbacks": null}]'


def envelope(body=ROW, headers=None, properties=None, **more):
    """A message in Redis, for the task add(2, 3)."""
    id = str(uuid.uuid4())
    sent = {"task": "worker_app.add", "id": id, "timelimit": [None, None], "retries": 0}
    info = {"exchange": "", "routing_key": "celery"}
    delivery = {"delivery_tag": id, "delivery_info": info, "body_encoding": "base64"}
    return {
        "body": base64.b64encode(body.encode(errors="surrogatepass")).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {**sent, **(headers or {})},
        "properties": {**delivery, "priority": 0, **(properties or {})},
        **more,
    }


# What ends a worker of Celery's, or takes one of its free slots forever. Some need a pool with processes.
HEADERS = [
    {"timelimit": 5},
    {"timelimit": ["soon", None]},
    {"timelimit": [None, []] * 2},
    {"timelimit": [float("nan"), None]},
    {"timelimit": [{"a": 1}, 10**400]},
    {"stamped_headers": True},
    {"stamped_headers": 7, "stamps": 7},
    {"eta": []},
    {"eta": {}},
    {"eta": False},
    {"eta": "10000-01-01"},
    {"eta": "2024-13-01T00:00:00+00:00"},
    {"expires": {}},
    {"expires": 0},
    {"expires": "never"},
    {"task": []},
    {"task": {"name": "add"}},
    {"task": None},
    {"id": None},
    {"id": 5},
    {"id": []},
    {"shadow": json.loads(DEEP)},
]
BODIES = [
    "",
    "{",
    "5",
    '"text"',
    "null",
    "[]",
    "[[], {}]",
    "[[], {}, {}, {}]",
    "[[], {}, 5]",
    "[[], {}, [1]]",
    '[[], {}, "text"]',
    TOO_DEEP,
    f"[[{'[' * 2000}{']' * 2000}], {{}}, {{}}]",
    "\ud800",
]
MALFORMED = [envelope(headers=headers) for headers in HEADERS]
MALFORMED += [envelope(body=body) for body in BODIES]
MALFORMED += [
    envelope(headers={"compression": "application/x-gzip"}),
    envelope(headers={"compression": "unknown"}),
    envelope(headers={"compression": 5}),
    envelope(**{"content-type": "application/x-python-serialize"}),
    envelope(**{"content-type": {}}),
]
# What only other clients of Redis can send
RAW = ["no JSON", "{}", "[]", "null", "5", '{"body": "W10="}', TOO_DEEP, "\\ud800", "0x10"]
RAW += [
    json.dumps(envelope(**more))
    for more in (
        {"properties": {"delivery_info": 5}},
        {"properties": {"delivery_info": "text"}},
        {"properties": {"body_encoding": "unknown"}},
        {"properties": {"body_encoding": []}},
    )
]
RAW += [
    json.dumps({**envelope(), **more})
    for more in (
        {"body": 5},
        {"body": ["W10="]},
        {"body": "%"},
        {"headers": 5},
        {"headers": None},
        {"headers": [["task", "add"]]},
        {"headers": "text"},
        {"properties": None},
    )
]
# Celery runs these, or its task fails: so do we.
ODD = [
    envelope(headers={name: value})
    for name in (
        "retries",
        "group",
        "group_index",
        "parent_id",
        "root_id",
        "origin",
        "argsrepr",
        "lang",
    )
    for value in ("x", [], {"a": [1]}, -1.5)
]
ODD += [envelope(**{"content-encoding": "none"})]
ODD += [envelope(properties={"correlation_id": []}), envelope(properties={"reply_to": {"a": 1}})]
ODD += [envelope(headers={"argsrepr": "x" * 1_000_000}), envelope(body='[5, "x", {}]')]
ODD += [envelope(headers={"stamped_headers": ["a"], "stamps": 5}), envelope("[[], {}, null]")]


# With processes, these can't be sent to one.
DEEP_ONES = [envelope(f"[[{DEEP}, 3], {{}}, {{}}]"), envelope(f'[[], {{"x": {DEEP}}}, {{}}]')]


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_malformed_message_is_a_dead_letter(pool, start, steady, send, settled, redis):
    worker = start(steady, pool=pool)
    bad, deep = map(json.dumps, MALFORMED), list(map(json.dumps, DEEP_ONES))
    expected = {*bad, *RAW, *(deep if pool == "prefork" else [])}
    redis.client.lpush("celery", *expected.union(deep), *map(json.dumps, ODD))
    assert send("add", 2, 3).get() == 5
    settled()
    assert worker.is_running()
    assert set(map(bytes.decode, redis.client.lrange("dead-letters", 0, -1))) == expected
    lines = worker.text().splitlines()
    assert sum("rejected a message" in line or "dead letter" in line for line in lines) == len(
        expected
    )
    worker.stop(signal.SIGTERM)
    assert worker.wait() == 0


@pytest.fixture
def rejected():
    """The lines of log about messages that were rejected."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    malformed.logger.addHandler(handler)
    yield lines
    malformed.logger.removeHandler(handler)


@pytest.fixture
def app(request):
    """An app with one task, add(x, y), on the broker that the test names."""
    app = Celery("worker_app", set_as_current=False)
    app.conf.update(worker_consumer="celery_steady.consumer:Consumer", task_acks_late=True)
    app.conf.broker_url = "memory://"
    if request.param != "memory":
        server = request.getfixturevalue(request.param)
        app.conf.update(broker_url=server.url, broker_transport_options=server.transport_options)
        app.conf.broker_transport = server.transport
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead-letters"}
    # A queue of its own: moto gives a message to a poll of a worker that has just ended.
    app.conf.task_default_queue = f"malformed-{uuid.uuid4()}"
    app.conf.task_queues = [Queue(app.conf.task_default_queue, queue_arguments=arguments)]
    app.ran = []

    @app.task(shared=False, name="worker_app.add")
    def add(x, y):
        app.ran.append((x, y))

    yield app
    app.close()


def send_all(app, messages):
    """Send them as a producer does, but those that RabbitMQ's headers can't have. Return the others."""
    sent = []
    messages = [
        each for each in messages if not re.search(r"NaN|\[{9}", json.dumps(each["headers"]))
    ]
    with app.producer_pool.acquire(block=True) as producer:
        for message in messages:
            try:
                producer.publish(
                    base64.b64decode(message["body"]) + b" ",  # kombu drops an empty one
                    headers=message["headers"],
                    content_type=message["content-type"],
                    content_encoding=message["content-encoding"],
                    exchange="",
                    routing_key=app.conf.task_default_queue,
                )
                sent.append(message)
            except (FrameSyntaxError, RecursionError, TypeError, struct.error):
                producer.revive(producer.connection.channel())
    return sent


@pytest.mark.parametrize("pool", ["solo", "threads"])
@pytest.mark.parametrize("app", ["redis", "rabbitmq", "sqs", "memory"], indirect=True)
def test_on_each_broker_a_malformed_message_ends_no_worker(app, pool, rejected):
    with app.connection_for_write() as connection:
        dead = Queue("dead-letters", channel=connection.default_channel)
        before = dead.queue_declare().message_count
        with in_thread(app, pool):
            sent = send_all(app, MALFORMED)
            assert len(sent) > len(MALFORMED) - 5
            app.send_task("worker_app.add", (20, 30))
            until(lambda: (20, 30) in app.ran and len(rejected) >= len(sent), "all have ended")
        if app.conf.broker_url.startswith(("redis", "amqp")):
            kept = dead.queue_declare(passive=True).message_count - before
            assert kept == len(sent) == len(rejected)


@pytest.fixture
def working(app):
    with in_thread(app, "threads"):
        yield app


@pytest.mark.parametrize(
    ("error", "is_its"),
    [(error, True) for error in (KeyError(), OverflowError(), RecursionError(), InvalidTaskError())]
    + [(MemoryError(), False), (RuntimeError("can't start new thread"), False)]
    + [(ConnectionResetError(), False), (ResponseError("read only"), False)],
)
def test_an_error_that_is_not_a_messages_ends_none(error, is_its):
    dropped = []
    lost = {"connection_errors": (OSError,), "channel_errors": (ResponseError,)}
    consumer = SimpleNamespace(drop=lambda *args: dropped.append(args), **lost)
    with nullcontext() if is_its else pytest.raises(type(error)):
        malformed.handle_or_drop(consumer, Mock(side_effect=error), "message")
    assert dropped == [("message", error)] * is_its


def test_a_job_that_could_not_be_sent_to_a_child_is_forgotten():
    cache, pool = {}, object.__new__(prefork.TaskPool)
    pool._pool = SimpleNamespace(threads=False, _cache=cache)
    sent, _ = ApplyResult(cache, None), ApplyResult(cache, None)
    sent._payload = b""
    children.forget_unsent(pool)
    assert list(cache.values()) == [sent]


def test_a_task_that_comes_when_its_pool_has_ended_is_no_dead_letter():
    """It waited for its time, for example. The worker gives it back."""
    app = Celery(broker="memory://", set_as_current=False)
    task, pool = app.tasks["celery.backend_cleanup"], thread.TaskPool(1)
    message = kombu.Message(
        ROW, headers={"id": "1", "task": task.name}, content_type="application/json"
    )
    base = tasks.failing(task.Request)
    request = create_request_cls(base, task, pool, "name", None, app=app)(
        message, app=app, task=task
    )
    pool.start()
    pool.stop()
    with pytest.raises(RuntimeError):
        request.execute_using_pool(pool)
    assert not request.acknowledged


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda each: (
        st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.text(max_size=5) | st.sampled_from(
    "task id shadow eta expires timelimit retries group group_index root_id parent_id argsrepr"
    " kwargsrepr origin ignore_result stamped_headers stamps replaced_task_nesting groups lang"
    " compression utc args kwargs callbacks chord hostname delivery_info reply_to".split()
)
PROPERTIES = "correlation_id reply_to priority expiration headers delivery_mode".split()


@pytest.mark.parametrize("app", ["redis"], indirect=True)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    headers=st.dictionaries(NAMES, ANYTHING, max_size=4),
    properties=st.dictionaries(st.sampled_from(PROPERTIES), ANYTHING, max_size=2),
    body=st.just(ROW) | st.text(max_size=20) | ANYTHING.map(json.dumps),
    more=st.dictionaries(st.sampled_from(["content-type", "content-encoding"]), ANYTHING),
)
def test_whatever_a_message_contains_it_ends(working, redis, headers, properties, body, more):
    """It runs, it is a dead letter, or it waits until it's due."""
    before = redis.client.llen("dead-letters")
    message = envelope(body, headers, properties, **more)
    redis.client.lpush("malformed", json.dumps(message))
    working.send_task("worker_app.add", (20, 30))
    until(lambda: (20, 30) in working.ran, "the next task runs")
    working.ran.clear()
    until(lambda: not redis.client.hlen("unacked"), "it has ended")
    assert redis.client.llen("dead-letters") - before in (0, 1)
