"""Celery's defaults that celery-steady changes. No other module writes to app.conf.

A setting of the project goes before each of these, wherever it is set. In a dictionary, its keys do. The
README has the reasons, in one table.
"""

import sys
import time
from logging import getLogger

from celery.concurrency import solo, thread

from celery_steady import versions
from celery_steady.transports import check, kind
from celery_steady.waiting import log_waiting

logger = getLogger(__name__)

VISIBILITY_SECONDS = 120  # until a killed worker's tasks run again
MANY = 10**9  # retries. JSON has no number without an end.
QUICK = {"max_retries": 1, "interval_start": 0}
QUICK_AWS = {"connect_timeout": 1, "read_timeout": 1, "retries": {"total_max_attempts": 1}}
PATIENT_AWS = {
    "connect_timeout": 5,
    "read_timeout": 20,
    "retries": {"total_max_attempts": 6, "mode": "standard"},  # for about 15 seconds
}
MERGED = "broker_transport_options", "result_backend_transport_options", "task_publish_retry_policy"


def everywhere():
    """Settings of each process whose app is celery_steady.Celery."""
    classes = {
        "worker_consumer": "celery_steady.consumer:Consumer",
        "beat_scheduler": "celery_steady.beat:Scheduler",
    }
    if not versions.fits("defaults"):
        return classes  # which are Celery's own then, and say so
    return classes | {
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_retry_on_worker_lost": True,
        "task_publish_retry_policy": QUICK,
        "broker_connection_timeout": 1,
        "broker_connection_retry_on_startup": True,
        "broker_pool_acquire_timeout": 1,
        "redis_socket_timeout": 1,
        "redis_socket_connect_timeout": 1,
        "result_backend_always_retry": True,
        "result_backend_max_retries": 1,
        "worker_proc_alive_timeout": 60,
        "worker_soft_shutdown_timeout": 20,
    }


def sending(broker):
    """broker_transport_options of connections that send: a request waits for them."""
    if not versions.fits("defaults"):
        return {}
    return {
        "redis": {"socket_timeout": 1, "socket_connect_timeout": 1},
        "sqs": {"client-config": QUICK_AWS},
        "amqp": {
            "confirm_publish": True,
            "read_timeout": 1,
            "write_timeout": 1,
            "max_retries": 1,
        },
    }.get(broker, {})


def reading_results(backend):
    """result_backend_transport_options of each process whose app is celery_steady.Celery."""
    if not versions.fits("defaults"):
        return {}
    return {
        "redis": {"retry_policy": QUICK | {"timeout": 2}},
        "dynamodb": {"client-config": QUICK_AWS},
    }.get(backend, {})


def waiting(app, pool=None):
    """Settings that workers and Beat have in addition, also if their app is Celery's own."""
    broker, backend = kind(app.conf.broker_write_url), kind(app.conf.result_backend)
    options = {"max_retries": None, "connect_retries_timeout": None} | {
        "redis": {"socket_timeout": 20, "socket_connect_timeout": 5},
        "sqs": {"client-config": PATIENT_AWS},
        "amqp": {"read_timeout": 20, "write_timeout": 20},
    }.get(broker, {})
    settings = {
        "broker_transport_options": options,
        "broker_connection_max_retries": None,
        "broker_connection_timeout": 4,
        "broker_channel_error_retry": broker == "redis",  # outlive one that refuses to write
        "task_publish_retry_policy": {
            "max_retries": None,
            "interval_max": 5,
            "errback": log_and_wait,
        },
        "redis_socket_timeout": 20,
        "redis_socket_connect_timeout": 5,
        # What counts a chord's ended tasks isn't retried otherwise: a lost connection would fail the task.
        "redis_retry_on_timeout": True,
        # The main process of prefork must go on, or its messages would be delivered again.
        "result_backend_always_retry": not is_prefork(pool),
        "result_backend_max_retries": MANY,
        "result_backend_transport_options": (reading_results(backend) if is_ours(app) else {})
        | {
            # A Redis that refuses to write, such as a replica or a full one, may do so later.
            "redis": {"additional_connection_errors": ["redis.exceptions.ResponseError"]},
            "dynamodb": {"client-config": PATIENT_AWS},
        }.get(backend, {}),
    }
    if broker == "amqp" and is_green(pool):
        # With heartbeats, a gevent worker takes ten messages a second, or none with publisher confirms.
        settings["broker_heartbeat"] = 0
        if own(app.conf).get("broker_heartbeat"):
            options["confirm_publish"] = False
    return settings


