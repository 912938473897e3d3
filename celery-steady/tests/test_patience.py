"""Workers and Beat wait longer for servers than requests do: only in their app, and only longer."""

import pytest
from celery import Celery
from kombu import Connection
from workers import in_thread

from celery_steady import liveness
from celery_steady import redis as steady_redis
from celery_steady.patience import be_patient

URLS = ["memory://", "redis://", "pyamqp://", "sqs://"]


def make_app(url, **conf):
    app = Celery(broker=url, set_as_current=False)
    app.conf.update(conf)
    return app


@pytest.mark.parametrize("url", URLS)
def test_a_worker_waits_for_its_broker_without_end(url):
    app = make_app(url, broker_connection_max_retries=3)
    be_patient(app)
    assert app.conf.broker_connection_max_retries is None
    assert app.conf.task_publish_retry_policy["max_retries"] is None
    assert app.connection().transport_options["max_retries"] is None


@pytest.mark.parametrize("url", URLS)
def test_another_app_is_as_impatient_as_it_was(url):
    other = make_app(url, broker_transport_options={"socket_timeout": 1, "read_timeout": 1})
    before = {**other.conf}
    be_patient(make_app(url))
    assert {**other.conf} == before


@pytest.mark.parametrize(
    ("url", "option"),
    [
        ("redis://", "socket_timeout"),
        ("redis://", "socket_connect_timeout"),
        ("pyamqp://", "connect_timeout"),
        ("pyamqp://", "read_timeout"),
        ("pyamqp://", "write_timeout"),
    ],
)
def test_a_timeout_of_the_broker_only_gets_longer(url, option):
    def lengthened(seconds):
        app = make_app(url, broker_transport_options={option: seconds, "other": 1})
        be_patient(app)
        assert app.conf.broker_transport_options["other"] == 1
        return app.conf.broker_transport_options[option]

    assert lengthened(100) == 100
    assert lengthened(1) == lengthened(None) > 1


@pytest.mark.parametrize("name", ["redis_socket_timeout", "redis_socket_connect_timeout"])
def test_a_timeout_of_the_results_only_gets_longer(name):
    def lengthened(seconds):
        app = make_app("redis://", **{name: seconds})
        be_patient(app)
        return app.conf[name]

    assert lengthened(1000) == 1000
    assert lengthened(0.1) == lengthened(None) > 0.1


def test_the_options_of_the_project_itself_are_not_changed():
    """They may be the same object in another app."""
    options, results = {"socket_timeout": 1}, {"global_keyprefix": "a"}
    app = make_app(
        "redis://", broker_transport_options=options, result_backend_transport_options=results
    )
    be_patient(app)
    assert options == {"socket_timeout": 1} and results == {"global_keyprefix": "a"}
    assert app.conf.result_backend_transport_options["global_keyprefix"] == "a"


@pytest.mark.parametrize(
    ("url", "options", "channel"),
    [
        ("redis://localhost", {}, steady_redis.Channel),
        ("rediss://localhost", {}, steady_redis.Channel),
        ("sentinel://localhost", {"master_name": "main"}, steady_redis.SentinelChannel),
        ("sentinel://a:1;sentinel://b:2", {"master_name": "main"}, steady_redis.SentinelChannel),
    ],
)
def test_sentinel_has_a_channel_of_its_own(url, options, channel):
    transport = "celery_steady.redis:Transport"
    connection = Connection(url, transport=transport, transport_options=options)
    assert connection.transport.Channel is channel


def test_the_liveness_file_is_touched(tmp_path, monkeypatch):
    file = tmp_path / "alive"
    monkeypatch.setenv("LIVENESS_FILE", str(file))
    liveness.touch_liveness_file()
    assert file.exists()


def test_a_liveness_file_that_cannot_be_written_ends_no_worker(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LIVENESS_FILE", str(tmp_path / "missing/alive"))
    liveness.touch_liveness_file()
    assert len(caplog.records) == 1


def test_without_a_liveness_file_nothing_is_touched(monkeypatch):
    monkeypatch.delenv("LIVENESS_FILE", raising=False)
    liveness.touch_liveness_file()


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_pool_that_cannot_cancel_tasks_keeps_them_when_the_connection_is_lost(pool):
    name = "worker_cancel_long_running_tasks_on_connection_loss"
    app = make_app("memory://", worker_consumer="celery_steady.consumer:Consumer", **{name: True})
    with in_thread(app, pool):
        assert app.conf[name] is False
