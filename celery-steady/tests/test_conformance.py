"""What each transport promises, on a real server of each broker. The transport memory:// is a control."""

import time
import uuid
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from kombu import Connection, Queue
from servers import LIMIT, until

from celery_steady import versions

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
            if name == "redis":
                channel.qos.connected_at = float("-inf")  # others have connected again
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
        if qos := getattr(self.channel, "qos", None):
            qos.restore_visible(interval=1)
        return self.queue.get()


@each
def test_a_message_is_received_once(open):
    with open() as client, open() as other:
        client.send("sent")
        assert client.receive().payload == "sent"
        assert other.look() is client.look() is None


@each
def test_an_acknowledged_message_is_gone(open):
    with open() as client:
        client.send("sent")
        client.receive().ack()
    with open() as client:
        assert client.look() is None


@each
def test_a_rejected_message_comes_again_immediately(open):
    with open() as client:
        client.send("sent")
        client.receive().requeue()
        assert client.receive().payload == "sent"


@each
def test_a_rejected_message_without_requeue_is_gone(open):
    with open() as client:
        client.send("sent")
        client.receive().reject()
    with open() as client:
        assert client.look() is None


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
def test_a_renewed_message_does_not_come_again(open, name, broker):
    """Its time is that of an old message, until it's renewed."""
    with open(visibility_timeout=2) as client:
        client.send("sent")
        message = client.receive()
        if name == "redis":
            broker.client.zadd("unacked_index", {message.delivery_tag: 1})
        client.channel.visibility_timeout = HOUR
        client.channel.renew()
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
        delivered = dict(client.channel.qos._delivered)
        message.ack()
        client.channel.qos._delivered.update(delivered)  # as if another thread had just done it
        client.channel.renew()
        client.channel.qos._delivered.clear()
        if name == "redis":
            assert not broker.client.zcard("unacked_index")
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
        client.send("sent", delivery_mode=2)
        broker.kill()
        broker.start()
    with open() as client:
        assert client.receive().payload == "sent"


@brokers("sqs", "rabbitmq")  # test_worker.py is about Redis
def test_a_worker_of_this_broker_runs_a_task(broker, name, start, client, calls, steady, redis):
    options = {**broker.transport_options, "visibility_timeout": 3}
    conf = {"broker_url": broker.url, "broker_transport": broker.transport}
    conf |= {"broker_transport_options": options, "task_default_queue": f"queue-{uuid.uuid4()}"}
    conf = {key: value for key, value in conf.items() if value}
    start(steady | {"broker_transport": None} | conf, pool="threads")
    app = client(conf | {"result_backend": redis.url})
    app.send_task("worker_app.ask", ["task"])
    task = calls.next("task")
    if name != "rabbitmq":
        calls.accept(7)  # longer than twice the visibility timeout
    assert not calls.names()
    task.answer()
    assert app.send_task("worker_app.add", [2, 3]).get(timeout=LIMIT) == 5
