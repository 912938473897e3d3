{% from "chosen.jinja" import has_flower, has_jobs with context %}
"""Logging: human-readable lines in development, JSON in production."""

import logging
import re

import structlog
from django.http import UnreadablePostError
from structlog import contextvars

FORMATTER = structlog.stdlib.ProcessorFormatter
PROCESSORS = [
    contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.stdlib.ExtraAdder(),  # logging's extra={…}
]
CONSOLE = [structlog.dev.ConsoleRenderer()]
JSON = [
    structlog.processors.TimeStamper(fmt="iso"),
    structlog.processors.format_exc_info,
    structlog.processors.JSONRenderer(),
]
LEVELS = {  # the lowest that is logged, unless LOG_LEVEL is higher
    "axes": logging.WARNING,  # only failed logins
    "django": logging.INFO,  # no queries, even if LOG_LEVEL is DEBUG
    "django.security.DisallowedHost": logging.CRITICAL,  # scanners: no errors, also not in Sentry
{% if has_flower %}
    "flower": logging.ERROR,
{% endif %}
    # django_structlog already logs each request and task, with the traceback of an error.
{% if has_jobs %}
    "celery.app.trace": logging.CRITICAL,
{% endif %}
    "celery.beat": logging.WARNING,
    "celery.worker.strategy": logging.WARNING,
    "django.request": logging.CRITICAL,
    "django.server": logging.CRITICAL,
    "gunicorn.access": logging.CRITICAL,
    "gunicorn.error": logging.INFO,
{% if has_jobs %}
    "django.tasks": logging.CRITICAL,
    "django_tasks": logging.CRITICAL,
{% endif %}
}


def configure(debug, level):
    """Configure structlog, and return the value of Django's setting LOGGING.

    `level` is the lowest level that is logged, such as logging.INFO.
    """
    structlog.configure(
        processors=[drop_repeated, show_exception, *PROCESSORS, FORMATTER.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    output = CONSOLE if debug else JSON
    logging.captureWarnings(not debug)  # those of Python, too
    formatter = {
        "()": FORMATTER,
        "foreign_pre_chain": PROCESSORS,
        "processors": [FORMATTER.remove_processors_meta, *output],
    }
    levels = {name: max(least, level) for name, least in LEVELS.items()}
    loggers = {name: {"level": lowest, "propagate": True} for name, lowest in levels.items()}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"structlog": formatter},
        "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "structlog"}},
        "root": {"handlers": ["console"], "level": level},
        "loggers": loggers,
    }


def drop_repeated(logger, method, event):
{% if has_jobs %}
    """Drop the log lines of successful requests that pages and Prometheus repeat.

    Also drop `task_enqueued`: 20,000 jobs that are enqueued together would log 20,000 lines. The worker's
    line `task_started` has the id of the request.
    """
{% else %}
    """Drop the log lines of successful requests that the page repeats every second."""
{% endif %}
    if logger.name.startswith("django_structlog."):
{% if has_jobs %}
        if event["event"] == "task_enqueued":
            raise structlog.DropEvent
{% endif %}
        if event["event"] == "request_finished" and event["code"] == 200:
            if re.match("GET /{{ "(api/jobs/|metrics$)" if has_jobs else "api/tasks/" }}", event["request"]):
                raise structlog.DropEvent
    return event


def show_exception(logger, method, event):
    """Log the exception of a task also outside `except`, as after a time limit."""
    if isinstance(event.get("exception"), BaseException):
        event["exc_info"] = event.pop("exception")
    return event


def before_send(event, hint):
    """Show the ids that log lines have in Sentry, too, but not the user's IP address."""
    ids = contextvars.get_contextvars()
    ids.pop("ip", None)
    return {**event, "tags": {**event.get("tags", {}), **ids}}


def send_errors(dsn, release):
    """Send errors to Sentry. It is imported only here, because it slows each start by a sixth."""
    import sentry_sdk
    from sentry_sdk.integrations.celery import CeleryIntegration
    from sentry_sdk.integrations.logging import ignore_logger

    beat = CeleryIntegration(monitor_beat_tasks=True)  # and how each scheduled task ends
    sentry_sdk.init(
        dsn,
        release=release,
        before_send=before_send,
        ignore_errors=[UnreadablePostError],  # a client hung up
        integrations=[beat],
    )
    ignore_logger("django_structlog.*")  # it logs the exceptions that Sentry catches itself
