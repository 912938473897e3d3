"""The transport of Redis: each step is one in Redis, and nothing is lost between two."""

import json
import re
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import Empty

import pytest
from celery import Celery
from kombu import Connection, Consumer, Queue
from redis.exceptions import ResponseError
from servers import LIMIT, until
from workers import in_thread

from celery_steady.redis import release_countdowns, unacknowledged
from celery_steady.redis.unacknowledged import DELIVERIES, STOCK

PREFIX = "{p}:"
BELL, DELAYED = "\x06\x16bell", "\x06\x16delayed"
HOUR = 3600


@pytest.fixture
def open(redis):
    """A function that connects to queues: open("a", "b", stock=True)."""
    with ExitStack() as stack:

        def open(*queues, stock=False, renews=True, **options):
            options = {"global_keyprefix": PREFIX, "visibility_timeout": HOUR, **options}
            kwargs = {} if stock else {"transport": redis.transport}
            connection = Connection(redis.url, transport_options=options, **kwargs)
            stack.enter_context(connection)
            client = Client(connection)
            client.channel.renews = renews  # as a worker's
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

    def keep(self):
        """Do what a worker does now and then."""
        self.channel.renew(list(self.channel.qos._delivered.values()))
        self.channel.restore_lapsed()

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
    assert not leases(redis) - {*redis.client.hkeys(PREFIX + "unacked")}
    return count


def leases(redis):
    return {*redis.client.zrange(PREFIX + "unacked_leases", 0, -1)}


def calls(redis, command):
    """Return how often Redis has run this command."""
    return redis.client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"]


def make_lapsed(redis, seconds=HOUR):
    """Let the leases end so many seconds ago, without a gap of renewals."""
    ended = redis.client.time()[0] - seconds
    for key in "unacked_index", "unacked_leases":
        for tag in redis.client.zrange(PREFIX + key, 0, -1):
            redis.client.zadd(PREFIX + key, {tag: ended})
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


def test_without_an_event_loop_too_a_slot_that_becomes_free_is_noticed(open):
    client = open()
    with client.consuming() as arrived:
        for text in "first", "second":
            client.send(text)
        client.wait(arrived)
        threading.Timer(0.2, arrived[0].ack).start()
        client.wait(arrived, 2)


def test_a_message_that_needs_no_acknowledgement_is_not_noted(open, redis):
    client, stock = open(), open(stock=True)
    client.send("sent")
    assert client.get(no_ack=True).payload == "sent"
    assert not unacked(redis)
    with client.consuming(no_ack=True) as arrived:
        client.send("sent")
        client.look()
        assert len(arrived) == 1 and not unacked(redis)
        stock.send("without a bell")
        client.wait(arrived, 2)
        assert client.channel.asked[0] == "BRPOP" and not unacked(redis)


def test_a_waiting_consumer_is_woken_by_a_message_and_looks_only_once(open, redis):
    client, sender = open(), open()
    with client.consuming(prefetch=2) as arrived:
        client.look()
        assert client.channel._in_poll and client.channel.asked[0] == "BRPOP"
        sender.send("sent")
        client.connection.drain_events(timeout=LIMIT)
        assert arrived
        assert client.channel.look_at > client.channel._brpop_sent_at  # for the bell


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
        [replies] = until(lambda: app.control.ping(timeout=1, limit=1), "a reply")
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


@pytest.mark.parametrize("timeout", [1, 2 * HOUR])
def test_a_task_of_a_stock_worker_stays_with_it_for_an_hour_or_a_longer_timeout(
    open, redis, timeout
):
    ours, stock = open(visibility_timeout=timeout), open(stock=True)
    stock.send("sent")
    stock.get()
    ours.keep()
    for more, count in (-100, 0), (100, 1):
        make_lapsed(redis, seconds=max(STOCK, timeout) + more)
        ours.keep()
        assert waiting(redis) == count


def test_so_does_one_of_a_consumer_that_no_worker_renews(open, redis):
    consumer, worker = open(renews=False), open(visibility_timeout=1)
    consumer.send("sent")
    consumer.get()
    for seconds, count in (100, 0), (STOCK + 100, 1):
        worker.keep()
        make_lapsed(redis, seconds)
        worker.keep()
        assert waiting(redis) == count


def test_such_consumers_put_back_messages_of_each_other(open, redis):
    dead, other = open(renews=False), open(renews=False)
    dead.send("sent")
    dead.get()
    make_lapsed(redis, STOCK + 100)
    other.channel.qos.restore_visible()
    assert waiting(redis) == 1


