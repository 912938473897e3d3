"""What `manage.py check --deploy` says of settings that would lose work."""

import os
import re
from urllib.parse import urlsplit

from celery import current_app
from django.conf import settings
from django.core.checks import Error, Info, Warning, register


@register(deploy=True)
def check_result_backend(app_configs, **kwargs):
    if str(getattr(settings, "CELERY_RESULT_BACKEND", None)).startswith("rpc"):
        yield Error(
            "rpc:// loses results: only the process that sent a task can read them.",
            hint="Point CELERY_RESULT_BACKEND to a server or a database.",
            id="jobs.E001",
        )


@register(deploy=True)
def check_flower(app_configs, **kwargs):
    if not hasattr(settings, "FLOWER_BASIC_AUTH"):  # this broker carries nothing for it
        return
    users = os.environ.get("FLOWER_BASIC_AUTH", "").split(",")
    if any(user.partition(":")[2] in ("", "change-me") for user in users):
        yield Error(
            "FLOWER_BASIC_AUTH has no password: whoever reaches Flower sees and revokes tasks.",
            hint='Set it to user:password. Without Flower: SILENCED_SYSTEM_CHECKS = ["jobs.E002"]',
            id="jobs.E002",
        )


@register(deploy=True)
def check_mail(app_configs, **kwargs):
    if settings.EMAIL_BACKEND.split(".")[-2] in ("console", "dummy", "filebased", "locmem"):
        yield Error(
            "No mail leaves this machine.",
            hint="Set EMAIL_URL=smtp+tls://user:password@host:587.",
            id="jobs.E003",
        )
    if "@localhost" in settings.DEFAULT_FROM_EMAIL:
        yield Error(
            f"Other servers refuse mail from {settings.DEFAULT_FROM_EMAIL}.",
            hint="Set DEFAULT_FROM_EMAIL to an address of a domain of yours.",
            id="jobs.E004",
        )


@register(deploy=True)
def check_servers(app_configs, **kwargs):
    """Of servers that messages, results and the cache share."""
    names = ["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "CACHE_URL"]
    urls = {name: getattr(settings, name, None) or os.environ.get(name, "") for name in names}
    used_by = {}
    for name, url in urls.items():
        parts = urlsplit(url.split(";")[0])
        unchecked = not re.search(r"ssl_cert_reqs=(CERT_)?required", url, re.I)
        if unchecked and (parts.scheme == "rediss" or "ssl_cert_reqs" in url):
            yield Warning(
                f"The TLS certificate of the server of {name} is not checked.",
                hint="Add ?ssl_cert_reqs=required, and ssl_ca_certs= for an authority of your own.",
                id="jobs.W001",
            )
        place = parts.hostname, parts.port or 6379, parts.path.strip("/") or "0"
        if url.startswith(("redis", "sentinel")) and used_by.setdefault(place, name) != name:
            yield Warning(
                f"{used_by[place]} and {name} are one database: to clear one of them empties both.",
                hint="Give each a database of its own, and the cache a server of its own.",
                id="jobs.W002",
            )


@register(deploy=True)
def check_time_limits(app_configs, **kwargs):
    """Of plain tasks, which the broker gives out again while they run too long."""
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
def check_threads(app_configs, **kwargs):
    if getattr(settings, "CELERY_WORKER_POOL", "") == "threads":
        yield Info(
            "Threads have no time limit: a task that waits for ever keeps its thread.",
            hint="Give each wait a timeout of its own. Then add this id to SILENCED_SYSTEM_CHECKS.",
            id="jobs.I001",
        )
