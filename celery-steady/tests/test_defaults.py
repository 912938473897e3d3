"""The defaults of celery_steady.Celery, and those of workers and Beat: a project's own settings go first."""

import logging
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import celery
import pytest
from celery.concurrency import prefork, solo, thread
from celery.exceptions import ImproperlyConfigured
from kombu import Connection
from test_isolation import ENV

from celery_steady import Celery, defaults, liveness, versions, waiting
from celery_steady import redis as steady_redis

URLS = ["memory://", "redis://", "pyamqp://", "sqs://"]
OWN = {
    "broker_connection_max_retries": 0,
    "broker_connection_retry_on_startup": False,
    "broker_connection_timeout": 3,
    "broker_transport_options": {"socket_timeout": 7, "visibility_timeout": 99},
    "result_backend_always_retry": False,
    "result_backend_max_retries": 5,
    "result_backend_transport_options": {"global_keyprefix": "own:"},
    "task_acks_late": False,
    "task_publish_retry_policy": {"max_retries": 9},
    "worker_cancel_long_running_tasks_on_connection_loss": True,
    "worker_consumer": "celery.worker.consumer:Consumer",
    "worker_enable_prefetch_count_reduction": True,
    "worker_soft_shutdown_timeout": 0,
}


def make_app(url="redis://", kind=Celery, **conf):
    app = kind("project", broker=url, backend="redis://", set_as_current=False)
    app.conf.update(conf)
    return app


def with_names(own, namespace):
    module = types.ModuleType("own_settings")
    prefix = f"{namespace}_" if namespace else ""
    for name, value in own.items():
        setattr(module, (prefix + name).upper() if namespace else name, value)
    return module


def place_object(app, own):
    app.config_from_object(with_names(own, None))


def place_namespace(app, own):
    app.config_from_object(with_names(own, "CELERY"), namespace="CELERY")


def place_object_late(app, own):
    assert app.conf.task_acks_late
    app.config_from_object(with_names(own, None))