def test_each_lapsed_message_is_put_back_once(open, redis):
    dead, one, two = open(), open(), open()
    for number in range(15):
        dead.send(number)
        dead.get()
    one.keep()
    make_lapsed(redis)
    found = []
    one.channel.qos.put_back = lambda *args, **kwargs: found.append(args)
    one.keep()  # it dies before it has put them back
    assert len(found) == 15
    two.keep()
    assert not waiting(redis)
    make_lapsed(redis)
    two.keep()
    assert waiting(redis) == 15 and not unacked(redis)


def test_renewals_of_an_older_version_stop_no_worker(open, redis):
    """They don't say which lease is the longest."""
    dead, worker = open(), open()
    dead.send("sent")
    dead.get()
    redis.client.hset(PREFIX + "unacked_renewed", "at", redis.client.time()[0])
    make_lapsed(redis)
    worker.channel.restore_lapsed()
    assert waiting(redis) == 1


def test_what_a_worker_renews_stays_with_it_whatever_the_timeouts_of_others(open, redis):
    timeouts = 1, 20, 3 * HOUR
    workers = [open(visibility_timeout=timeout) for timeout in timeouts]
    for worker in workers:
        worker.send("running")
        worker.get()
        worker.keep()
    scores = redis.client.zrange(PREFIX + "unacked_leases", 0, -1, withscores=True)
    now = redis.client.time()[0]
    assert [round(score - now, -1) for _, score in scores] == [0, 20, 3 * HOUR]
    redis.client.hset(PREFIX + "unacked_renewed", "since", 1)
    time.sleep(1.1)  # the first one has died
    workers[1].keep()
    assert waiting(redis) == 1 and unacked(redis) == 2


@pytest.mark.parametrize("jump", [-3 * HOUR, 3 * HOUR])
def test_nothing_is_put_back_when_the_clock_has_jumped_until_all_could_renew(open, redis, jump):
    alive, dead, other = open(), open(), open()
    for client in alive, dead:
        client.send("running")
        client.get()
        client.keep()
    for key in (
        "unacked_index",
        "unacked_leases",
    ):  # their times are those of a clock before its jump
        for tag, score in redis.client.zrange(PREFIX + key, 0, -1, withscores=True):
            redis.client.zadd(PREFIX + key, {tag: score - jump})
    redis.client.hset(PREFIX + "unacked_renewed", "at", redis.client.time()[0] - jump)
    other.keep()
    assert not waiting(redis)
    alive.keep()
    redis.client.hset(PREFIX + "unacked_renewed", "since", 1)
    other.keep()
    assert waiting(redis) == 1 and unacked(redis) == 1


def test_a_message_that_kills_each_worker_becomes_a_dead_letter(open, redis, caplog):
    client = open()
    client.keep()
    client.send("poison")
    for _ in range(DELIVERIES):
        assert client.get().payload == "poison"
        client.channel.qos._delivered.clear()  # the worker is killed
        make_lapsed(redis)
        client.keep()
    assert not client.get() and not unacked(redis)
    assert client.get("dead-letters").payload == "poison"
    assert "20 workers died" in caplog.text


def test_so_does_one_with_which_each_worker_ends_by_an_error(open):
    for _ in range(DELIVERIES):
        client = open()
        if not client.get():
            client.send("poison")
            client.get()
        client.channel.ends_by_error = True
        client.channel.qos.restore_unacked_once()
    assert open().get("dead-letters").payload == "poison"


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


def test_a_message_whose_queue_is_no_longer_bound_becomes_a_dead_letter(open, redis):
    client = open()
    entry = json.dumps([{"body": "sent", "properties": {}, "headers": {}}, "gone", "key"])
    redis.client.hset(PREFIX + "unacked", "tag", entry)
    redis.client.zadd(PREFIX + "unacked_index", {"tag": 1})  # a stock worker's
    client.keep()
    assert not unacked(redis) and waiting(redis, "dead-letters") == 1


@pytest.mark.parametrize("no_ack", [False, True])
@pytest.mark.parametrize("queue", ["bell", f"{PREFIX}queue"])
def test_a_queue_may_have_any_name(open, queue, no_ack):
    client = open(queue)
    client.send("sent", queue)
    with client.consuming(queue, no_ack=no_ack) as got:
        client.look()
    assert [message.payload for message in got] == ["sent"]


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
        client.keep()
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
    client.keep()
    for key in "unacked_index", "unacked_leases":
        redis.client.zadd(PREFIX + key, {"gone": 1})
    redis.client.hset(PREFIX + "unacked_renewed", "since", 1)
    client.keep()
    assert not unacked(redis) and not leases(redis)


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


def test_a_message_that_needs_no_copy_has_none(open, redis):
    client, other = open(), open()
    for each in client, other:
        each.channel.without_copy = "short"
    client.send("kept")
    client.send("short", headers={"short": True})
    client.get().ack()
    message = client.get()
    assert message.payload == "short" and not unacked(redis)
    message.requeue()
    message = other.get()
    assert message.payload == "short" and message.headers["redelivered"] and not unacked(redis)
    message.ack()
    client.send("short", headers={"short": True})
    assert open(stock=True).get().payload == "short"


