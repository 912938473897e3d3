{% import "brokers/" ~ cookiecutter.broker ~ "/flags.jinja" as broker %}
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
        if url.startswith("rediss:") and not re.search("ssl_cert_reqs=(CERT_)?required", url, re.I):
            yield Warning(
                f"The TLS certificate of the server of {name} is not checked.",
                hint="Add ?ssl_cert_reqs=required, and ssl_ca_certs= for an authority of your own.",
                id="jobs.W001",
            )


@register(deploy=True)
def check_shared_database(app_configs, **kwargs):
    def place(url):
        parts = urlsplit(url)
        return parts.hostname, parts.port, parts.path.strip("/") or "0"

    for (name, url), (other, other_url) in combinations(urls().items(), 2):
        if "//" in url and place(url) == place(other_url):
            yield Warning(
                f"{name} and {other} are one database: to clear one of them empties both.",
                hint="Give each a database of its own, and the cache a server of its own.",
                id="jobs.W002",
            )


{% if broker.flower %}
@register(deploy=True)
def check_flower(app_configs, **kwargs):
    if not os.environ.get("FLOWER_BASIC_AUTH"):
        yield Warning(
            "Flower has no password: whoever reaches it sees arguments and can revoke tasks.",
            hint="Set FLOWER_BASIC_AUTH=user:password.",
            id="jobs.W003",
        )
{% endif %}
{% include "brokers/" ~ cookiecutter.broker ~ "/checks.py" %}
