{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import broker, worker_pool with context %}
import os

{{ imports.sort("from celery import signals\nfrom durable_jobs.celery import Celery\n" ~ broker.celery_imports) }}
# Set the default Django settings module for the 'celery' program.
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
{% print worker_pool.celery_environment | default %}

app = Celery("config", include=["config.worker"])
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
{% print broker.celery %}


@signals.setup_logging.connect
def keep_django_logging(**kwargs):
    """Keep settings.LOGGING: Celery configures no logging if this signal has a receiver."""