def many(count):
    return [f"queue-{number}" for number in range(count)]


def test_the_orders_of_many_queues_are_not_kept(open):
    """With twelve queues, there are 479 million."""
    names = many(12)
    client = open(*names)
    for name in names[::2] + names[::3]:
        client.send("sent", name)
    with client.consuming(*names, prefetch=0) as arrived:
        client.look()
        packed = client.channel.packed
        client.send("last", names[0])
        client.wait(arrived, 11)
        assert packed[1] is client.channel.packed[1]


@pytest.mark.parametrize(("queues", "priorities"), [(900, 4), (1000, 10)])
def test_a_consumer_may_have_many_queues_and_priorities(open, queues, priorities):
    names, steps = many(queues), list(range(priorities))
    client = open("queue-999", priority_steps=steps)
    client.send("sent", names[-1], priority=0)
    client.send("later", names[-2], priority=priorities - 1, seconds=0.1)
    with client.consuming(*names, prefetch=2) as arrived:
        client.wait(arrived, 2)
    assert [message.payload for message in arrived] == ["sent", "later"]


def test_what_stock_workers_have_does_not_hide_messages_of_dead_workers(open, redis):
    client = open()
    client.send("sent")
    client.get()
    client.channel.qos._delivered.clear()  # the worker is killed
    now = redis.client.time()[0]
    with redis.client.pipeline() as pipe:
        for number in range(100_000):
            pipe.hset(PREFIX + "unacked", number, "held")
            pipe.zadd(PREFIX + "unacked_index", {number: now - HOUR / 2})
        pipe.execute()
    redis.client.zadd(PREFIX + "unacked_leases", dict.fromkeys(leases(redis), 1))
    client.keep()
    redis.client.hset(PREFIX + "unacked_renewed", "since", 1)
    client.keep()
    assert waiting(redis) == 1


def test_large_messages_of_a_dead_worker_come_back_one_by_one(open, redis):
    dead, other = open(), open()
    for _ in range(100):
        dead.send("x" * 1_000_000)
        dead.get()
    other.keep()
    make_lapsed(redis)
    before = redis.client.info("memory")  # Redis never forgets a peak, not even an earlier test's
    while unacked(redis) > 50:
        other.keep()
    highest = max(before["used_memory_peak"], before["used_memory"] + 50_000_000)
    assert redis.client.info("memory")["used_memory_peak"] <= highest
    assert waiting(redis) >= 50


def test_a_sender_that_rings_no_bell_is_soon_heard(open, redis):
    client, stock = open(), open(stock=True)

    def pause():
        client.look()
        return client.channel.look_at - client.channel._brpop_sent_at

    with client.consuming(prefetch=9) as arrived:
        assert pause() < 0.25  # seconds
        client.channel.quick_until = 1  # long ago
        client.send("with a bell")
        client.wait(arrived)
        until(lambda: pause() > 0.25, "it looks less often")
        stock.send("without a bell")
        client.wait(arrived, 2)
        until(lambda: pause() < 0.25, "it looks often")


def test_a_message_that_is_put_back_rings(open, redis):
    client = open()
    client.send("sent")
    message = client.get()
    redis.client.delete(PREFIX + "queue" + BELL)
    message.requeue()
    assert redis.client.llen(PREFIX + "queue" + BELL) == 1


def test_bells_expire_with_queues_that_only_their_sender_knows(open, redis):
    """A stock client's queue for replies gets a bell of the workers that answer."""
    open().send("reply", "of-a-stock-client")
    assert 0 < redis.client.ttl(PREFIX + "of-a-stock-client" + BELL) <= 60


@pytest.mark.parametrize("tag", [None, 5, [], {"a": 1}, "", "the same"])
def test_the_senders_delivery_tag_counts_for_nothing(open, redis, tag):
    client = open()
    properties = {"delivery_tag": tag, "delivery_info": {"exchange": "", "routing_key": "queue"}}
    for _ in range(2):
        redis.client.lpush(PREFIX + "queue", json.dumps({"body": "", "properties": properties}))
    messages = client.get(), client.get()
    assert unacked(redis) == 2
    for message in messages:
        message.ack()
    assert not unacked(redis)


def test_without_acknowledgments_nothing_is_noted(open, redis):
    client = open(ack_emulation=False)
    client.send("sent")
    client.send("second")
    with client.consuming(prefetch=2) as arrived:
        client.look()
        assert len(arrived) == 2 and not unacked(redis)
        client.keep()
        arrived[0].ack()
        arrived[1].requeue()
        client.look()
    assert arrived[2].payload == "second"


