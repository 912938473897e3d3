"""What config/worker.py adds to Celery and kombu: each fault still exists, and is cured once.

If a fault has gone after an upgrade, remove its workaround from templates/ and from durable-jobs/.
"""

import ast
import re
import shelve
import sys
import tempfile
from importlib.metadata import distribution
from io import BytesIO
from types import SimpleNamespace
from unittest.mock import DEFAULT, MagicMock, Mock, patch

import pycurl
import pytest
from amqp import RecoverableConnectionError
from billiard.einfo import ExceptionInfo
from celery import Celery, beat
from celery.app import trace
from celery.app.task import Context
from celery.backends.asynchronous import geventDrainer
from celery.backends.base import BaseBackend
from celery.backends.dynamodb import DynamoDBBackend
from celery.concurrency.thread import TaskPool
from celery.worker import worker
from celery.worker.request import Request
from kombu import Connection, Consumer, Exchange, Queue
from kombu.asynchronous import http
from kombu.asynchronous.http.curl import CurlClient
from kombu.exceptions import OperationalError
from kombu.message import Message
from kombu.transport import SQS, memory, native_delayed_delivery, redis
from redis.exceptions import ResponseError

from harness.bake import CHOICES, LIBRARY, chosen, product, render

# What no newer version makes superfluous: it serves this project, with options of Celery's.
OWN = {"be_patient", "check_clock", "check_connections", "keep_trying", "touch_liveness_file"}
UPSTREAM = r"(celery|kombu|django-celery-results) (issue|pull) \d+|kombu \d\.\d"
PLAIN = product({name: CHOICES[name] for name in ("broker", "result_backend", "worker_pool")})
# Classes that the library has, too, for projects that were not made from this template.
SHARED = {
    "DeclareQueues": "worker/rabbitmq.py",
    "NoticeLostConnection": "worker/rabbitmq.py",
    "QoS": "transport/redis.py",
    "Connection": "transport/sqs.py",
    "Channel": "transport/sqs.py",
    "Transport": "transport/sqs.py",
}


def parts(text):
    """Return the source of each class and function of a module, {name: source}."""
    nodes = [node for node in ast.parse(text).body if hasattr(node, "name")]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


@pytest.fixture(scope="module")
def workarounds():
    """The workarounds of all plain projects, {name: its sources}."""
    found = {
        "flower": {chosen().broker.flower},
        "maybe_declare": {chosen().broker.celery},
        "MemoryError": {render("config/worker.py")},
    }
    for text in {render("config/worker.py", **each) for each in PLAIN}:
        for name in parts(text).keys() - OWN:
            found.setdefault(name, set()).add(parts(text)[name])
    return found


