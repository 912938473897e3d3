{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import broker, worker_pool with context %}
{% set lines %}
from celery import signals
from django.conf import settings
from django.dispatch import receiver
from django_structlog.celery.receivers import CeleryReceiver
from django_structlog.celery.signals import bind_extra_task_metadata
from django_structlog.celery.steps import DjangoStructLogInitStep
from structlog.contextvars import bind_contextvars, bound_contextvars
{% print broker.celery_imports_with_jobs | default %}
{% endset %}
import os
import sys

{{ imports.sort(lines) }}
from durable_jobs.celery import Celery
from durable_jobs.pools import pool_name

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
os.environ.setdefault("CELERY_WORKER_POOL", "{{ worker_pool.name }}")  # of a worker without --pool
{% print worker_pool.celery_with_jobs | default %}


class LogReceiver(CeleryReceiver):
    def receiver_task_failure(self, task_id, sender, **kwargs):
        # The main process logs that a child was killed. It knows the request only from the message.
        with bound_contextvars(**getattr(sender.request, "__django_structlog__", {})):
            super().receiver_task_failure(task_id=task_id, sender=sender, **kwargs)


class LogTasks(DjangoStructLogInitStep):
    def __init__(self, parent, **kwargs):
        # Skip the one of DjangoStructLogInitStep, which connects its own receiver.
        super(DjangoStructLogInitStep, self).__init__(parent, **kwargs)
        self.receiver = LogReceiver()
        self.receiver.connect_worker_signals()


app = Celery("config")
app.autodiscover_tasks()
app.steps["worker"].add(LogTasks)


def own_settings():
    """Return the CELERY_… settings of config/settings.py under Celery's own names, and no others.

    Flower and `celery inspect conf` show every setting that Celery gets. They hide passwords only in
    settings with Celery's own names.
    """
    names = [name for name in dir(settings) if name.startswith("CELERY_")]
    return {name.removeprefix("CELERY_").lower(): getattr(settings, name) for name in names}


app.add_defaults(own_settings)  # Celery calls it when it needs the settings


@signals.celeryd_init.connect
def use_settings_of_pool(conf, options, **kwargs):
    """Give a worker the settings of its pool."""
    pool = pool_name(options.get("pool") or conf.worker_pool)
    if pool not in settings.WORKER_POOLS:
        pools = ", ".join(settings.WORKER_POOLS)
        sys.exit(f"This project was not made for {pool}. Its pools are {pools}.")
    for name, value in settings.WORKER_POOLS[pool].items():
        # Options of the broker are added to those of the settings.
        conf[name] = (conf[name] | value) if isinstance(value, dict) else value
    for fixup in app._fixups:  # Django's has read CELERY_DB_REUSE_MAX before: let it read it again
        fixup.worker_fixup = None


@signals.setup_logging.connect
def keep_django_logging(**kwargs):
    """Keep settings.LOGGING: as this signal has a receiver, Celery does not configure logging."""


@receiver(bind_extra_task_metadata)
def name_task(task, **kwargs):
    """Add the task's name to each log line of a task."""
    bind_contextvars(task=task.name)
{% print broker.celery_with_jobs | default %}
