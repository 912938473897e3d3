"""A message that is sent again, because a worker doesn't know its task or from the dead letters, is the same."""

import json
import time
import uuid
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import kombu
import pytest
from amqp.exceptions import ChannelError
from celery import Celery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu import Queue
from kombu.compression import encoders
from kombu.utils.encoding import ensure_bytes
from redis.exceptions import ResponseError
from servers import LIMIT, until

from celery_steady import dead_letters, unknown
from celery_steady.dead_letters import send_back
from celery_steady.resend import send_again

DELAYED = "celery\x06\x16delayed"


@pytest.fixture(params=["redis", "rabbitmq", "memory"])
def connection(request):
    if request.param == "memory":
        with kombu.Connection("memory://") as connection:
            yield connection
        return
    server = request.getfixturevalue(request.param)
    app = Celery(set_as_current=False)
    app.conf.update(broker_url=server.url, broker_transport=server.transport)
    with app.connection_for_write() as connection:
        yield connection


def again(connection, body, headers, **options):
    """Send a message, and again what was received. Return both messages as they were received."""
    channel = connection.channel()
    queue = Queue("again", channel=channel, durable=True)
    queue.declare()
    queue.purge()
    channel.Producer().publish(body, routing_key="again", headers=headers, **options)
    first = queue.get()
    send_again(channel, first, first.headers)
    first.ack()
    second = queue.get()
    second.ack()
    channel.close()
    return first, second


SENT = {
    "correlation_id": "c",
    "reply_to": "r",
    "message_id": "m",
    "app_id": "a",
    "type": "t",
    "timestamp": 1_700_000_000,
    "delivery_mode": 1,
    "priority": 3,
}


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.binary(min_size=1) | st.just(b"x" * 100_000),
    content=st.sampled_from(
        [
            ("application/json", "utf-8"),
            ("application/data", "binary"),
            ("application/x-yaml", "utf-8"),
        ]
        + [("application/x-python-serialize", "binary"), ("application/x-msgpack", "binary")]
    ),
    compression=st.sampled_from([None, *encoders()]),
    headers=st.dictionaries(
        st.text("abc", min_size=1),
        st.text("a\u20ac\0") | st.integers(0, 9) | st.booleans() | st.none(),
    ),
    sent=st.sets(st.sampled_from(sorted(SENT))),
)
def test_a_message_that_is_sent_again_is_the_same(
    connection, body, content, compression, headers, sent
):
    types = dict(zip(["content_type", "content_encoding"], content, strict=True))
    options = {name: SENT[name] for name in sent}
    first, second = again(connection, body, headers, compression=compression, **types, **options)
    for name in "body", "headers", "content_type", "content_encoding":
        assert getattr(first, name) == getattr(second, name)
    assert ensure_bytes(first.body) == body
    own = "delivery_tag", "body_encoding", "delivery_info"
    kept = [{k: v for k, v in each.properties.items() if k not in own} for each in (first, second)]
    assert kept[0] == kept[1]


def test_a_message_that_expires_still_does(connection):
    first, second = again(connection, b"{}", {}, expiration=1000)
    assert first.properties["expiration"] == second.properties["expiration"] == "1000000"


@pytest.mark.parametrize("compression", [None, "gzip", "bzip2"])
def test_an_unknown_task_runs_on_a_newer_worker(
    compression, start, steady, send, redis, monkeypatch
):
    old = start(steady, pool="threads")
    result = send("newer", compression=compression)
    until(lambda: "unknown task" in old.text(), "the old worker gets it")
    old.kill()
    start(steady, pool="threads", NEWER="1")
    assert result.get() == "newer"


@pytest.fixture
def receive(steady, client):
    """A function that returns a message of an unknown task, and the consumer that got it."""
    app = client(steady)
    with app.connection_for_write() as connection:
        queue = Queue("celery", channel=connection.channel())

        def receive(headers):
            app.send_task("unknown", headers=headers)
            return SimpleNamespace(app=app, connection_errors=()), queue.get()

        yield receive


@pytest.mark.parametrize(
    ("since", "kept"),
    [(value, True) for value in ("x", None, [], {}, float("nan"), float("inf"), 10**400)]
    + [(True, False), (0, False), (-1.5, False)],
)
def test_an_odd_header_is_no_error(since, kept, receive, redis):
    """A task that waits begins to wait now, or has waited long enough."""
    consumer, message = receive({unknown.HEADER: since})
    assert unknown.keep(consumer, message) is kept
    sent = [json.loads(each)["headers"] for each in redis.client.zrange(DELAYED, 0, -1)]
    assert [time.time() - headers[unknown.HEADER] < LIMIT for headers in sent] == [True] * kept
    assert message.acknowledged is kept


