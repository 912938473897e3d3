{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import broker, result_backend, servers, worker_pool with context %}
{% set lines %}
{{ "import os" if broker.flower }}
{% for server in servers %}
{% print server.checks_imports | default %}
{% endfor %}
{% endset %}
{% set sorted = imports.sort(lines) %}
{% set checks %}
{% if result_backend.server %}


@register(deploy=True)
def check_result_backend(app_configs, **kwargs):
    if settings.CELERY_RESULT_BACKEND.startswith("rpc"):
        yield Error(
            "rpc:// loses results: only the process that sent a task can read them.",
            hint="Point CELERY_RESULT_BACKEND to a server or a database.",
            id="jobs.E001",
        )
{% endif %}
{% for server in servers %}
{% print server.checks | default %}
{% endfor %}
{% if broker.flower %}


@register(deploy=True)
def check_flower(app_configs, **kwargs):
    users = os.environ.get("FLOWER_BASIC_AUTH", "").split(",")
    if any(user.partition(":")[2] in ("", "change-me") for user in users):
        yield Error(
            "FLOWER_BASIC_AUTH has no password: whoever reaches Flower sees and revokes tasks.",
            hint='Set it to user:password. Without Flower: SILENCED_SYSTEM_CHECKS = ["jobs.E002"]',
            id="jobs.E002",
        )
{% endif %}


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
{% print broker.checks %}
{% print worker_pool.checks | default %}
{% endset %}
{% set kinds = ["Error", "Info", "Warning"] %}
"""The app: its signals, and what `manage.py check --deploy` says of settings that would lose work."""

{{ sorted }}{% if sorted %}

{% endif %}
from celery import current_app, signals
from django.apps import AppConfig
from django.conf import settings
from django.core.checks import {% for kind in kinds if "yield " ~ kind in checks %}{{ kind }}, {% endfor %}register


class JobsConfig(AppConfig):
    name = "jobs"

    def ready(self):
        from jobs import celery, sweep

        signals.heartbeat_sent.connect(celery.show_life)
        for beat in signals.beat_init, signals.beat_embedded_init:  # that is celery worker --beat
            beat.connect(celery.name_ticks)
            beat.connect(sweep.start)
{{ checks }}