"""What `manage.py check` says of work that nobody would do; with --deploy, of what would lose it."""

import os
import re
from urllib.parse import urlsplit

from celery import current_app
from django.conf import settings
from django.core.checks import Error, Info, Warning, register

from .messages import queue_of
from .pools import TIME_LIMITED


@register()
def check_names(app_configs, **kwargs):
    """Check the queues that tasks are routed to, and the tasks that the schedule names."""
    current_app.autodiscover_tasks(force=True)  # the loader would run this check again
    for name, task in sorted(current_app.tasks.items()):
        queue = queue_of(task, [], {})
        if queue not in settings.WORKER_QUEUES and not name.startswith("celery."):
            yield Warning(
                f"{name} goes to the queue {queue}, which is not in WORKER_QUEUES: no worker takes it.",
                hint="Add it there, or mend CELERY_TASK_ROUTES.",
                id="jobs.W005",
            )
    for name, entry in current_app.conf.beat_schedule.items():
        if entry["task"] not in current_app.tasks:
            yield Warning(
                f"CELERY_BEAT_SCHEDULE: {name} names the task {entry['task']}, which does not exist.",
                hint="Write the path of its function: app.tasks.name. Is its app in INSTALLED_APPS?",
                id="jobs.W006",
            )


@register(deploy=True)
def check_flower(app_configs, **kwargs):
    # Without the setting there is no Flower, and the default passes.
    users = getattr(settings, "FLOWER_BASIC_AUTH", "no:flower").split(",")
    if any(user.partition(":")[2] in ("", "change-me") for user in users):
        yield Error(
            "FLOWER_BASIC_AUTH has no password: anyone who reaches Flower can see and revoke tasks.",
            hint='Set it to user:password. Without Flower: SILENCED_SYSTEM_CHECKS = ["jobs.E002"]',
            id="jobs.E002",
        )


@register(deploy=True)
def check_servers(app_configs, **kwargs):
    """Check the servers of messages, results and cache."""
    used_by = {}
    for name in ["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "CACHE_URL"]:
        url = getattr(settings, name, None) or os.environ.get(name, "")
        checked = re.search("ssl_cert_reqs=(CERT_)?required", url, re.IGNORECASE)
        if not checked and re.search("^rediss:|ssl_cert_reqs", url):
            yield Warning(
                f"The TLS certificate of the server of {name} is not checked.",
                hint="Add ?ssl_cert_reqs=required, and ssl_ca_certs= for an authority of your own.",
                id="jobs.W001",
            )
        parts = urlsplit(url.split(";")[0])  # the first sentinel stands for all
        place = parts.hostname, parts.port or 6379, parts.path.strip("/") or "0"
        if url.startswith(("redis", "sentinel")) and used_by.setdefault(place, name) != name:
            yield Warning(
                f"{used_by[place]} and {name} are the same database: clearing one empties both.",
                hint="Give each a database of its own, and the cache a server of its own.",
                id="jobs.W002",
            )


@register(deploy=True)
def check_time_limits(app_configs, **kwargs):
    """Check plain tasks that may run longer than the broker waits before it delivers them again."""
    current_app.loader.import_default_modules()
    limit = settings.REDELIVERY_SECONDS
    for task in current_app.tasks.values():
        if task.acks_late and task.time_limit >= limit:
            yield Warning(
                f"{task.name} may run for {task.time_limit} s; the broker repeats it after {limit} s.",
                hint="config/settings.py says where REDELIVERY_SECONDS comes from: raise that first.",
                id="jobs.W004",
            )


@register(deploy=True)
def check_pool(app_configs, **kwargs):
    if (pool := settings.CELERY_WORKER_POOL) not in TIME_LIMITED:
        yield Info(
            f"The pool {pool} has no time limits: a task that waits for ever keeps its slot.",
            hint="Give each wait a timeout of its own. Then add this id to SILENCED_SYSTEM_CHECKS.",
            id="jobs.I001",
        )
