"""The fixtures that several files use: servers, workers, and the calls of their tasks."""

import gc
import logging
from contextlib import ExitStack
from functools import partial

import pytest
from celery import Celery
from celery.result import AsyncResult
from redis import Redis as Client
from servers import LIMIT, SQS, RabbitMQ, Redis, until
from versions import skip_on_older_versions
from workers import Calls, Worker

CONSUMER = "celery_steady.consumer:Consumer"


def pytest_collection_modifyitems(items):
    skip_on_older_versions(items)


@pytest.fixture(autouse=True)
def root_logger():
    """Celery's own worker for tests sets its level."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    with Redis(tmp_path_factory.mktemp("redis")) as server:
        yield server
        gc.collect()  # results that are left would look for a server that has ended


@pytest.fixture(scope="session")
def sqs_server(tmp_path_factory):
    with SQS(tmp_path_factory.mktemp("sqs")) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_server(tmp_path_factory):
    with RabbitMQ(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture
def redis(redis_server):
    """An empty Redis, which a test may kill and start again."""
    if not redis_server.is_running():
        redis_server.start()
    client = Client.from_url(redis_server.url)
    client.config_set("maxmemory", 0)
    client.flushall()
    redis_server.client = client
    return redis_server


@pytest.fixture
def sqs(sqs_server, monkeypatch):
    for name in "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY":
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", sqs_server.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    if not sqs_server.is_running():
        sqs_server.start()
    return sqs_server


@pytest.fixture
def rabbitmq(rabbitmq_server):
    if not rabbitmq_server.is_running():
        rabbitmq_server.start()
    return rabbitmq_server


@pytest.fixture
def calls():
    calls = Calls()
    yield calls
    calls.close()


@pytest.fixture
def steady(redis):
    """The settings of celery-steady on Redis, to which a test may add its own."""
    return {
        "broker_url": redis.url,
        "result_backend": redis.url,
        "broker_transport": redis.transport,
        "worker_consumer": CONSUMER,
        "broker_transport_options": {**redis.transport_options, "visibility_timeout": 3},
        "task_acks_late": True,
        "worker_prefetch_multiplier": 1,
        "broker_connection_retry_on_startup": True,
    }


@pytest.fixture
def stock(steady):
    """The same settings without celery-steady."""
    ours = "broker_transport", "worker_consumer"
    return {name: value for name, value in steady.items() if name not in ours}


@pytest.fixture
def start(tmp_path, calls):
    """A function that starts a worker: start(conf, pool="threads"). All end with the test."""
    with ExitStack() as stack:

        def start(*args, **kwargs):
            worker = Worker(tmp_path, calls, *args, **kwargs)
            stack.push(worker)
            return worker.start()

        yield start


@pytest.fixture
def client():
    """A function that makes the app of a client: client(conf).send("ask", "name")."""
    apps = []

    def make(conf):
        app = Celery("worker_app", set_as_current=False)
        app.conf.update(conf)
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.close()


class Result(AsyncResult):
    def get(self, **options):
        """Look until it is there: a client of Celery's may miss it while Redis restarts."""
        until(self.ready, f"{self.id} has a result")
        return super().get(timeout=LIMIT, **options)

    def wait(self):
        """Return its state when it has ended."""
        until(self.ready, f"{self.id} has a result")
        return self.state


@pytest.fixture
def send(client, steady):
    """A function that sends a task to the workers on Redis: send("ask", "name").get()."""
    app = client({"broker_url": steady["broker_url"], "result_backend": steady["result_backend"]})
    result = partial(Result, app=app)

    def send(name, *args, **options):
        return app.send_task(f"worker_app.{name}", args, result_cls=result, **options)

    return send


@pytest.fixture
def settled(redis):
    """A function that waits until no message is left in Redis."""

    def is_empty():
        return not redis.client.llen("celery") and not redis.client.hlen("unacked")

    return lambda: until(is_empty, "all messages are acknowledged")
