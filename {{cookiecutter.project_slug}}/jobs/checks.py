"""What `manage.py check --deploy` says of settings that would lose work, double it or expose it."""

import os
import re
from itertools import combinations
from urllib.parse import urlsplit

from celery import current_app
from django.conf import settings
from django.core.checks import Error, Warning, register


def urls():
    """Return the servers in use, {variable: URL}."""
    names = ["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "CACHE_URL"]
    found = {name: getattr(settings, name, None) or os.environ.get(name) for name in names}
    return {name: url for name, url in found.items() if url}


@register(deploy=True)
def check_servers(app_configs, **kwargs):
    for name, url in urls().items():
        if url.startswith("rpc"):
            yield Error(
                "rpc:// loses results: only the process that sent a task can read them.",
                hint=f"Point {name} to a server or a database.",
                id="jobs.E001",
            )
        if re.search(r"cert_reqs=(cert_)?none", url, re.IGNORECASE):
            yield Warning(
                f"{name} switches off the check of the server's TLS certificate.",
                hint="Use ssl_cert_reqs=required, with ssl_ca_certs for an authority of your own.",
                id="jobs.W001",
            )


@register(deploy=True)
def check_shared_database(app_configs, **kwargs):
    for (name, url), (other, other_url) in combinations(urls().items(), 2):
        left, right = urlsplit(url), urlsplit(other_url)
        same_path = left.path.strip("/0") == right.path.strip("/0")
        if left.netloc and left.netloc == right.netloc and same_path:
            yield Warning(
                f"{name} and {other} are one database: to clear one of them empties both.",
                hint="Give each a database of its own, and the cache a server of its own.",
                id="jobs.W002",
            )


@register(deploy=True)
def check_flower(app_configs, **kwargs):
    if not os.environ.get("FLOWER_BASIC_AUTH"):
        yield Warning(
            "Flower has no password: whoever reaches it sees arguments and can revoke tasks.",
            hint="Set FLOWER_BASIC_AUTH=user:password.",
            id="jobs.W003",
        )
{% include "brokers/" ~ cookiecutter._broker ~ "/checks.py" %}
