"""What each transport promises, on a real server of each broker. The transport memory:// is a control."""

import signal
import time
import uuid
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from kombu import Connection, Queue
from servers import LIMIT, until

from celery_steady import dead_letters, versions

HOUR = 3600
PARTS = {"redis": "Redis", "sqs": "Amazon SQS", "rabbitmq": "RabbitMQ"}


def brokers(*names):
    """Run a test with each of these. RabbitMQ takes long to start: one process has all its tests."""
    marks = {"rabbitmq": [pytest.mark.xdist_group("rabbitmq")]}
    params = [pytest.param(name, marks=marks.get(name, ())) for name in names]
    return pytest.mark.parametrize("name", params)


ours = brokers("redis", "sqs")  # the classes with renew()
servers = brokers("redis", "sqs", "rabbitmq")
each = brokers("memory", "redis", "sqs", "rabbitmq")


@pytest.fixture
def broker(name, request):
    """A broker: open() connects a client, whose queue no other test uses."""
    if name == "memory":
        return SimpleNamespace(url="memory://", transport=None, transport_options={})
    if not versions.fits(PARTS[name]):
        pytest.skip("the package leaves this broker to kombu")
    return request.getfixturevalue(name)


@pytest.fixture
def open(broker, name):
    """A function that connects to the broker: open(visibility_timeout=1)."""
    queue_name = f"queue-{uuid.uuid4()}"

    @contextmanager
    def open(**options):
        options = {"visibility_timeout": HOUR, **broker.transport_options, **options}
        kwargs = {"transport": broker.transport, "transport_options": options}
        with Connection(broker.url, **kwargs) as connection:
            channel = connection.default_channel
            queue = Queue(queue_name, durable=True)(channel)
            queue.declare()
            channel.renews = True  # as a worker's
            yield Client(connection, channel, queue)

    return open


class Client:
    def __init__(self, connection, channel, queue):
        self.connection, self.channel, self.queue = connection, channel, queue

    def send(self, text, **options):
        producer = self.connection.Producer()
        producer.publish(text, routing_key=self.queue.name, **options)

    def receive(self):
        """Wait for a message, and return it."""
        return until(self.look, "a message is there")

    def look(self):
        """Return a message that is in the queue now, or None."""
        if hasattr(self.channel, "restore_lapsed"):
            self.channel.renew([])
            self.channel.restore_lapsed()
        return self.queue.get()


@each
def test_a_message_is_received_once(open):
    with open() as client, open() as other:
        client.send("sent")
        assert client.receive().payload == "sent"
        assert other.look() is client.look() is None


@each
@pytest.mark.parametrize("end", ["ack", "reject"])
def test_a_message_that_was_acknowledged_or_rejected_is_gone(open, end):
    with open() as client:
        client.send("sent")
        getattr(client.receive(), end)()
    with open() as client:
        assert client.look() is None


@each
def test_a_rejected_message_comes_again_immediately(open):
    with open() as client:
        client.send("sent")
        client.receive().requeue()
        assert client.receive().payload == "sent"


@servers
def test_a_client_that_closes_releases_its_messages_immediately(open):
    with open() as client:
        client.send("sent")
        client.receive()
    with open() as client:
        message = client.receive()
        assert message.payload == "sent"
        message.ack()


@ours
def test_a_message_of_a_dead_client_comes_again(open):
    with open(visibility_timeout=1) as dead:
        dead.send("sent")
        assert dead.receive().payload == "sent"
        with open(visibility_timeout=1) as other:
            message = other.receive()
            assert message.payload == "sent"
            message.ack()


@ours
def test_a_message_arrives_when_its_time_has_come(open):
    with open() as client:
        due = datetime.now(UTC) + timedelta(seconds=2)
        client.send("later", headers={"eta": due.isoformat()})
        assert client.look() is None
        message = client.receive()
        assert datetime.now(UTC) > due - timedelta(seconds=0.5)
        message.ack()


@ours
def test_a_renewed_message_does_not_come_again(open, name, broker):
    """Its time is that of an old message, until it's renewed."""
    with open(visibility_timeout=2) as client:
        client.send("sent")
        message = client.receive()
        if name == "redis":
            broker.client.zadd("unacked_leases", {message.delivery_tag: 1})
        client.channel.visibility_timeout = HOUR
        client.channel.renew([message])
        if name == "sqs":
            time.sleep(2.5)  # moto has no other clock
        with open() as other:
            assert other.look() is None
        message.ack()


