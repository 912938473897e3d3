"""The transport of Redis: each step is one in Redis, and nothing is lost between two."""

import json
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from queue import Empty

import pytest
from celery import Celery
from kombu import Connection, Consumer, Queue
from redis.exceptions import ResponseError
from servers import LIMIT, until
from workers import in_thread

from celery_steady.redis import DELIVERIES, IDLE, STOCK, release_countdowns

PREFIX = "{p}:"
BELL, DELAYED = "\x06\x16bell", "\x06\x16delayed"
HOUR = 3600


@pytest.fixture
def open(redis):
    """A function that connects to queues: open("a", "b", stock=True)."""
    with ExitStack() as stack:

        def open(*queues, stock=False, **options):
            options = {"global_keyprefix": PREFIX, "visibility_timeout": HOUR, **options}
            kwargs = {} if stock else {"transport": redis.transport}
            connection = Connection(redis.url, transport_options=options, **kwargs)
            stack.enter_context(connection)
            client = Client(connection)
            for name in queues or ["queue"]:
                Queue(name, durable=True)(client.channel).declare()
            return client

        yield open
    names = [key.decode() for key in redis.client.scan_iter()]
    assert all(name.startswith((PREFIX, "_kombu")) for name in names), names


class Client:
    def __init__(self, connection):
        self.connection, self.channel = connection, connection.default_channel

    def send(self, text, queue="queue", seconds=None, **options):
        if seconds is not None:
            due = datetime.now(UTC) + timedelta(seconds=seconds)
            options["headers"] = {"eta": due.isoformat()}
        self.connection.Producer().publish(text, routing_key=queue, **options)

    def get(self, queue="queue", **options):
        return self.channel.basic_get(queue, **options)

    @contextmanager
    def consuming(self, *queues, prefetch=1, no_ack=False):
        """Give a list, to which look() adds what arrives."""
        arrived = []
        queues = [Queue(name, durable=True) for name in queues or ["queue"]]
        callbacks = [lambda body, message: arrived.append(message)]
        with Consumer(self.channel, queues, callbacks=callbacks, no_ack=no_ack) as consumer:
            consumer.qos(prefetch_count=prefetch)
            yield arrived

    def look(self):
        """Let what is in the queues arrive."""
        with suppress(TimeoutError):
            while True:
                self.connection.drain_events(timeout=0.1)

    def wait(self, arrived, count=1):
        """Wait until so many have arrived."""
        while len(arrived) < count:
            self.connection.drain_events(timeout=LIMIT)


def waiting(redis, queue="queue"):
    return redis.client.llen(PREFIX + queue)


def delayed(redis, queue="queue"):
    return redis.client.zcard(PREFIX + queue + DELAYED)


def unacked(redis):
    count = redis.client.hlen(PREFIX + "unacked")
    assert count == redis.client.zcard(PREFIX + "unacked_index")
    return count


def calls(redis, command):
    """Return how often Redis has run this command."""
    return redis.client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"]


def make_lapsed(redis):
    """Let time pass, without a gap of renewals."""
    tags = redis.client.zrange(PREFIX + "unacked_index", 0, -1)
    redis.client.zadd(PREFIX + "unacked_index", dict.fromkeys(tags, 1))
    redis.client.hset(PREFIX + "unacked_renewed", "since", 1)


def test_a_delivered_message_is_noted_in_the_same_step(open, redis):
    client = open()
    client.send("sent")
    with client.consuming() as arrived:
        client.look()
        assert [message.payload for message in arrived] == ["sent"]
        assert unacked(redis) == 1 and not waiting(redis)
        arrived[0].ack()
    assert not unacked(redis)


def test_a_consumer_without_a_free_slot_takes_nothing(open, redis):
    client = open()
    with client.consuming(prefetch=2) as arrived:
        for text in "one", "two", "three":
            client.send(text)
        client.look()
        assert len(arrived) == 2
        assert waiting(redis) == 1
        arrived[0].ack()
        client.look()
        assert len(arrived) == 3


def test_a_message_that_needs_no_acknowledgement_is_not_noted(open, redis):
    client = open()
    with client.consuming(no_ack=True) as arrived:
        client.send("sent")
        client.look()
        assert len(arrived) == 1 and not unacked(redis)
    client.send("sent")
    assert client.get(no_ack=True).payload == "sent"
    assert not unacked(redis)


def test_a_waiting_consumer_is_woken_by_a_message_and_looks_only_once(open, redis):
    client, sender = open(), open()
    with client.consuming(prefetch=2) as arrived:
        client.look()
        assert client.channel._in_poll and client.channel.asked == "BRPOP"
        sender.send("sent")
        client.connection.drain_events(timeout=LIMIT)
        assert arrived
        assert client.channel.look_at > client.channel._brpop_sent_at + IDLE / 2  # for the bell


