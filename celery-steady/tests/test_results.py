"""Result backends keep each result, and a chord gets all of its members."""

import uuid
from threading import Event
from unittest.mock import DEFAULT, Mock

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError
from botocore.session import get_session
from celery import Celery, signals, states
from celery.exceptions import Retry
from redis.exceptions import TimeoutError
from servers import LIMIT
from workers import in_thread, sum_of_chord

from celery_steady import Celery as SteadyCelery
from celery_steady import defaults, dynamodb, results
from celery_steady import redis as steady_redis

STEADY = {"worker_consumer": "celery_steady.consumer:Consumer"}


@pytest.fixture(params=["redis", "dynamodb"])
def backend(request):
    """An app with one of our backends."""
    app = Celery(broker="memory://", set_as_current=False)
    if request.param == "redis":
        app.conf.result_backend = request.getfixturevalue("redis").url
    else:
        sqs = request.getfixturevalue("sqs")
        app.conf.result_backend = "dynamodb://@localhost/celery"
        app.conf.dynamodb_endpoint_url = sqs.endpoint
    results.prepare(app, None)
    assert type(app.backend).__module__.startswith("celery_steady.")
    return app.backend


@pytest.fixture
def id():
    return str(uuid.uuid4())


def test_a_worker_sends_redis_a_command_again_if_its_connection_was_forgotten(redis):
    """A chord's task would fail, as nothing else repeats what counts it."""
    app = Celery(backend=redis.url, set_as_current=False)
    defaults.for_worker(app, None)
    client = app.backend.client
    client.ping()
    [connection] = client.connection_pool._available_connections
    answers = iter([TimeoutError(), *[DEFAULT] * 9])
    connection.read_response = Mock(wraps=connection.read_response, side_effect=answers)
    assert client.get("key") is None
    assert connection.read_response.call_count > 1


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("redis://localhost", steady_redis.RedisBackend),
        ("rediss://localhost?ssl_cert_reqs=required", steady_redis.RedisBackend),
        ("sentinel://localhost", steady_redis.SentinelBackend),
        ("cache+memory://", None),
        (None, None),
    ],
)
def test_a_worker_replaces_the_backends_that_have_a_class_here(url, kind):
    app, other = (Celery(backend=url, set_as_current=False) for _ in range(2))
    app.conf.result_backend_transport_options = {"master_name": "main"}
    results.prepare(app, None)
    assert type(app.backend) is (kind or type(other.backend))
    assert type(other.backend).__module__.startswith("celery.")


def test_a_backend_that_was_used_already_is_replaced(redis):
    app = Celery(backend=redis.url, set_as_current=False)
    task = app.tasks["celery.backend_cleanup"]
    assert type(task.backend).__module__ == type(app.backend).__module__ == "celery.backends.redis"
    results.prepare(app, None)
    assert type(task.backend) is type(app.backend) is steady_redis.RedisBackend


@pytest.mark.parametrize("state", sorted(states.READY_STATES))
def test_the_state_retry_does_not_replace_a_result(backend, state, id):
    backend.store_result(id, ValueError() if state != "SUCCESS" else 5, state)
    backend.store_result(id, Retry(), "RETRY")
    assert backend.get_state(id) == state


@pytest.mark.parametrize("state", ["PENDING", "STARTED", "RETRY"])
def test_the_state_retry_replaces_what_is_no_result(backend, state, id):
    if state != "PENDING":
        backend.store_result(id, Retry() if state == "RETRY" else None, state)
    backend.store_result(id, Retry(), "RETRY")
    assert backend.get_state(id) == "RETRY"
    backend.store_result(id, 5, "SUCCESS")
    assert backend.get_result(id) == 5


@pytest.mark.parametrize("before", ["PENDING", "STARTED", "RETRY"])
@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE"])
def test_a_result_that_is_stored_meanwhile_stays(backend, before, state, id, monkeypatch):
    """The state RETRY was looked up, and is not stored yet."""
    if before != "PENDING":
        backend.store_result(id, Retry() if before == "RETRY" else None, before)
    set_state, other = backend._set_with_state, type(backend)(app=backend.app, url=backend.url)

    def set_late(key, value, new):
        other.store_result(id, ValueError() if state == "FAILURE" else 5, state)
        set_state(key, value, new)

    monkeypatch.setattr(backend, "_set_with_state", set_late)
    backend.store_result(id, Retry(), "RETRY")
    assert backend.get_state(id) == state


