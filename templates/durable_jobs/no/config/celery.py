{% from "chosen.jinja" import broker, worker_pool with context %}
import os
import re

from celery import Celery, signals
from celery.app import {{ "base, " if broker.celery is defined }}utils

from config.logs import LogStep

# Set the default Django settings module for the 'celery' program.
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
{% print worker_pool.celery_environment | default %}

app = Celery("config", include=["config.worker"])
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
app.steps["worker"].add(LogStep)  # a task's log lines name it and its request

# `celery report`, `celery inspect conf` and Flower print all Django settings, and mask most
# passwords. They don't know these settings.
utils.HIDDEN_SETTINGS = re.compile(
    utils.HIDDEN_SETTINGS.pattern + "|CELERY_BROKER_URL|LOCATION|BASIC_AUTH", re.IGNORECASE
)
{% print broker.celery | default %}


@signals.setup_logging.connect
def keep_django_logging(**kwargs):
    """Keep settings.LOGGING: Celery configures no logging if this signal has a receiver."""