def test_a_consumer_that_was_busy_looks_before_it_waits(open, redis):
    client = open()
    client.send("later", seconds=0.5)
    client.send("sent")
    with client.consuming() as arrived:
        client.look()
        time.sleep(0.5)
        arrived[0].ack()
        waits = calls(redis, "brpop")
        client.connection.drain_events(timeout=LIMIT)
        assert arrived[1].payload == "later" and calls(redis, "brpop") == waits


def test_an_inspection_gets_its_replies_in_time(redis):
    """Each waits in a queue that expires, and whose messages need no acknowledgement."""
    app = Celery(broker=redis.url, set_as_current=False)
    app.conf.update(broker_transport=redis.transport)
    with in_thread(app) as worker:
        # It may not listen yet, and then gets no ping.
        [replies] = until(lambda: app.control.ping(timeout=LIMIT / 6, limit=1), "a reply")
        assert replies == {worker.hostname: {"ok": "pong"}}


def test_bells_that_nobody_waits_for_are_few(open, redis):
    client = open()
    for _ in range(150):
        client.send("sent")
    assert redis.client.llen(PREFIX + "queue" + BELL) == 100
    client.connection.default_channel.queue_purge("queue")
    with client.consuming():
        client.look()
        assert not redis.client.llen(PREFIX + "queue" + BELL)


def test_a_countdown_waits_in_redis(open, redis):
    client = open()
    with client.consuming() as arrived:
        client.send("later", seconds=1)
        client.send("past", seconds=-100)
        client.look()
        assert [message.payload for message in arrived] == ["past"]
        arrived[0].ack()
        assert delayed(redis) == 1 and not unacked(redis)
        client.wait(arrived, 2)
        assert arrived[1].payload == "later"


def test_a_countdown_starts_in_time(open):
    client = open()
    with client.consuming() as arrived:
        client.send("later", seconds=0.5)
        due = time.monotonic() + 0.5
        client.wait(arrived)
        assert due - 0.1 < time.monotonic() < due + LIMIT


def test_a_countdown_of_a_stock_sender_waits_in_redis_too(open, redis):
    client, stock = open(), open(stock=True)
    with client.consuming() as arrived:
        stock.send("later", seconds=3)
        assert waiting(redis) == 1
        until(lambda: client.look() or delayed(redis), "it waits")
        assert not arrived and not unacked(redis)
        client.wait(arrived)
        assert arrived[0].payload == "later"


@pytest.mark.parametrize("eta", ["2999-01-01T00:00:00", "no time", 5, None])
def test_other_times_are_for_the_worker(open, eta):
    client = open()
    with client.consuming() as arrived:
        client.send("sent", headers={"eta": eta})
        client.look()
        assert arrived


def test_priorities_and_turns_are_those_of_kombu(open):
    client = open("a", "b")
    for queue in "a", "b":
        client.send(f"last {queue}", queue, priority=9)
        client.send(f"first {queue}", queue, priority=0)
        client.send(f"second {queue}", queue, priority=0)
    with client.consuming("a", "b", prefetch=0) as arrived:
        client.look()
    order = [message.payload.split()[0] for message in arrived]
    assert order == ["first", "first", "second", "second", "last", "last"]
    queues = [message.payload.split()[1] for message in arrived]
    assert queues[0] != queues[1] and queues[2] != queues[3]


def test_stock_consumers_and_ours_understand_each_other(open, redis):
    ours, stock = open(), open(stock=True)
    stock.send("to ours")
    assert ours.get().payload == "to ours"
    ours.send("to stock")
    message = stock.get()
    assert message.payload == "to stock"
    message.ack()
    ours.channel.qos.restore_unacked_once()
    assert stock.get().payload == "to ours"


def test_a_stock_consumer_puts_back_what_we_noted(open, redis):
    ours, stock = open(), open(stock=True)
    ours.send("sent")
    ours.get()
    make_lapsed(redis)
    stock.channel.qos.restore_visible(interval=1)
    assert stock.get().payload == "sent"


def test_a_running_task_of_a_stock_worker_stays_with_it_for_an_hour(open, redis):
    ours, stock = open(visibility_timeout=1), open(stock=True)
    stock.send("sent")
    stock.get()
    ours.channel.renew()
    make_lapsed(redis)
    for seconds, count in (STOCK - 100, 0), (STOCK + 100, 1):
        [tag] = redis.client.zrange(PREFIX + "unacked_index", 0, -1)
        now = redis.client.time()[0]
        redis.client.zadd(PREFIX + "unacked_index", {tag: now - seconds})
        ours.channel.renew()
        assert waiting(redis) == count


def test_each_lapsed_message_is_put_back_once(open, redis):
    dead, one, two = open(), open(), open()
    for number in range(5):
        dead.send(number)
        dead.get()
    one.channel.renew()
    make_lapsed(redis)
    found = []
    one.channel.qos.put_back = lambda *args, **kwargs: found.append(args)
    one.channel.renew()  # it dies before it has put them back
    assert len(found) == 5
    two.channel.renew()
    assert not waiting(redis)
    make_lapsed(redis)
    two.channel.renew()
    assert waiting(redis) == 5 and not unacked(redis)