@pytest.mark.parametrize("key", ["unacked", "unacked_index", "unacked_leases"])
def test_what_cannot_be_noted_is_not_handed_over(open, redis, key, caplog, monkeypatch):
    monkeypatch.setattr("celery_steady.waiting.logged", {})
    client = open()
    client.send("sent")
    redis.client.set(PREFIX + key, "another type")
    with client.consuming() as arrived:
        client.look()
        assert not arrived and waiting(redis) == 1
        redis.client.delete(PREFIX + key)
        client.wait(arrived)
    assert len(caplog.records) == 1 and "WRONGTYPE" in caplog.text


@pytest.mark.parametrize("key", ["queue", "queue" + DELAYED, "dead-letters", "queue" + BELL])
def test_a_key_of_another_type_loses_nothing(open, redis, key):
    client = open()
    client.send("sent")
    message = client.get()
    redis.client.delete(PREFIX + key)
    redis.client.set(PREFIX + key, "another type")
    payload = {**message._raw, "headers": {"eta": "2999-01-01T00:00:00Z"}}
    for act in (
        lambda: client.channel.delay("queue", payload, 2e10),
        lambda: client.channel.qos.reject(message.delivery_tag),
        lambda: client.channel.qos.put_back(message.delivery_tag),
    ):
        with suppress(ResponseError):
            act()
            break
    redis.client.delete(PREFIX + key)
    kept = waiting(redis) + delayed(redis) + redis.client.llen(PREFIX + "dead-letters")
    assert kept + redis.client.hlen(PREFIX + "unacked") == 1


def test_dead_letters_have_a_bound(open, redis, monkeypatch, caplog):
    monkeypatch.setattr(unacknowledged, "MOST_DEAD_LETTERS", 3)
    client = open()
    for number in range(5):
        client.send(number)
        client.get().reject()
    assert [client.get("dead-letters").payload for _ in range(3)] == [2, 3, 4]
    assert len(caplog.records) == 2


def test_a_dead_letter_is_as_it_was_sent(open, redis):
    client = open()
    raw = b'{ "body": "W10=", "properties": {"body_encoding": "base64", "x": "\\udcff, \\"\\", "}, "headers": {"n": 1e400}}'
    redis.client.lpush(PREFIX + "queue", raw)
    client.get().reject()
    assert redis.client.lrange(PREFIX + "dead-letters", 0, -1) == [raw]


def test_countdowns_of_queues_that_the_app_does_not_know_are_released_too(open, redis):
    app = Celery(broker=redis.url, set_as_current=False)
    options = {"global_keyprefix": PREFIX}
    app.conf.update(broker_transport=redis.transport, broker_transport_options=options)
    client = open("tenant [a*]", "queue")
    for number in range(150):
        client.send(number, "tenant [a*]", seconds=100, priority=3)
    client.keep()
    assert release_countdowns(app) == 150
    left = {key.decode() for key in redis.client.keys() if b"_kombu" not in key}
    assert left == {PREFIX + "tenant [a*]\x06\x163"}


ODD = {
    "nested": "[" * 100_000,
    "no JSON": "0x10",
    "no dict": "5",
    "no message": "{}",
    "a number": '{"properties": 5}',
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_an_odd_message_to_all_workers_ends_none(redis, text):
    app = Celery(broker=redis.url, set_as_current=False)
    app.conf.update(broker_transport=redis.transport)
    with in_thread(app, "threads"):
        until(lambda: app.control.ping(timeout=1, limit=1), "the worker listens")
        for sent in text, text:  # what comes together with one is read, too
            redis.client.publish("/0.celery.pidbox", sent)
        assert app.control.ping(timeout=LIMIT / 6, limit=1)


def test_the_rights_of_the_readme_are_enough(redis):
    readme = Path(__file__).parent.parent / "README.md"
    if not readme.exists():
        pytest.skip("it is not in the sdist")
    rights = re.search("```text file=acl\n(.*)\n", readme.read_text("utf-8"))[1].split()
    redis.client.execute_command("ACL", "SETUSER", "worker", "reset", "on", ">secret", *rights)
    app = Celery(set_as_current=False)
    app.conf.update(
        broker_url=redis.url.replace("redis://", "redis://worker:secret@"),
        broker_transport=redis.transport,
        worker_consumer="celery_steady.consumer:Consumer",
        result_backend="cache+memory://",
    )

    @app.task(shared=False)
    def add(x, y):
        return x + y

    with in_thread(app, "threads"):
        assert add.apply_async([2, 3], countdown=0.5).get(timeout=LIMIT) == 5
    redis.client.execute_command("ACL", "DELUSER", "worker")