@ours
def test_a_renewal_does_not_bring_back_an_acknowledged_message(open, name, broker):
    with open(visibility_timeout=1) as client:
        client.send("sent")
        message = client.receive()
        message.ack()
        client.channel.renew([message])  # as if another thread had just acknowledged it
        if name == "redis":
            assert not broker.client.exists("unacked_index", "unacked_leases")
        with open() as other:
            assert other.look() is None


@servers
def test_a_message_that_is_sent_during_an_outage_arrives(open, broker, name):
    def start(*error):
        if not broker.is_running():
            broker.start()

    with open() as client:
        queue = Queue(client.queue.name, durable=True)  # not bound to the lost channel
        broker.kill()
        policy = {"errback": start, "interval_start": 0.1, "max_retries": None}
        client.send("sent", declare=[queue], retry=True, retry_policy=policy)
    with open() as client:
        assert client.receive().payload == "sent"


@brokers("redis", "rabbitmq")  # moto keeps nothing
def test_a_message_outlives_an_outage(open, broker):
    with open() as client:
        time.sleep(2)  # RabbitMQ 3.10 forgets a queue that it made just before it was killed
        client.send("sent", delivery_mode=2)
        broker.kill()
        broker.start()
    with open() as client:
        assert client.receive().payload == "sent"


@pytest.fixture
def conf(broker, redis, steady):
    """The settings of a worker of this broker."""
    options = {**broker.transport_options, "visibility_timeout": 3}
    conf = {"broker_url": broker.url, "broker_transport": broker.transport}
    conf |= {"broker_transport_options": options, "task_default_queue": f"queue-{uuid.uuid4()}"}
    return steady | conf | {"result_backend": redis.url}


@brokers("sqs", "rabbitmq")  # test_worker.py is about Redis
def test_a_worker_of_this_broker_runs_a_task(conf, name, start, client, calls):
    start(conf, pool="threads")
    app = client(conf)
    app.send_task("worker_app.ask", ["task"])
    task = calls.next("task")
    if name != "rabbitmq":
        calls.accept(7)  # longer than twice the visibility timeout
    assert not calls.names()
    task.answer()
    assert app.send_task("worker_app.add", [2, 3]).get(timeout=LIMIT) == 5


@servers
def test_an_unknown_task_waits_for_a_worker_that_knows_it(conf, start, client):
    """Known tasks run meanwhile."""
    app = client(conf)
    worker = start(conf, pool="threads")
    result = app.send_task("worker_app.newer")
    until(lambda: "unknown task worker_app.newer" in worker.text(), "it is unknown")
    assert app.send_task("worker_app.add", [2, 3]).get(timeout=LIMIT) == 5
    assert result.state == "PENDING"
    worker.signal(signal.SIGTERM)
    worker.wait()
    start(conf, pool="threads", NEWER="1")
    assert result.get(timeout=LIMIT) == "newer"


@servers
def test_a_countdown_of_a_killed_worker_starts_in_time(conf, name, start, client, calls):
    """The broker keeps it, and no worker."""
    if name == "rabbitmq":
        conf["task_default_queue_type"] = "quorum"
    app = client(conf)
    worker = start(conf, pool="threads")
    due = time.time() + 4
    app.send_task("worker_app.ask", ["later"], countdown=4)
    app.send_task("worker_app.add", [2, 3]).get(timeout=LIMIT)
    worker.kill()
    conf["broker_transport_options"]["visibility_timeout"] = HOUR
    start(conf, pool="threads")
    calls.next("later").answer()
    assert time.time() > due - 1


@brokers("redis", "rabbitmq")  # SQS has a command for it
def test_dead_letters_are_sent_back_to_their_queue(open, broker, client, name):
    with open() as sender:
        channel = sender.channel
        arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead-letters"}
        queue = Queue(f"queue-{uuid.uuid4()}", queue_arguments=arguments, durable=True)(channel)
        queue.declare()
        Queue("dead-letters", durable=True)(channel).declare()
        headers = {"id": "1"}
        sender.connection.Producer().publish(
            {"number": 5}, routing_key=queue.name, headers=headers, correlation_id="2"
        )
        until(queue.get, "it is there").reject()
        app = client({"broker_url": broker.url, "broker_transport": broker.transport})
        assert until(lambda: dead_letters.send_back(app), "it is a dead letter") == 1
        message = until(queue.get, "it is back")
        assert message.payload == {"number": 5}
        assert message.headers["id"] == "1"
        assert message.properties["correlation_id"] == "2"
        message.ack()
        assert dead_letters.send_back(app) == 0
