"""Messages that this package's tests wouldn't think of: whatever they contain, each is where it should be."""

import json
import uuid
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu import Connection, Consumer, Queue

TEXTS = st.text(st.characters(exclude_categories=()), max_size=5)  # with halves of surrogate pairs
FLOATS = st.floats() | st.sampled_from([1e400, -0.0])
LEAVES = st.none() | st.booleans() | st.integers() | FLOATS | TEXTS
NESTED = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXTS, x, max_size=3)
)
TIMES = st.sampled_from(
    ["2999-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"]
)
VALUES = NESTED | TIMES | st.sampled_from([{"__type__": "money", "__value__": 1}, 10**400, "\0"])
HEADERS = (
    "task",
    "id",
    "eta",
    "expires",
    "retries",
    "timelimit",
    "stamped_headers",
    "redelivered",
    "mine",
)
PROPERTIES = (
    "delivery_tag",
    "delivery_info",
    "priority",
    "deliveries",
    "body_encoding",
    "expiration",
    "mine",
)
PARTS = "headers", "properties", "body", "content-type", "content-encoding"


def envelope(headers, properties, parts):
    """A message of kombu's, of which some parts are others."""
    info = {"exchange": "", "routing_key": "queue"}
    own = {"delivery_tag": str(uuid.uuid4()), "delivery_info": info, "body_encoding": "base64"}
    return {
        "body": "W10=",
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "task", "id": "1", **headers},
        "properties": {**own, "priority": 0, **properties},
        **parts,
    }


ENVELOPES = st.builds(
    envelope,
    st.dictionaries(st.sampled_from(HEADERS) | TEXTS, VALUES, max_size=3),
    st.dictionaries(st.sampled_from(PROPERTIES) | TEXTS, VALUES, max_size=3),
    st.dictionaries(st.sampled_from(PARTS), VALUES, max_size=1),
)


@st.composite
def items(draw):
    """What a list in Redis may have: a message, JSON that is none, what only looks like JSON, bytes."""
    value = draw(ENVELOPES | VALUES)
    text = json.dumps(
        value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1]))
    )
    text = draw(
        st.sampled_from(["{}", " {}\r\n", "\t \t{}", '["{}", "", "x"]', "{}, 0x10", "[" * 9999])
    ).replace("{}", text)
    changed = draw(st.sampled_from([{}, {"task": "ta\1sk"}, {": 0": ": 0x10"}, {"}": ""}]))
    for old, new in changed.items():
        text = text.replace(old, new)
    return draw(st.just(text.encode("utf-8", "surrogatepass")) | st.binary(max_size=9))


END = st.sampled_from(["ack", "reject", "requeue", "kill", "close"])
RANDOM = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def connect(redis):
    """A function that connects to the queue, as a worker does."""
    connections = []

    def connect():
        options = {"visibility_timeout": 3600}
        connection = Connection(redis.url, transport=redis.transport, transport_options=options)
        connections.append(connection)
        channel = connection.default_channel
        channel.renews = True
        return channel

    yield connect
    for connection in connections:
        connection.release()


def lapse(redis, channel):
    """Let the leases of a dead worker end, and another one look."""
    for key in "unacked_index", "unacked_leases":
        for tag in redis.client.zrange(key, 0, -1):
            redis.client.zadd(key, {tag: 1})
    channel.renew([])
    redis.client.hset("unacked_renewed", "since", 1)
    channel.restore_lapsed()


def keys(redis):
    return {name: redis.client.type(name) for name in redis.client.keys() if b"_kombu" not in name}


@RANDOM
@given(sent=st.lists(items(), min_size=1, max_size=20), ends=st.lists(END, max_size=40))
def test_each_message_is_acknowledged_or_a_dead_letter_whatever_becomes_of_its_workers(
    redis, connect, sent, ends
):
    redis.client.flushall()
    redis.client.lpush("queue", *sent)
    worker, other = connect(), connect()
    acknowledged = 0
    while (message := worker.basic_get("queue")) or redis.client.llen("queue"):
        if message is None:
            continue  # one that can't be read
        end = ends.pop() if ends else "ack"
        if end == "kill":
            worker.qos._delivered.clear()
            lapse(redis, other)
        elif end == "close":
            worker.qos.restore_unacked_once()
            worker = connect()
        else:
            getattr(message, end)()
            acknowledged += end == "ack"
    assert acknowledged + redis.client.llen("dead-letters") == len(sent)
    left = set(keys(redis)) - {b"queue\x06\x16bell", b"unacked_renewed"}
    assert left <= {b"dead-letters", b"dead-letters\x06\x16bell"}
    unread = {*redis.client.lrange("dead-letters", 0, -1)} - {*sent}
    assert all(
        isinstance(json.loads(text)["properties"], dict) for text in unread
    )  # was given back


@RANDOM
@given(sent=st.lists(items(), min_size=9, max_size=30))
def test_each_message_of_a_stock_sender_arrives_or_waits_or_is_a_dead_letter(redis, connect, sent):
    redis.client.flushall()
    redis.client.lpush("queue", *sent)
    channel, arrived = connect(), []
    queue = Queue("queue", durable=True)(channel)
    with Consumer(channel, [queue], callbacks=[lambda body, message: None]) as consumer:
        consumer.on_decode_error = consumer.receive = lambda message, *args: arrived.append(message)
        while redis.client.llen("queue") or redis.client.hlen("unacked") > len(arrived):
            with suppress(TimeoutError):
                channel.connection.drain_events(channel.connection.client, timeout=0.01)
    waiting = sum(map(redis.client.zcard, redis.client.keys("*delayed")))
    assert len(arrived) + waiting + redis.client.llen("dead-letters") == len(sent)
    assert redis.client.hlen("unacked") == len(arrived) == redis.client.zcard("unacked_leases")
