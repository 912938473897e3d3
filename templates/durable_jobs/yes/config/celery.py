{% from "chosen.jinja" import worker_pool with context %}
import os

from celery import signals
from celery_steady.django_structlog import LogStep
from durable_jobs.celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
{% print worker_pool.default_pool | default %}

app = Celery("config")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
app.steps["worker"].add(LogStep)  # django-structlog's step, and each log line names its task
signals.setup_logging.connect(lambda **kwargs: None, weak=False)  # keep settings.LOGGING