def fails(error, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except error:
        return True
    return False


def redis_loses_a_message_that_it_cannot_copy():
    """BRPOP has removed it from its queue, but a full Redis refuses the copy."""
    channel = MagicMock()
    pipe = channel.conn_or_acquire().__enter__().pipeline()
    pipe.zadd().hset().execute.side_effect = ResponseError("OOM")
    message = Mock(_raw={}, delivery_info={"exchange": "", "routing_key": "cpu"})
    return fails(ResponseError, redis.QoS(channel).append, message, "tag")


def an_acknowledgement_that_fails_is_not_repeated():
    channel = Mock(basic_ack=Mock(side_effect=ConnectionError))
    message = Message(channel=channel, delivery_tag="tag")
    message.ack_log_error(Mock(), (ConnectionError,))
    return channel.basic_ack.call_count == 1 and not message.acknowledged


def redis_redelivers_what_its_own_worker_holds():
    channel = MagicMock(visibility_timeout=1)
    channel.conn_or_acquire().__enter__().zrange.return_value = [("tag", 0)]
    qos = redis.QoS(channel)
    qos._delivered["tag"] = Mock()
    with patch.object(redis, "Mutex"), patch.object(qos, "restore_by_tag") as restore:
        qos.restore_visible(interval=1)
    return restore.called


def no_queue_is_declared_before_it_is_bound():
    connection = Mock()
    queue = Queue("cpu", Exchange("cpu", "topic"), routing_key="cpu")
    native_delayed_delivery.bind_queue_to_native_delayed_delivery_exchange(connection, queue)
    channel = connection.channel()
    return channel.queue_bind.called and not channel.queue_declare.called


def a_lost_connection_is_replaced_by_one_that_consumes_nothing():
    with Connection("memory://") as connection:
        Consumer(connection.default_channel, [Queue("cpu")], on_message=print).consume()
        connection.collect()  # as if it were lost
        return fails(TimeoutError, connection.drain_events, timeout=0.1)


def a_task_is_sent_through_a_closed_channel_after_a_second_declaration():
    publish, declare = Mock(), Mock(side_effect=[RecoverableConnectionError, DEFAULT])
    with (
        Connection("memory://") as connection,
        patch.object(memory.Channel, "basic_publish", lambda channel, *_, **__: publish(channel)),
        patch.object(memory.Channel, "queue_declare", declare),
    ):
        connection.Producer().publish("", declare=[Queue("cpu")], retry=True)
        return publish.call_args.args[0].closed


def a_poll_of_sqs_waits_forever():
    curl, request = Mock(), http.Request("http://127.0.0.1/", request_timeout=20)
    CurlClient._setup_request(Mock(), curl, request, BytesIO(), http.Headers())
    options = {call.args[0] for call in curl.setopt.call_args_list}
    return pycurl.URL in options and not options & {pycurl.TIMEOUT, pycurl.TIMEOUT_MS}


def a_poll_of_sqs_that_fails_is_the_last():
    channel = Mock(_active_queues={"cpu"}, _get_bulk_async=Mock(side_effect=OSError))
    failed = fails(OSError, SQS.Channel._schedule_queue, channel, "cpu")
    return failed and not channel.hub.mock_calls


def sqs_gets_a_message_back_after_a_poll():
    channel = Mock(wait_time_seconds=20, sqs_base64_encoding=False)
    message = {"redelivered": True, "properties": {"delivery_tag": "tag"}}
    channel._resolve_delay_seconds.return_value = None
    SQS.Channel._put(channel, "cpu", message)
    [call] = channel.sqs().change_message_visibility.call_args_list
    return call.kwargs["VisibilityTimeout"] == 20


def a_task_is_sent_twice_at_most():
    send = Mock(__name__="send", side_effect=[OSError, OSError, "sent"])
    options = {"region": "eu-central-1", "predefined_queues": {"cpu": {"url": "http://localhost"}}}
    with Connection("sqs://name:password@", transport_options=options) as connection:
        return fails(OperationalError, connection.ensure(Mock(), send))


def a_result_is_not_stored_after_a_restart_of_postgresql():
    package = distribution("django-celery-results")  # Django has no settings here
    text = package.locate_file("django_celery_results/backends/database.py").read_text()
    return "def exception_safe_to_retry" in text and "OperationalError" not in text


def a_result_is_not_stored_after_an_error_of_dynamodb():
    return DynamoDBBackend.exception_safe_to_retry is BaseBackend.exception_safe_to_retry


def a_chord_does_not_get_an_ignored_result():
    backend = Celery(backend="cache+memory://", set_as_current=False).backend
    with patch.multiple(backend, store_result=Mock(), on_chord_part_return=Mock()):
        backend.mark_as_done("id", 1, Context(ignore_result=True, chord={"task": "sum"}))
        return backend.on_chord_part_return.called and not backend.store_result.called


def the_state_retry_replaces_a_result():
    backend = Celery(backend="cache+memory://", set_as_current=False).backend
    backend.mark_as_failure("id", ValueError(), call_errbacks=False)
    backend.mark_as_retry("id", ValueError())
    return backend.get_state("id") == "RETRY"


def greenlets_get_no_result_after_an_error():
    drainer = geventDrainer(Mock())
    drainer._shutdown.set()
    return fails(Exception, drainer.start)


def a_soft_shutdown_takes_its_whole_time():
    conf = Mock(worker_soft_shutdown_timeout=20)
    busy = SimpleNamespace(active_requests={Mock()})
    with patch.object(worker, "sleep") as sleep, patch.object(worker, "state", busy):
        worker.WorkController.wait_for_soft_shutdown(Mock(app=Mock(conf=conf)))
    return sleep.call_args.args == (20,)


def threads_cannot_be_terminated():
    return fails(NotImplementedError, TaskPool.terminate_job, Mock(), 1)


def a_task_that_raises_a_system_exit_never_ends():
    app = Celery(set_as_current=False)

    @app.task
    def task():
        sys.exit()

    return fails(SystemExit, trace.build_tracer("task", task, app=app), "id", [], {}, {})


def a_memory_error_ends_the_worker():
    try:
        raise MemoryError
    except MemoryError:
        return fails(MemoryError, Request.on_failure, MagicMock(), ExceptionInfo())


def beat_does_not_start_with_a_schedule_whose_class_is_gone():
    app = Celery(set_as_current=False)
    with tempfile.TemporaryDirectory() as folder:
        with shelve.open(f"{folder}/schedule") as file:
            file["entries"] = {}
            file.dict[b"entries"] = b"cgone\nSchedule\n."
        options = {"app": app, "schedule_filename": f"{folder}/schedule"}
        return fails(ImportError, beat.PersistentScheduler, **options)


def flower_does_not_notice_that_its_connection_is_lost():
    return not redis.Channel.socket_keepalive


STILL = [
    ("Message", an_acknowledgement_that_fails_is_not_repeated),
    ("KeepMessages", redis_redelivers_what_its_own_worker_holds),
    ("QoS", redis_loses_a_message_that_it_cannot_copy),
    ("DeclareQueues", no_queue_is_declared_before_it_is_bound),
    ("NoticeLostConnection", a_lost_connection_is_replaced_by_one_that_consumes_nothing),
    ("maybe_declare", a_task_is_sent_through_a_closed_channel_after_a_second_declaration),
    ("Connection", a_poll_of_sqs_waits_forever),
    ("Channel", a_poll_of_sqs_that_fails_is_the_last),
    ("Channel", sqs_gets_a_message_back_after_a_poll),  # its method _restore
    ("Transport", a_task_is_sent_twice_at_most),
    ("may_succeed_later", a_result_is_not_stored_after_a_restart_of_postgresql),
    ("may_succeed_later", a_result_is_not_stored_after_an_error_of_dynamodb),
    ("keep_results_of_chords", a_chord_does_not_get_an_ignored_result),
    ("store_unless_ended", the_state_retry_replaces_a_result),
    ("Drainer", greenlets_get_no_result_after_an_error),
    ("SoftStop", a_soft_shutdown_takes_its_whole_time),
    ("limit_shutdown", threads_cannot_be_terminated),
    ("call", a_task_that_raises_a_system_exit_never_ends),
    ("MemoryError", a_memory_error_ends_the_worker),
    ("Scheduler", beat_does_not_start_with_a_schedule_whose_class_is_gone),
    ("flower", flower_does_not_notice_that_its_connection_is_lost),
]


@pytest.mark.parametrize(("name", "is_there"), STILL)
def test_the_fault_is_still_there(name, is_there):
    assert is_there(), f"remove {name} from templates/ and durable-jobs/: upstream has cured it"


def test_each_workaround_names_its_fault(workarounds):
    assert {name for name, _ in STILL} == workarounds.keys()
    for sources in workarounds.values():
        for source in sources:
            assert re.search(UPSTREAM, source), source


@pytest.mark.parametrize("name", SHARED)
def test_the_library_has_the_same_workaround(workarounds, name):
    text = (LIBRARY / "src/durable_jobs" / SHARED[name]).read_text("utf-8")
    assert workarounds[name] == {parts(text)[name]}