@pytest.mark.parametrize(("hours", "later"), [(2, True), (-2, False)])
def test_an_unknown_task_starts_at_its_own_time_at_the_earliest(hours, later, receive, redis):
    own = datetime.now(UTC) + timedelta(hours=hours)
    consumer, message = receive({})
    message.headers["eta"] = own.isoformat()  # it came too early
    assert unknown.keep(consumer, message)
    [(_, due)] = redis.client.zrange(DELAYED, 0, -1, withscores=True)
    assert (abs(due - own.timestamp()) < 1) is later and due > time.time()


def test_a_message_that_cannot_be_sent_again_is_not_acknowledged(receive, redis):
    consumer, message = receive({})
    redis.client.config_set("maxmemory", 1)
    with pytest.raises(ResponseError):
        unknown.keep(consumer, message)
    assert not message.acknowledged


def test_on_a_broker_that_cannot_wait_an_unknown_task_is_rejected():
    with kombu.Connection("memory://") as connection:
        queue = Queue("celery", channel=connection.channel())
        queue.declare()
        app = Celery(broker="memory://", set_as_current=False)
        app.send_task("unknown")
        consumer = SimpleNamespace(app=app, connection_errors=())
        assert not unknown.keep(consumer, message := queue.get())
        assert not message.acknowledged


@pytest.fixture(params=["redis", "rabbitmq"])
def app(request):
    """An app whose queue has dead letters, and a function that makes one."""
    server = request.getfixturevalue(request.param)
    app = Celery(set_as_current=False)
    app.conf.update(broker_url=server.url, broker_transport=server.transport)
    with app.connection_for_write() as connection, connection.channel() as channel:
        arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead-letters"}
        app.dying = Queue(f"dying-{uuid.uuid4()}", channel=channel, queue_arguments=arguments)
        app.dying.declare()
        app.dead = Queue("dead-letters", channel=channel)
        app.dead.declare()
        app.dead.purge()
        yield app


def die(app, **options):
    """Make a dead letter of a message that is sent with these options."""
    producer = app.dying.channel.Producer()
    producer.publish({"number": 1}, routing_key=app.dying.name, **options)
    until(app.dying.get, "it arrives").reject()


def count(queue):
    try:
        return queue.queue_declare(passive=True).message_count
    except ChannelError:  # in Redis, there is no empty one
        return 0


def test_dead_letters_are_sent_back_as_they_were(app):
    die(app, compression="gzip", headers={"a": 1})
    die(app, serializer="yaml")
    until(lambda: count(app.dead) == 2, "they are dead letters")
    assert send_back(app) == 2
    assert send_back(app) == 0
    messages = [until(app.dying.get, "it is back") for _ in range(2)]
    assert messages[0].headers["a"] == 1
    assert [ensure_bytes(message.body) for message in messages] == [
        b'{"number": 1}',
        b"number: 1\n",
    ]


def test_what_cannot_be_sent_back_stays(app, caplog, monkeypatch):
    """Each is looked at once, also if it comes back while others are sent."""
    for death in "none", 5, [], [5], [{}], [{"queue": 5}], [{"queue": "nowhere"}]:
        headers = {} if death == "none" else {"x-death": death}
        app.dead.channel.Producer().publish("x", routing_key=app.dead.name, headers=headers)
    app.dead.channel.Producer().publish(
        b"x", routing_key=app.dead.name, headers={"compression": "gzip"}, content_type="x"
    )
    die(app)
    until(lambda: count(app.dead) == 9, "they are dead letters")
    opened = []

    def count_channels(channel, *args):
        opened.append(len(channel.connection.channels))
        send_again(channel, *args)

    monkeypatch.setattr(dead_letters, "send_again", count_channels)
    sent = send_back(app)
    assert max(opened) == min(opened)
    # In Redis, all but one can be read, and their place is this queue.
    assert sent == (8 if app.conf.broker_url.startswith("redis") else 1)
    until(lambda: count(app.dead) == 8, "the others are there")
    assert len(caplog.records) == 9 - sent
    until(app.dying.get, "it is back").ack()