@pytest.mark.parametrize("before", ["PENDING", "STARTED"])
def test_a_result_that_is_stored_at_the_last_moment_stays(backend, before, id, monkeypatch):
    """Between the last look at what is stored, and the write."""
    if before != "PENDING":
        backend.store_result(id, None, before)
    is_result, other = backend.is_result, type(backend)(app=backend.app, url=backend.url)

    def look(stored):
        found = is_result(stored)
        other.store_result(id, 5, "SUCCESS")
        return found

    monkeypatch.setattr(backend, "is_result", look)
    backend.store_result(id, Retry(), "RETRY")
    assert backend.get_state(id) == "SUCCESS"


@pytest.mark.parametrize(("retries", "state"), [(1, "PENDING"), (0, "FAILURE")])
def test_a_task_whose_result_is_ignored_is_not_left_in_the_state_retry(backend, retries, state):
    """Only its failure is stored, with task_store_errors_even_if_ignored."""
    app, ended = backend.app, Event()
    app.conf.update(STEADY, task_store_errors_even_if_ignored=True)

    @app.task(shared=False, bind=True, ignore_result=True, max_retries=retries)
    def retry_once(self):
        if not self.request.retries:
            raise self.retry(countdown=0)

    def end(retval, state, **kwargs):
        if state != "RETRY":
            ended.set()

    signals.task_postrun.connect(end)
    with in_thread(app):
        id = retry_once.delay().id
        assert ended.wait(LIMIT)
    assert backend.get_state(id) == state


def answer(status, code):
    return ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutItem"
    )


@pytest.mark.parametrize(
    ("error", "may_end"),
    [
        (EndpointConnectionError(endpoint_url=""), True),
        (ReadTimeoutError(endpoint_url=""), True),
        (answer(500, "InternalServerError"), True),
        (answer(400, "ThrottlingException"), True),
        (answer(400, "RequestLimitExceeded"), True),
        (answer(400, "ValidationException"), False),
        (answer(400, "ResourceNotFoundException"), False),
        (ValueError(), False),
    ],
)
def test_an_error_of_dynamodb_that_may_end_is_repeated(error, may_end):
    backend = object.__new__(dynamodb.DynamoDBBackend)
    assert bool(backend.exception_safe_to_retry(error)) is may_end


@pytest.mark.parametrize("ignored", [False, True])
def test_a_chord_gets_the_results_of_its_members(backend, ignored):
    backend.app.conf.update(STEADY)
    assert sum_of_chord(backend.app, ignored) == 6


def test_greenlets_get_results_again_after_an_error():
    """The backend of a process that runs on gevent has a drainer that starts anew."""
    drainer = steady_redis.results.Drainer(Mock())
    drainer._shutdown.set()
    with pytest.raises(Exception):  # noqa: B017 -- Celery's own
        drainer.start()
    drainer._started.set()  # a greenlet isn't needed here
    drainer.start()


@pytest.mark.parametrize(("own", "expected"), [({}, 20), ({"read_timeout": 7}, 7)])
def test_only_the_backends_own_client_of_aws_has_its_timeouts(sqs, monkeypatch, own, expected):
    session = get_session()
    session.set_default_client_config(Config(read_timeout=300, proxies={"https": "proxy"}))
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", boto3.Session(botocore_session=session))
    app = SteadyCelery(backend=f"dynamodb://@eu-central-1/{uuid.uuid4()}", set_as_current=False)
    app.conf.dynamodb_endpoint_url = sqs.endpoint
    app.conf.result_backend_transport_options = {"client-config": own}
    assert app.backend.client.meta.config.read_timeout == own.get("read_timeout", 1)
    defaults.for_worker(app, None)
    results.prepare(app, None)
    assert app.backend.client.meta.config.read_timeout == expected
    assert app.backend.client.meta.config.proxies == {"https": "proxy"}
    assert boto3.client("s3").meta.config.read_timeout == 300
