"""Result backends keep each result, and a chord gets all of its members."""

import uuid
from threading import Event
from unittest.mock import DEFAULT, Mock

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError
from celery import Celery, signals, states
from celery.exceptions import Retry
from redis.exceptions import TimeoutError
from servers import LIMIT
from workers import in_thread, sum_of_chord

from celery_steady import dynamodb, results
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
    results.replace(app)
    assert type(app.backend).__module__.startswith("celery_steady.")
    return app.backend


@pytest.fixture
def id():
    return str(uuid.uuid4())


def test_a_worker_sends_redis_a_command_again_if_its_connection_was_forgotten(redis):
    """A chord's task would fail, as nothing else repeats what counts it."""
    app = Celery(backend=redis.url, set_as_current=False)
    results.insist(app, pool=None)
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
    results.replace(app)
    assert type(app.backend) is (kind or type(other.backend))
    assert type(other.backend).__module__.startswith("celery.")


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
    drainer = steady_redis.Drainer(Mock())
    drainer._shutdown.set()
    with pytest.raises(Exception):  # noqa: B017 -- Celery's own
        drainer.start()
    drainer._started.set()  # a greenlet isn't needed here
    drainer.start()
