"""A request doesn't wait for servers that are down or hang: what the defaults of each process are for."""

import os
import signal
import socket
import time
from contextlib import ExitStack, suppress
from threading import Thread, Timer

import pytest
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError

from celery_steady import Celery

SECONDS = 8  # a request waits no longer, on a slow machine


def make_app(url, backend=None, **conf):
    return Celery("project", broker=url, backend=backend, set_as_current=False, **conf)


@pytest.fixture
def quick():
    """The block may raise, and ends in time."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SECONDS


@pytest.fixture
def hanging():
    """The port of a server that accepts connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def unreachable():
    """A port to which nobody can connect, or knows that soon: too many others wait for the server."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(server.getsockname())
        yield server.getsockname()[1]


@pytest.fixture
def closing():
    """A port that ends each connection immediately, and the list of those."""
    connections = []

    def serve():
        while True:
            try:
                connections.append(server.accept()[0])
                connections[-1].close()
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1], connections
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{}", "amqp://127.0.0.1:{}", "sqs://a:b@"])
def test_sending_to_a_broker_that_hangs_fails_soon(url, hanging, quick, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{hanging}")
    options = {"region": "eu-central-1"} if url.startswith("sqs") else {}
    app = make_app(url.format(hanging), broker_transport_options=options)
    with pytest.raises(Exception):  # noqa: B017  SQS raises that of its client
        app.send_task("task")


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_sending_to_a_broker_that_is_unreachable_fails_soon(scheme, unreachable, quick):
    with pytest.raises(OperationalError):
        make_app(f"{scheme}://127.0.0.1:{unreachable}").send_task("task")


@pytest.mark.parametrize("size", [0, 3 * 10**7], ids=["read", "write"])
def test_sending_to_a_rabbitmq_that_has_stopped_fails_soon(size, rabbitmq):
    app = make_app(rabbitmq.url)
    app.send_task("task")
    wake = Timer(2 * SECONDS, os.killpg, [rabbitmq.pid, signal.SIGCONT])
    os.killpg(rabbitmq.pid, signal.SIGSTOP)
    wake.start()
    start = time.monotonic()
    with suppress(OperationalError):
        app.send_task("task", ["x" * size])
    seconds = time.monotonic() - start
    wake.cancel()
    os.killpg(rabbitmq.pid, signal.SIGCONT)
    assert 1 <= seconds < SECONDS, "it doesn't wait for long, nor believe that it has sent the task"


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_task_is_sent_twice_at_most(scheme, closing, quick):
    port, connections = closing
    with pytest.raises(OperationalError):
        make_app(f"{scheme}://127.0.0.1:{port}").send_task("task")
    with socket.create_connection(("127.0.0.1", port)) as last:
        assert not last.recv(1)
    assert len(connections) == 2 + 1


def test_a_request_waits_a_second_for_a_free_connection(redis, quick):
    app = make_app(redis.url)
    with ExitStack() as stack:
        for _ in range(app.conf.broker_pool_limit):
            stack.enter_context(app.connection_or_acquire())
        with pytest.raises(OperationalError):
            app.control.ping()


@pytest.mark.parametrize("own", [{}, {"redis_socket_timeout": 120}], ids=["read", "connect"])
def test_results_of_a_redis_that_hangs_fail_soon(own, hanging, unreachable, quick):
    app = make_app("memory://", f"redis://127.0.0.1:{unreachable if own else hanging}", **own)
    with pytest.raises(Exception):  # noqa: B017
        app.AsyncResult("id").state  # noqa: B018


@pytest.mark.parametrize("failures", [1, 100])
def test_a_result_is_read_again_once(failures, redis, monkeypatch):
    app, reads = make_app("memory://", redis.url), []

    def get(key):
        reads.append(key)
        if len(reads) <= failures:
            raise ConnectionError("closed by the server")

    monkeypatch.setattr(app.backend, "get", get)
    if failures == 1:
        assert app.AsyncResult("id").state == "PENDING"
    else:
        with pytest.raises(Exception):  # noqa: B017
            app.AsyncResult("id").state  # noqa: B018
    assert len(reads) == 2
