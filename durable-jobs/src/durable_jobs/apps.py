"""Connects the app to Celery: which function each signal calls."""

from celery import current_app, signals
from django.apps import AppConfig
from django.core.exceptions import ImproperlyConfigured

from durable_jobs import conf, limits
from durable_jobs.celery import Celery


class DurableJobsConfig(AppConfig):
    name = "durable_jobs"
    verbose_name = "Jobs"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self):
        from durable_jobs import checks, enqueue

        if not isinstance(current_app, Celery):
            text = f"The Celery app {current_app.main!r} must be a durable_jobs.celery.Celery."
            if current_app.main == "default":  # Celery's own, which stands in for the project's
                text = (
                    "No Celery app is loaded: import it in the __init__.py next to your settings."
                )
            raise ImproperlyConfigured(text)
        if current_app.send_task.__func__ is not Celery.send_task:
            hint = "add headers in a receiver of before_task_publish"
            raise ImproperlyConfigured(f"Jobs would not call your app's own send_task(): {hint}.")
        # With 0 or less, jobs would not be sent or recovered, would run twice, or would be deleted immediately.
        numbers = [name for name, default in conf.DEFAULTS.items() if type(default) is int]
        values = {f"DURABLE_JOBS['{name}']": getattr(conf, name) for name in numbers}
        values["CELERY_TASK_TIME_LIMIT"] = current_app.conf.task_time_limit or 0
        for name, value in values.items():
            if not value > 0:  # also true for NaN
                raise ImproperlyConfigured(f"{name} must be a number greater than 0, not {value}.")
        for name, text in conf.LIMITS.items():
            try:
                limits.parse(str(text))
            except ValueError as error:
                raise ImproperlyConfigured(f"DURABLE_JOBS['LIMITS'][{name!r}]: {error}.") from error
        signals.worker_init.connect(checks.refuse_to_start)
        signals.worker_init.connect(start_worker)
        signals.worker_process_init.connect(start_child)
        signals.beat_init.connect(checks.refuse_to_start)
        signals.beat_init.connect(start_beat)
        enqueue.runs_here.connect(run_jobs)


# What only some processes import


def start_worker(**kwargs):
    from durable_jobs.worker import startup

    startup.start(**kwargs)


def start_child(**kwargs):
    """Prepare a child process, for which Celery has just made its tracers. It may be a new interpreter."""
    from durable_jobs.worker.execution import trace_jobs

    trace_jobs(current_app)


def start_beat(**kwargs):
    from durable_jobs.beat import schedule

    schedule.start(**kwargs)


def run_jobs(jobs, **kwargs):
    from durable_jobs.eager import run_jobs

    run_jobs(jobs)