def renewing(app, pool):
    """Settings of a worker that renews its messages."""
    transport = app.connection_for_read().transport
    if not hasattr(getattr(transport, "Channel", None), "renew"):
        return {}
    options = {"visibility_timeout": VISIBILITY_SECONDS}
    if transport.driver_type == "redis":
        # KeepMessages looks for messages of dead workers more often than kombu's timer.
        options["unacked_restore_interval"] = 100
        if is_green(pool):
            # Each greenlet that acknowledges a task takes a connection. With kombu's limit of 10, some fail.
            options["max_connections"] = pool.limit + 100
    return {
        "broker_transport_options": options,
        # After a lost connection, Celery would take fewer messages. Those of running tasks count already.
        "worker_enable_prefetch_count_reduction": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,  # they go on, and run once
    }


def is_prefork(pool):
    # Only its own module has this class, and a web server on Windows can't import it.
    prefork = sys.modules.get("celery.concurrency.prefork")
    return prefork is not None and isinstance(pool, prefork.TaskPool)


def is_green(pool):
    return getattr(pool, "is_green", False)


def log_and_wait(error, interval):
    """Say why a task can't be sent. kombu repeats immediately if the broker refuses it: wait a second."""
    log_waiting(logger, "send a task", error)
    if not interval:
        time.sleep(1)


def is_ours(app):
    """Return whether the app is celery_steady.Celery."""
    return getattr(app, "is_steady", False)


# How they are set


class Merged(dict):
    """A dictionary of the project, with defaults for the keys that it doesn't have."""


def own(conf):
    """Return what the project has set."""
    return type(conf)({}, conf.maps[:-1], conf._keys, conf.prefix)


def merge(ours, theirs):
    theirs = getattr(theirs, "theirs", theirs) or {}
    merged = Merged(ours | theirs)
    if "client-config" in ours.keys() & theirs.keys():
        merged["client-config"] = ours["client-config"] | theirs["client-config"]
    merged.theirs = theirs
    return merged


def override(conf, name, value):
    """Set what goes before the project's own. Before Celery 5.7, a name with the namespace is looked up first."""
    conf[conf._to_keys(name)[0]] = value


def set_defaults(conf, settings):
    """Let these be the defaults of this configuration, in place of Celery's."""
    from celery.app.defaults import _TO_OLD_KEY  # its own: a later version may not have it

    defaults, theirs = conf.maps[-1], own(conf)
    for name, value in settings.items():
        key = name if name in defaults else _TO_OLD_KEY.get(name, name)
        if name in MERGED:
            value = merge(value, theirs.get(name))
            if value.theirs:
                override(conf, name, value)
        if key in defaults:  # Celery 5.5 doesn't have all
            defaults[key] = value


def for_beat(app):
    set_defaults(app.conf, waiting(app))


def for_worker(app, pool):
    check(app)
    settings, keeping = waiting(app, pool), renewing(app, pool)
    settings["broker_transport_options"] |= keeping.pop("broker_transport_options", {})
    set_defaults(app.conf, settings | keeping)
    logger.debug("Defaults of this worker: %r", settings | keeping)
    name = "worker_cancel_long_running_tasks_on_connection_loss"
    if isinstance(pool, (solo.TaskPool, thread.TaskPool)) and app.conf[name]:
        logger.warning("%s is off: this pool can't cancel a task", name)
        override(app.conf, name, False)


def for_results(app):
    """Before the app makes its result backend. A worker has merged its own options before."""
    name = "result_backend_transport_options"
    if not isinstance(app.conf[name], Merged):
        set_defaults(app.conf, {name: reading_results(kind(app.conf.result_backend))})


def shown(app):
    """Return the defaults that hold in this process, for `celery report`."""
    broker, backend = kind(app.conf.broker_write_url), kind(app.conf.result_backend)
    theirs = own(app.conf)
    found = {name: value for name, value in everywhere().items() if theirs.get(name) is None}
    found["broker_transport_options, to send tasks"] = sending(broker)
    found["result_backend_transport_options"] = reading_results(backend)
    return found
