"""Checks for `manage.py check`; those with deploy=True run with --deploy."""

import inspect
import os
import re
from urllib.parse import urlsplit

from celery import Task, current_app
from celery.exceptions import QueueNotFound
from celery.schedules import maybe_schedule
from django.conf import settings
from django.core.checks import Error, Warning, register
from django.utils.module_loading import autodiscover_modules

from celery_steady.transports import as_redis, kind

CONSUMER_TIMEOUT = 1800  # seconds: RabbitMQ's own


def all_tasks():
    autodiscover_modules("tasks")  # as a worker does
    return current_app.tasks.values()


def queue_of(task):
    """Return the name of the queue to which apply_async() sends the task, or None if there is none."""
    options = {"queue": getattr(task, "queue", None)}  # before CELERY_TASK_ROUTES
    try:
        route = current_app.amqp.router.route(options, task.name)
    except QueueNotFound:
        return None
    return route["queue"].name if "queue" in route else current_app.conf.task_default_queue


@register()
def check_queues(app_configs, **kwargs):
    """Find tasks without a queue: with CELERY_TASK_CREATE_MISSING_QUEUES = False, sending one is an error."""
    for task in all_tasks():
        if not queue_of(task):
            yield Error(
                f"The queue of {task.name} is not in CELERY_TASK_QUEUES.",
                hint="Add it there, or correct its name in the task or in CELERY_TASK_ROUTES.",
                id="celery_steady.E001",
            )


@register()
def check_functions(app_configs, **kwargs):
    """Find tasks whose call only returns a coroutine or a generator, so that nothing runs.

    A class of tasks with a __call__ of its own may run them, or one says so with an attribute
    `_runs_coroutines`. Some pools run coroutines, too, so this is no error.
    """
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    for task in all_tasks():
        run = inspect.unwrap(task.run)
        is_run = type(task).__call__ is not Task.__call__ or hasattr(task, "_runs_coroutines")
        if not is_run and any(is_kind(run) for is_kind in kinds):
            yield Warning(
                f"A worker would not run {task.name}: it is async, or contains yield.",
                hint="Call async code with asgiref.sync.async_to_sync(), in a plain function.",
                id="celery_steady.W008",
            )


@register()
def check_rate_limits(app_configs, **kwargs):
    """Find rate-limited tasks that share a queue: they delay the others in it."""
    queues = {task: queue_of(task) for task in all_tasks()}
    for task, queue in queues.items():
        if task.rate_limit and list(queues.values()).count(queue) > 1:
            yield Warning(
                f"The rate limit of {task.name} also delays the other tasks of the queue {queue}.",
                hint="Route it to a queue of its own, and start a worker for that queue.",
                id="celery_steady.W001",
            )


@register()
def check_time_limits(app_configs, **kwargs):
    """Find tasks that set their own time limit, but keep the soft limit of the settings."""
    hard, soft = current_app.conf.task_time_limit, current_app.conf.task_soft_time_limit
    for task in all_tasks():
        # Before Celery 5.7, those of the settings are not the task's.
        is_own = task.time_limit not in (None, hard)
        if soft and is_own and task.soft_time_limit in (None, soft):
            yield Warning(
                f"{task.name} has a time limit of {task.time_limit} s, and a soft one of {soft:.0f} s.",
                hint="Set time_limit and soft_time_limit together.",
                id="celery_steady.W002",
            )


@register(deploy=True)
def check_consumer_timeout(app_configs, **kwargs):
    """Find tasks that a worker may hold so long that RabbitMQ delivers them a second time."""
    if kind(current_app.conf.broker_url) != "amqp":
        return
    limit = getattr(settings, "RABBITMQ_CONSUMER_TIMEOUT", CONSUMER_TIMEOUT)
    for task in all_tasks():
        # A worker may hold its message while another task runs as long.
        if task.acks_late and 2 * (task.time_limit or 0) >= limit:
            yield Warning(
                f"{task.name} may run for {task.time_limit} s, and wait as long for another task, but"
                f" RabbitMQ delivers it again after {limit} s.",
                hint="Lower its time_limit, or raise consumer_timeout in rabbitmq.conf and"
                " RABBITMQ_CONSUMER_TIMEOUT in the settings to more than twice as much.",
                id="celery_steady.W003",
            )


@register(deploy=True)
def check_intervals(app_configs, **kwargs):
    """Find intervals that start anew too often: at each deploy, if Beat's schedule file is lost."""
    for name, entry in current_app.conf.beat_schedule.items():
        every = getattr(maybe_schedule(entry["schedule"]), "run_every", None)
        if every and every.total_seconds() > 3600:
            text = f"{name} is due every {every}, but starts anew with Beat. Use crontab()."
            yield Warning(text, id="celery_steady.W004")


@register(deploy=True)
def check_overridden(app_configs, **kwargs):
    """Find variables that Celery prefers to the settings."""
    for name in "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND":
        if os.environ.get(name) and os.environ[name] != getattr(settings, name, os.environ[name]):
            yield Warning(
                f"The environment variable {name} overrides the settings.",
                hint="Remove it from the environment and from .env.",
                id="celery_steady.W005",
            )


def redis_urls():
    """Yield (setting, URL) of each Redis server of the settings."""
    caches = {name: cache.get("LOCATION") for name, cache in settings.CACHES.items()}
    named = {
        "CELERY_BROKER_URL": current_app.conf.broker_url,
        "CELERY_RESULT_BACKEND": current_app.conf.result_backend,
        **{f"CACHES[{name!r}]": location for name, location in caches.items()},
    }
    for name, urls in named.items():
        for url in urls if isinstance(urls, (list, tuple)) else [urls]:
            if isinstance(url, str) and kind(url) == "redis":
                yield name, as_redis(url)


@register(deploy=True)
def check_redis(app_configs, **kwargs):
    """Check the addresses of Redis servers."""
    used_by = {}
    for name, url in redis_urls():
        checked = re.search("ssl_cert_reqs=(CERT_)?required", url, re.IGNORECASE)
        if not checked and re.search("^rediss:|ssl_cert_reqs", url):
            yield Warning(
                f"The TLS certificate of the {name} server is not checked.",
                hint="Add ?ssl_cert_reqs=required, and ssl_ca_certs= for your own CA.",
                id="celery_steady.W006",
            )
        parts = urlsplit(url.split(";")[0])  # of several sentinels, compare the first
        place = parts.hostname, parts.port or 6379, parts.path.strip("/") or "0"
        if used_by.setdefault(place, name) != name:
            yield Warning(
                f"{used_by[place]} and {name} use the same database: clearing one empties both.",
                hint="Use a separate database for each, and a separate server for the cache.",
                id="celery_steady.W007",
            )
