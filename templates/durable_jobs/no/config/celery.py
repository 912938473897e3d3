import os

from celery import signals
from celery_steady import Celery  # Celery's own, with defaults that keep tasks
from celery_steady.django_structlog import LogStep

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

app = Celery("config")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
app.steps["worker"].add(LogStep)  # django-structlog's step, and each log line names its task
signals.setup_logging.connect(lambda **kwargs: None, weak=False)  # keep settings.LOGGING