def place_envvar(app, own, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_settings", with_names(own, None))
    monkeypatch.setenv("OWN_SETTINGS", "own_settings")
    app.config_from_envvar("OWN_SETTINGS")


def place_update(app, own):
    app.conf.update(own)


def place_update_late(app, own):
    assert app.conf.task_acks_late
    app.conf.update(own)


def place_attributes(app, own):
    for name, value in own.items():
        setattr(app.conf, name, value)


def place_defaults(app, own):
    app.add_defaults(own)


def place_defaults_late(app, own):
    assert app.conf.task_acks_late
    app.add_defaults(lambda: own)


PLACES = [value for name, value in list(globals().items()) if name.startswith("place_")]


@pytest.fixture(params=[*PLACES, "arguments"])
def project(request, monkeypatch):
    """A project's app whose own settings are at one kind of place."""
    if request.param == "arguments":
        return Celery("project", broker="redis://", backend="redis://", set_as_current=False, **OWN)
    app = Celery("project", broker="redis://", backend="redis://", set_as_current=False)
    needed = [monkeypatch] if request.param is place_envvar else []
    request.param(app, OWN, *needed)
    return app


def holds(app):
    for name, value in OWN.items():
        if isinstance(value, dict):
            assert app.conf[name].items() >= value.items(), name
        else:
            assert app.conf[name] == value, name
    assert app.conf.task_reject_on_worker_lost, "the default of what the project doesn't set"


def test_a_projects_settings_go_first_wherever_they_are(project):
    holds(project)
    options = project.connection_for_write().transport_options
    assert options == {"socket_connect_timeout": 1, **OWN["broker_transport_options"]}


def test_they_go_before_a_workers_patience_too(project):
    project.backend  # noqa: B018  it was used before
    defaults.for_worker(project, None)
    holds(project)
    options = project.connection_for_read().transport_options
    assert options["socket_timeout"] == 7 and options["socket_connect_timeout"] == 5
    assert options["visibility_timeout"] == 99 and options["unacked_restore_interval"] == 100
    assert project.conf.task_publish_retry_policy["interval_max"] == 5
    assert "additional_connection_errors" in project.conf.result_backend_transport_options


def test_the_dictionaries_of_the_project_itself_are_not_changed():
    """They may be the same object in another app."""
    options, results = {"socket_timeout": 1}, {"global_keyprefix": "a"}
    app = make_app(broker_transport_options=options, result_backend_transport_options=results)
    defaults.for_worker(app, None)
    assert app.backend and app.connection_for_write()
    assert options == {"socket_timeout": 1} and results == {"global_keyprefix": "a"}


def test_old_names_of_settings_go_first_too():
    app = make_app()
    old = types.SimpleNamespace(CELERY_ACKS_LATE=False, BROKER_CONNECTION_MAX_RETRIES=0)
    app.config_from_object(old)
    assert not app.conf.task_acks_late and app.conf.task_reject_on_worker_lost
    defaults.for_worker(app, None)
    assert app.conf.broker_connection_max_retries == 0 and not app.conf.task_acks_late


def test_a_class_of_the_projects_own_has_the_defaults():
    class Own(Celery):
        def on_init(self):
            self.seen = self.conf.task_default_queue

    assert make_app(kind=Own).conf.task_acks_late


@pytest.mark.parametrize("kind", [Celery, celery.Celery])
@pytest.mark.parametrize("url", URLS)
def test_a_worker_waits_for_its_broker_without_end(url, kind):
    app = make_app(url, kind)
    defaults.for_worker(app, None)
    assert app.conf.broker_connection_max_retries is None
    assert app.conf.task_publish_retry_policy["max_retries"] is None
    for connect in app.connection, app.connection_for_read, app.connection_for_write:
        options = connect().transport_options
        assert options["max_retries"] is options["connect_retries_timeout"] is None


TIMES = re.compile("timeout$|max_attempts$|max_retries$")


def times(settings):
    """Return each time and number of tries that a part of the settings has."""
    found = {}
    for name, value in settings.items():
        found |= times(value) if isinstance(value, dict) else {name: value}
    return {name: value for name, value in found.items() if TIMES.search(name) and value}


@pytest.mark.parametrize(
    ("url", "backend", "names"),
    [
        ("redis://", "redis://", "socket_timeout socket_connect_timeout"),
        ("amqp://", "redis://", "read_timeout write_timeout"),
        ("sqs://", "dynamodb://", "connect_timeout read_timeout total_max_attempts"),
    ],
)
def test_a_worker_waits_longer_for_a_slow_server_than_a_request(url, backend, names):
    request, worker = make_app(url), make_app(url)
    for app in request, worker:
        app.conf.result_backend = backend
    defaults.for_results(request)
    defaults.for_worker(worker, None)
    short, long = (times(app.connection_for_write().transport_options) for app in (request, worker))
    assert short.keys() == {*names.split()} | ({"max_retries"} if url == "amqp://" else set())
    assert all(long[name] > short[name] for name in names.split())
    names = [name for name in defaults.waiting(worker) if TIMES.search(name)]
    assert all(worker.conf[name] > request.conf[name] for name in names if worker.conf[name])
    assert worker.conf.result_backend_max_retries > 10**6
    assert worker.conf.broker_connection_timeout > request.conf.broker_connection_timeout
    assert worker.conf.broker_channel_error_retry is (url == "redis://")
    if backend == "redis://":
        short, long = (times(app.backend.connparams) for app in (request, worker))
        for name in "socket_timeout", "socket_connect_timeout":
            assert long[name] > short[name]


@pytest.mark.parametrize(
    ("url", "renews"), [("redis://", True), ("sqs://", True), ("amqp://", False)]
)
def test_a_worker_that_renews_its_messages_takes_as_many_after_a_lost_connection(url, renews):
    if url == "sqs://" and not versions.fits("Amazon SQS"):
        renews = False
    app = make_app(url)
    defaults.for_worker(app, types.SimpleNamespace(is_green=True, limit=2))
    assert app.conf.worker_enable_prefetch_count_reduction is not renews
    options = app.connection_for_read().transport_options
    assert options.get("visibility_timeout") == (120 if renews else None)
    assert options.get("max_connections") == (102 if url == "redis://" else None)


def test_a_projects_time_to_connect_to_rabbitmq_goes_first():
    app = make_app("amqp://", broker_connection_timeout=3)
    for prepare in bool, lambda app: defaults.for_worker(app, None):
        prepare(app)
        connection = app.connection_for_write()
        assert connection.connect_timeout == 3
        assert "connect_timeout" not in connection.transport_options


@pytest.mark.parametrize("url", URLS)
def test_another_app_is_as_impatient_as_it_was(url):
    other = make_app(url, celery.Celery)
    before = {**other.conf}
    defaults.for_worker(make_app(url), None)
    assert {**other.conf} == before


@pytest.mark.parametrize("namespace", ["", "CELERY"])
@pytest.mark.parametrize("kind", [Celery, celery.Celery])
@pytest.mark.parametrize("name", ["client-config", "proxies"])
def test_what_a_project_says_about_aws_is_kept(kind, namespace, name):
    own = {"client-config": {"read_timeout": 60, "proxies": {"https": "proxy"}}}
    app = make_app("sqs://", kind)
    settings = {"broker_transport_options": own, "result_backend_transport_options": own}
    app.config_from_object(with_names(settings, namespace), namespace=namespace)
    app.conf.result_backend = "dynamodb://"
    for prepare in bool, defaults.for_results, lambda app: defaults.for_worker(app, None):
        prepare(app)
        for options in (
            app.connection_for_write().transport_options,
            app.conf.result_backend_transport_options,
        ):
            assert options["client-config"].items() >= own["client-config"].items()
    assert options["client-config"]["connect_timeout"] == 5


@pytest.mark.parametrize("pool", [thread.TaskPool, solo.TaskPool])
def test_a_pool_that_cannot_cancel_tasks_keeps_them_and_the_log_says_so(pool, caplog):
    name = "worker_cancel_long_running_tasks_on_connection_loss"
    app = make_app("memory://", **{name: True})
    defaults.for_worker(app, pool(1))
    assert app.conf[name] is False and name in caplog.text


def test_the_main_process_of_prefork_does_not_insist_on_a_result():
    def insists(pool):
        app = make_app()
        defaults.for_worker(app, pool)
        return app.conf.result_backend_always_retry

    assert insists(thread.TaskPool(1)) and not insists(prefork.TaskPool(1))


@pytest.mark.parametrize(("heartbeat", "confirms"), [(None, True), (0, True), (60, False)])
def test_gevent_has_heartbeats_or_confirms(heartbeat, confirms):
    """With both, a worker froze."""
    own = {} if heartbeat is None else {"broker_heartbeat": heartbeat}
    app = make_app("amqp://", **own)
    defaults.for_worker(app, types.SimpleNamespace(is_green=True, limit=2))
    assert app.connection_for_write().transport_options["confirm_publish"] is confirms
    assert app.conf.broker_heartbeat == (heartbeat or 0)


# The transport


TRANSPORTS = {
    "redis://host": "celery_steady.redis",
    "rediss://host": "celery_steady.redis",
    "redis+socket:///socket": "celery_steady.redis",
    "sentinel://a:1;sentinel://b:2": "celery_steady.redis",
    "valkey://host": "celery_steady.redis",
    "valkeys://host": "celery_steady.redis",
    "sqs://": "celery_steady.sqs" if versions.fits("Amazon SQS") else "kombu.transport.SQS",
    "amqp://host": "kombu.transport.pyamqp",
    "amqps://host": "kombu.transport.pyamqp",
    "memory://": "kombu.transport.memory",
    "filesystem://": "kombu.transport.filesystem",
}


def module_of(transport):
    return transport.__module__.removesuffix(".transport")


@pytest.mark.parametrize("url", TRANSPORTS)
def test_the_url_says_which_transport_it_is(url):
    app = make_app(url, broker_transport_options={"master_name": "main"})
    for connection in app.connection_for_read(), app.connection_for_write().Pool(1).new():
        assert module_of(connection.get_transport_cls()) == TRANSPORTS[url]
        assert (
            bool(connection.ssl) == url.startswith(("rediss:", "valkeys:", "amqps:"))
            or "amqps" in url
        )


@pytest.mark.parametrize(
    "urls", ["redis://a;valkeys://b;amqp://c", ["redis://a", "rediss://b", "amqp://c"]]
)
def test_each_url_of_several_has_its_own_transport(urls):
    connection = make_app(urls).connection_for_write()
    kinds = []
    for _ in range(3):
        kinds.append((module_of(type(connection.transport)), bool(connection.ssl)))
        connection.maybe_switch_next()
    assert kinds[0] == ("celery_steady.redis", False)
    assert kinds[1] == ("celery_steady.redis", True)
    assert kinds[2][0] == "kombu.transport.pyamqp"


@pytest.mark.parametrize(
    "url", ["redis://:valkey@valkey.own:1/2", "VALKEY://:valkey@valkey.own:1/2"]
)
def test_only_the_scheme_of_a_url_is_read(url):
    app = make_app(url, result_backend=url)
    connection = app.connection_for_write()
    assert (connection.hostname, connection.password) == ("valkey.own", "valkey")
    found = app.backend.connparams
    assert (found["host"], found["password"], found["db"]) == ("valkey.own", "valkey", 2)


@pytest.mark.parametrize("kind", [Celery, celery.Celery])
@pytest.mark.parametrize("url", ["rediss://me:own@host:1/2", "valkeys://me:own@host:1/2"])
def test_a_broker_with_tls_is_encrypted_with_the_old_setting_too(url, kind):
    app = make_app(url, kind, broker_transport="celery_steady.redis:Transport")
    for connection in app.connection_for_read(), app.pool.connection.Pool(1).new():
        assert connection.transport.scheme == "rediss" and connection.ssl
        assert connection.as_uri(include_password=True) == "rediss://me:own@host:1/2"
        assert (connection.hostname, connection.port, connection.password) == ("host", 1, "own")


@pytest.mark.parametrize("url", ["memory://", "amqp://host", "sqs://"])
def test_a_sender_with_a_transport_of_another_broker_is_refused(url):
    app = make_app(url, celery.Celery, broker_transport="celery_steady.redis:Transport")
    with pytest.raises(ImproperlyConfigured, match="broker_transport"):
        app.connection_for_write().transport  # noqa: B018


@pytest.mark.parametrize("kind", [Celery, celery.Celery])
@pytest.mark.parametrize(
    ("url", "module"),
    [("memory://", "redis"), ("amqp://", "redis"), ("sqs://", "redis"), ("redis://", "sqs")],
)
def test_a_transport_of_another_broker_is_refused(url, module, kind):
    app = make_app(url, kind, broker_transport=f"celery_steady.{module}:Transport")
    with pytest.raises(ImproperlyConfigured, match="broker_transport"):
        defaults.for_worker(app, None)


def test_a_stock_app_whose_transport_would_not_be_used_is_refused():
    own = {"broker_transport": "celery_steady.redis:Transport"}
    app = make_app("redis+socket:///socket", celery.Celery, **own)
    with pytest.raises(ImproperlyConfigured, match="broker_transport"):
        defaults.for_worker(app, None)


def test_an_unknown_broker_is_named_in_the_log(caplog):
    app = make_app("zookeeper://")
    defaults.check(app)
    assert "zookeeper" in caplog.text


@pytest.mark.parametrize(
    ("url", "options", "channel"),
    [
        ("redis://localhost", {}, steady_redis.Channel),
        ("rediss://localhost", {}, steady_redis.Channel),
        ("sentinel://localhost", {"master_name": "main"}, steady_redis.transport.SentinelChannel),
        (
            "sentinel://a:1;sentinel://b:2",
            {"master_name": "main"},
            steady_redis.transport.SentinelChannel,
        ),
    ],
)
def test_sentinel_has_a_channel_of_its_own(url, options, channel):
    transport = "celery_steady.redis:Transport"
    connection = Connection(url, transport=transport, transport_options=options)
    assert connection.transport.Channel is channel


@pytest.mark.parametrize(
    ("url", "unused"),
    [
        ("redis://", "botocore boto3 sqlalchemy"),
        ("memory://", "redis botocore"),
        ("amqp://", "redis botocore"),
    ],
)
def test_no_client_of_another_broker_is_imported(url, unused):
    code = f"""
import sys, celery_steady
assert "celery" not in sys.modules
from celery_steady import Celery
app = Celery(broker={url!r})
app.connection_for_write().transport
print(*(name for name in {unused.split()} if name in sys.modules))
"""
    printed = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert (printed.stdout.strip(), printed.returncode) == ("", 0), printed.stderr


# What is shown


class Lazy:
    """As Django's texts, which are translated late."""

    __class__ = property(lambda self: str)

    def __str__(self):
        return "http://me:secret8@host"

    __repr__ = __str__


def test_no_password_of_any_setting_is_shown():
    app = make_app(
        "redis://:secret1@host", FLOWER_BASIC_AUTH="me:secret2", SENTRY_DSN="https://secret3@host/1"
    )
    app.conf.update(
        CACHES={"default": {"LOCATION": ["redis://:secret4@a", "redis://:secret4@b"]}},
        CELERY_BROKER_URL="sentinel://:secret5@a;sentinel://:secret5@b",
        broker_failover=["amqp://me:secret6@host"],
        result_backend="db+postgresql://me:secret7@host/name",
        LOGIN_URL=Lazy(),
    )
    for shown in app.bugreport(), repr(app.conf.table()), repr(app.conf.table(with_defaults=True)):
        assert "secret" not in shown.lower().replace("security", "").replace("secret_", "")
        assert "host" in shown
    assert "secret2" in repr(app.conf.table(censored=False))


def test_no_password_is_shown_before_the_first_setting_is_read():
    queues = [{"url": "http://me:secret1@host/1"}, {"PASSWORD": "secret2"}]
    app = Celery(
        broker="sqs://", broker_transport_options={"predefined": queues}, set_as_current=False
    )
    assert "host" in repr(shown := app.conf.table()) and "secret" not in repr(shown)


def test_celery_report_shows_each_default():
    shown = make_app(task_acks_late=False).bugreport()
    for name in defaults.everywhere().keys() - {"task_acks_late"}:
        assert name in shown
    assert "task_acks_late: True" not in shown


def test_the_readme_lists_each_default():
    page = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    table = page.split("<!-- defaults -->")[1].split("<!-- end -->")[0]
    listed = [
        set(re.findall(r"^\| `(\w+)`", part, re.M)) for part in table.split("| **workers and")
    ]
    source = "".join(file.read_text("utf-8") for file in Path(__file__).parent.glob("test_*.py"))
    tests = re.findall(r"^\| `.*\| (`\w+`|none: .*) \|$", table, re.M)
    assert len(tests) == sum(map(len, listed))
    assert all(f"def test_{name}(" in source for name in re.findall(r"`(\w+)`", str(tests)))
    options = {"broker_transport_options", "result_backend_transport_options"}
    assert listed[0] == defaults.everywhere().keys() | options
    app = make_app("redis://")
    apps = app, make_app("amqp://")
    green = types.SimpleNamespace(is_green=True, limit=2)
    settings = [defaults.waiting(each, green) | defaults.renewing(each, green) for each in apps]
    assert listed[1] == set().union(*settings)
    if versions.minor("celery") == versions.NEWEST:  # older ones don't have all
        assert all(name in app.conf for name in listed[0] | listed[1])


# Waiting


def test_who_waits_says_so_at_once_and_then_once_a_minute(caplog, monkeypatch):
    now = 1000
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now)
    monkeypatch.setattr(waiting, "logged", {})
    counts = []
    for now in range(1000, 1125):  # noqa: B007  the clock's
        for what in "one", "other":
            waiting.log_waiting(
                logging.getLogger("test"), what, ConnectionError("refused by the server")
            )
        counts.append(len(caplog.records))
    assert counts[0] == 2 and counts[-1] == 6
    assert Counter("refused by the server" in record.getMessage() for record in caplog.records) == {
        True: 6
    }


def test_a_task_that_a_worker_cannot_send_is_no_silent_wait(caplog, monkeypatch):
    """And not a busy one: Redis may refuse it at once, again and again."""
    slept = []
    monkeypatch.setattr(waiting, "logged", {})
    monkeypatch.setattr(defaults.time, "sleep", slept.append)
    app = make_app()
    defaults.for_beat(app)
    errback = app.conf.task_publish_retry_policy["errback"]
    for interval in 0, 0, 5:
        errback(ConnectionError("NOPERM"), interval)
    assert slept == [1, 1] and caplog.text.count("NOPERM") == 1


# A file for supervisors


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
