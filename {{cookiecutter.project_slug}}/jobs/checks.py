"""Checks for `manage.py check`: what would never run or work and, with --deploy, unsafe settings."""

import os
import re
from urllib.parse import urlsplit

from celery import current_app
from celery.beat import ScheduleEntry
from django.conf import settings
from django.core.cache import caches
from django.core.checks import Error, Info, Warning, register
from django.db import connection, router

from .beat import check_entry
from .messages import queue_of
from .models import Job
from .pools import TIME_LIMITED


@register()
def check_database(app_configs, **kwargs):
    """Refuse databases in which jobs would be lost or never start. This opens no connection."""
    alias, vendor, use_tz = router.db_for_write(Job), connection.vendor, settings.USE_TZ
    if alias != "default" or vendor not in ("postgresql", "sqlite") or not use_tz:
        error = "Jobs need PostgreSQL or SQLite as the database 'default', and USE_TZ = True."
        hint = f"Now {alias=}, {vendor=}, {use_tz=}: correct your database router or settings."
        yield Error(error, hint=hint, id="jobs.E005")


@register()
def check_queues(app_configs, **kwargs):
    """Check the queues that tasks are routed to."""
    for name, task in sorted(current_app.tasks.items()):
        queue = queue_of(task, [], {})
        if queue not in settings.WORKER_QUEUES and not name.startswith("celery."):
            yield Warning(
                f"{name} goes to the queue {queue}, which is not in WORKER_QUEUES: a worker without --queues does not run it.",
                hint="Add the queue to WORKER_QUEUES, or fix CELERY_TASK_ROUTES.",
                id="jobs.W005",
            )


@register()
def check_schedule(app_configs, **kwargs):
    """Check that Beat can start each entry of CELERY_BEAT_SCHEDULE."""
    for name, fields in current_app.conf.beat_schedule.items():
        try:
            entry = ScheduleEntry(**{**fields, "name": name, "app": current_app})
            if entry.schedule is None:
                raise ValueError("it has no schedule")
            check_entry(entry.task, entry.args, entry.kwargs, entry.options)
        except Exception as error:  # a class of your own may raise any
            yield Error(
                f"Beat cannot start {name} of CELERY_BEAT_SCHEDULE: {error}",
                hint="Correct the entry. If its task belongs to another project, silence this check.",
                id="jobs.E003",
            )


@register()
def check_cache(app_configs, **kwargs):
    """Find a missing package. Otherwise only the log would say that requests are not counted."""
    cache = caches["default"]
    try:
        getattr(cache, "_cache", None)  # imports the package, but does not connect
    except ImportError as error:
        yield Error(
            f"The cache of CACHE_URL cannot be used: {error}.",
            hint=f"Add the package to pyproject.toml: `uv add {error.name}`.",
            id="jobs.E004",
        )


@register(deploy=True)
def check_cache_timeouts(app_configs, **kwargs):
    cache = settings.CACHES["default"]
    if "RedisCache" in cache["BACKEND"] and "socket_timeout" not in cache.get("OPTIONS", {}):
        yield Warning(
            "If the cache hangs, so does each request.",
            hint="Add ?socket_timeout=1&socket_connect_timeout=1 to CACHE_URL.",
            id="jobs.W007",
        )


@register(deploy=True)
def check_flower(app_configs, **kwargs):
    # A project that was made without Flower does not have this setting, and passes the check.
    users = getattr(settings, "FLOWER_BASIC_AUTH", "no:flower").split(",")
    if any(user.partition(":")[2] in ("", "change-me") for user in users):
        yield Error(
            "FLOWER_BASIC_AUTH needs a password: anyone who reaches Flower can see and revoke tasks.",
            hint='Set it to user:password. If you run no Flower, add "jobs.E002" to SILENCED_SYSTEM_CHECKS.',
            id="jobs.E002",
        )


@register(deploy=True)
def check_servers(app_configs, **kwargs):
    """Check the addresses of the broker, the result backend and the cache."""
    used_by = {}
    for name in ["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "CACHE_URL"]:
        url = getattr(settings, name, None) or os.environ.get(name, "")
        checked = re.search("ssl_cert_reqs=(CERT_)?required", url, re.IGNORECASE)
        if not checked and re.search("^rediss:|ssl_cert_reqs", url):
            yield Warning(
                f"The TLS certificate of the server of {name} is not checked.",
                hint="Add ?ssl_cert_reqs=required, and ssl_ca_certs= for your own certificate authority.",
                id="jobs.W001",
            )
        parts = urlsplit(url.split(";")[0])  # of several sentinels, compare the first
        place = parts.hostname, parts.port or 6379, parts.path.strip("/") or "0"
        if url.startswith(("redis", "sentinel")) and used_by.setdefault(place, name) != name:
            yield Warning(
                f"{used_by[place]} and {name} use the same Redis database: clearing one empties both.",
                hint="Use a separate database for each, and a separate server for the cache.",
                id="jobs.W002",
            )


@register(deploy=True)
def check_time_limits(app_configs, **kwargs):
    """Find plain tasks that may run so long that the broker delivers them a second time."""
    limit = settings.REDELIVERY_SECONDS
    for task in current_app.tasks.values():
        if task.acks_late and task.time_limit >= limit:
            yield Warning(
                f"{task.name} may run for {task.time_limit} s, but the broker redelivers it after {limit} s.",
                hint="Lower its time_limit, or raise the setting behind REDELIVERY_SECONDS.",
                id="jobs.W004",
            )


@register(deploy=True)
def check_pool(app_configs, **kwargs):
    if (pool := settings.CELERY_WORKER_POOL) not in TIME_LIMITED:
        yield Info(
            f"The pool {pool} has no time limits: a task that waits forever keeps its slot.",
            hint='Give each wait a timeout. Then add "jobs.I001" to SILENCED_SYSTEM_CHECKS.',
            id="jobs.I001",
        )
