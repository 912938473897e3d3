{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import broker, worker_pool with context %}
{% set lines %}
from celery import signals
from django.conf import settings
from django.dispatch import receiver
from django_structlog.celery.signals import bind_extra_task_metadata
from django_structlog.celery.steps import DjangoStructLogInitStep
from structlog.contextvars import bind_contextvars
{% print broker.celery_imports | default %}
{% endset %}
import os
{% if broker.flower %}
import sys
{% endif %}

{{ imports.sort(lines) }}
from jobs.celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
{% print worker_pool.celery | default %}

app = Celery("config")
app.autodiscover_tasks()
app.steps["worker"].add(DjangoStructLogInitStep)


def own_settings():
    """Return the CELERY_… settings of config/settings.py under Celery's own names, and no others.

    Flower and `celery inspect conf` show every setting that Celery gets. They hide passwords only in
    settings with Celery's own names.
    """
    names = [name for name in dir(settings) if name.startswith("CELERY_")]
    own = {name.removeprefix("CELERY_").lower(): getattr(settings, name) for name in names}
    own["CELERY_DB_REUSE_MAX"] = own.pop("db_reuse_max", None)  # Celery's name for it
    return own


app.add_defaults(own_settings)  # Celery calls it when it needs the settings


@signals.celeryd_init.connect
def take_from_every_queue(options, **kwargs):
    """Let a worker without --queues take tasks from all of WORKER_QUEUES."""
    if not options.get("queues"):
        app.amqp.queues.select(settings.WORKER_QUEUES)


@signals.setup_logging.connect
def keep_django_logging(**kwargs):
    """Keep settings.LOGGING: as this signal has a receiver, Celery does not configure logging."""


@receiver(bind_extra_task_metadata)
def name_task(task, **kwargs):
    """Add the task's name to each log line of a task."""
    bind_contextvars(task=task.name)
{% if broker.flower %}


# Flower shows all tasks and can start them, so it needs a password, however it is started.
if sys.argv[0].endswith(("celery", "__main__.py")) and "flower" in sys.argv:
    if not settings.FLOWER_BASIC_AUTH:
        sys.exit("Flower needs a password: set FLOWER_BASIC_AUTH=user:password (or in .env).")
    os.environ.setdefault("FLOWER_ADDRESS", "127.0.0.1")  # else it listens on all addresses
    os.environ.setdefault("FLOWER_MAX_TASKS", "10000")  # kept in memory
{% endif %}
{% print broker.celery | default %}
