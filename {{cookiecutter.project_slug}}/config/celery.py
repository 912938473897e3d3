{% from "chosen.jinja" import broker, worker_pool with context %}
import os
{% if broker.flower %}
import sys
{% endif %}

from celery import signals
from django.conf import settings
from django.dispatch import receiver
from django_structlog.celery.signals import bind_extra_task_metadata
from django_structlog.celery.steps import DjangoStructLogInitStep
{% print broker.celery_imports | default %}
from structlog.contextvars import bind_contextvars

from jobs.celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
{% print worker_pool.celery | default %}

app = Celery("config")
app.autodiscover_tasks()
app.steps["worker"].add(DjangoStructLogInitStep)


def own_settings():
    """What config/settings.py names CELERY_…, under Celery's own names, and nothing else.

    Flower and `celery inspect conf` show all that Celery has, and hide passwords by these names.
    """
    names = [name for name in dir(settings) if name.startswith("CELERY_")]
    own = {name.removeprefix("CELERY_").lower(): getattr(settings, name) for name in names}
    own["CELERY_DB_REUSE_MAX"] = own.pop("db_reuse_max", None)  # Celery reads it by this name
    return own


app.add_defaults(own_settings)  # called when Celery needs them


@signals.celeryd_init.connect
def take_from_every_queue(options, **kwargs):
    """A worker without --queues, as one types it, serves all that the settings name."""
    if not options.get("queues"):
        app.amqp.queues.select(settings.WORKER_QUEUES)


@signals.setup_logging.connect
def keep_django_logging(**kwargs):
    """Leave logging to settings.LOGGING: with a receiver here Celery sets up none of its own."""


@receiver(bind_extra_task_metadata)
def name_task(task, **kwargs):
    """Say in each line of a task's log which task it is."""
    bind_contextvars(task=task.name)
{% if broker.flower %}


# Also where somebody types it: it shows all tasks, and starts them.
if sys.argv[0].endswith(("celery", "__main__.py")) and "flower" in sys.argv:
    if not settings.FLOWER_BASIC_AUTH:
        sys.exit("Flower wants a password: set FLOWER_BASIC_AUTH=user:password, here or in .env.")
    os.environ.setdefault("FLOWER_ADDRESS", "127.0.0.1")  # else it answers on all addresses
    os.environ.setdefault("FLOWER_MAX_TASKS", "10000")  # in memory
{% endif %}
{% print broker.celery | default %}
