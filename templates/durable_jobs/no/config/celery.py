import os
import re

from celery import {{ "Celery, " if cookiecutter.broker != "rabbitmq" }}signals
from celery.app import utils
from celery_steady.django_structlog import LogStep
{% if cookiecutter.broker == "rabbitmq" %}
from celery_steady.rabbitmq import Celery
{% endif %}

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

app = Celery("config")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
app.steps["worker"].add(LogStep)  # django-structlog's step, and each log line names its task

# `celery report`, `celery inspect conf` and Flower print all settings. Mask these passwords, too.
hidden = utils.HIDDEN_SETTINGS.pattern + "|CELERY_BROKER_URL|LOCATION|BASIC_AUTH"
utils.HIDDEN_SETTINGS = re.compile(hidden, re.IGNORECASE)


@signals.setup_logging.connect
def keep_django_logging(**kwargs):
    """Keep settings.LOGGING: Celery configures no logging if this signal has a receiver."""