def test_nothing_is_put_back_until_all_could_renew(open, redis):
    """Redis was away, or refused to write, longer than the visibility timeout."""
    client, other = open(visibility_timeout=100), open(visibility_timeout=100)
    client.send("running")
    client.get()
    client.channel.renew()
    make_lapsed(redis)
    redis.client.hset(PREFIX + "unacked_renewed", "at", redis.client.time()[0] - 200)
    other.channel.renew()
    other.channel.qos.restore_visible()
    assert not waiting(redis)
    client.channel.renew()
    redis.client.hset(PREFIX + "unacked_renewed", "since", 1)
    other.channel.renew()
    assert not waiting(redis) and unacked(redis) == 1


def test_a_message_that_kills_each_worker_becomes_a_dead_letter(open, redis, caplog):
    client = open()
    client.channel.renew()
    client.send("poison")
    for _ in range(DELIVERIES):
        assert client.get().payload == "poison"
        client.channel.qos._delivered.clear()  # the worker is killed
        make_lapsed(redis)
        client.channel.renew()
    assert not client.get() and not unacked(redis)
    assert client.get("dead-letters").payload == "poison"
    assert "20 workers died" in caplog.text


def test_a_message_that_workers_give_back_does_not(open, redis):
    client = open()
    client.send("sent")
    for _ in range(2 * DELIVERIES):
        client.get().requeue()
    assert client.get().payload == "sent"


def test_a_rejected_message_becomes_a_dead_letter(open, redis):
    client = open()
    client.send("refused")
    client.get().reject()
    assert not client.get() and not unacked(redis)
    assert client.get("dead-letters").payload == "refused"


def test_a_purge_and_a_deletion_know_countdowns(open, redis):
    client = open()
    client.send("now")
    client.send("later", seconds=100)
    assert client.channel._size("queue") == 1
    assert client.channel.queue_purge("queue") == 2
    assert not delayed(redis) and not waiting(redis)
    client.send("now")
    client.send("later", seconds=100)
    client.channel._delete("queue", "", "queue", None)
    left = [key for key in redis.client.scan_iter() if key.startswith((PREFIX + "queue").encode())]
    assert not left


def test_a_full_redis_refuses_and_loses_nothing(open, redis):
    client = open()
    client.send("later", seconds=0.2)
    client.send("sent")
    with client.consuming(prefetch=2) as arrived:
        redis.client.config_set("maxmemory", 1)
        with pytest.raises(ResponseError):
            client.send("too much")
        client.wait(arrived, 2)
        assert unacked(redis) == 2
        client.channel.renew()
        arrived[0].requeue()
    assert waiting(redis) == 1


def test_a_batch_of_messages_is_sent_and_rings(open, redis):
    client = open()
    if not hasattr(client.channel, "create_publish_batch"):
        pytest.skip("since kombu 5.7")
    batch = client.channel.create_publish_batch(10)
    for seconds in -1, 100:
        headers = {"eta": (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()}
        message = client.channel.prepare_message("{}", headers=headers)
        batch.publish(message, exchange="", routing_key="queue")
    batch.flush()
    batch.close()
    assert waiting(redis) == delayed(redis) == 1
    assert redis.client.llen(PREFIX + "queue" + BELL) == 2


def test_what_is_no_json_does_not_stop_the_queue(open, redis):
    client = open()
    redis.client.lpush(PREFIX + "queue", "no JSON")
    client.send("sent")
    with client.consuming() as arrived:
        client.look()
    assert arrived[0].payload == "sent"


def test_an_entry_without_a_message_is_forgotten(open, redis):
    client = open()
    client.channel.renew()
    redis.client.zadd(PREFIX + "unacked_index", {"gone": 1})
    redis.client.hset(PREFIX + "unacked_renewed", "since", 1)
    client.channel.renew()
    assert not unacked(redis)


def test_a_queue_that_expires_keeps_doing_so(open, redis):
    client = open()
    queue = Queue("short", expires=100, durable=True)
    queue(client.channel).declare()
    client.send("sent", "short")
    assert json.loads(redis.client.lindex(PREFIX + "short", 0))
    if hasattr(client.channel, "_expires"):  # since kombu 5.6
        for name in "short", "short" + BELL:
            assert redis.client.ttl(PREFIX + name) > 0


def test_without_this_package_stock_workers_get_the_countdowns(open, redis):
    options = {"global_keyprefix": PREFIX}
    app = Celery(broker=redis.url, set_as_current=False)
    app.conf.update(broker_transport=redis.transport, broker_transport_options=options)
    app.conf.task_default_queue = "queue"
    open().send("later", seconds=100, priority=9)
    assert release_countdowns(app) == 1 and not release_countdowns(app)
    message = open(stock=True).get()
    assert message.payload == "later" and message.headers["eta"]


def test_an_empty_queue_raises_what_kombu_raises(open):
    with pytest.raises(Empty):
        open().channel._get("queue")
