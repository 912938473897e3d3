{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import broker, worker_pool with context %}
{% set lines %}
from celery import Celery, signals
from celery.app import utils
{% print broker.celery_imports | default %}
{% print worker_pool.celery_imports | default %}
{% endset %}
import os
import re
{{ "import signal\n" if worker_pool.has_soft_shutdown }}from pathlib import Path

{{ imports.sort(lines) }}
from config.logs import LogStep

# Set the default Django settings module for the 'celery' program.
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
{% print worker_pool.celery_environment | default %}

app = Celery("config")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
app.steps["worker"].add(LogStep)  # a task's log lines name it and its request

# `celery report`, `celery inspect conf` and Flower print all Django settings, and mask most
# passwords. They don't know these settings.
utils.HIDDEN_SETTINGS = re.compile(
    utils.HIDDEN_SETTINGS.pattern + "|CELERY_BROKER_URL|LOCATION|BASIC_AUTH", re.IGNORECASE
)


@signals.setup_logging.connect
def keep_django_logging(**kwargs):
    """Keep settings.LOGGING: Celery configures no logging if this signal has a receiver."""
{% print worker_pool.celery | default %}


@signals.heartbeat_sent.connect
def touch_liveness_file(**kwargs):
    """Tell health checks that this worker is alive: it sends a heartbeat every two seconds."""
    if file := os.environ.get("LIVENESS_FILE"):
        Path(file).touch()
{% print broker.celery | default %}
