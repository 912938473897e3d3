{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import broker, result_backend, servers, worker_pool, periodic_tasks, has_kubernetes, has_flower, has_jobs, has_results with context %}
{% set in_environment = [broker.required, result_backend.required | default] %}
{% set used = ["CELERY_BROKER_URL"] + (["CELERY_RESULT_BACKEND"] if has_results else []) %}
{% set overridden = used | reject("in", in_environment) | list %}
{% set lines %}
{{ "import os" if overridden }}
import inspect
{{ "from pathlib import Path" if has_kubernetes }}
{% for server in servers %}
{% print server.check_imports | default %}
{% endfor %}
{% endset %}
"""Checks of the settings for `manage.py check`; those with deploy=True run with --deploy."""

{{ imports.sort(lines) }}
from celery import current_app
from celery.exceptions import QueueNotFound
{% print periodic_tasks.check_imports | default %}
{% if has_kubernetes %}
from django.apps import apps
{% endif %}
{% if has_kubernetes or has_flower %}
from django.conf import settings
{% endif %}
from django.core.checks import Error, Warning, register
{% if has_kubernetes %}
from django.db.models import FileField
{% endif %}
from django.utils.module_loading import autodiscover_modules
{% if has_kubernetes %}


@register(deploy=True)
def check_uploads(app_configs, **kwargs):
    """Find uploads that containers can't store, and that a deploy would lose."""
    fields = [field for model in apps.get_models() for field in model._meta.local_fields]
    for field in [field for field in fields if isinstance(field, FileField)]:
        folder = getattr(field.storage, "location", None)
        if folder and Path(folder).is_relative_to(settings.BASE_DIR):
            yield Warning(
                f"{field} stores files in {folder}, with the code.",
                hint="Use S3, or a folder that the web server and all workers share.",
                id="api.W007",
            )
{% endif %}


def all_tasks():
    autodiscover_modules("tasks")  # as a worker does
    return current_app.tasks.values()


def queue_of(task):
    """Return the name of the queue to which apply_async() sends the task, or None if there is none."""
    options = {"queue": getattr(task, "queue", None)}  # before CELERY_TASK_ROUTES
    try:
        return current_app.amqp.router.route(options, task.name)["queue"].name
    except QueueNotFound:
        return None
{% if not has_jobs %}


@register()
def check_queues(app_configs, **kwargs):
    """Find tasks without a queue: sending one is an error."""
    for task in all_tasks():
        if not queue_of(task):
            yield Error(
                f"The queue of {task.name} is not in CELERY_TASK_QUEUES.",
                hint="Add it there, or correct its name in the task or in CELERY_TASK_ROUTES.",
                id="api.E003",
            )
{% endif %}


@register()
def check_functions(app_configs, **kwargs):
    """Find tasks whose call only returns a coroutine or a generator, so that nothing runs."""
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    for task in all_tasks():
        run = inspect.unwrap(task.run)
{% if has_jobs %}
        if hasattr(task, "_is_job"):  # it may be async
            continue
{% endif %}
        if any(is_kind(run) for is_kind in kinds):
            yield Error(
                f"A worker would not run {task.name}: it is async, or contains yield.",
                hint="Call async code with asgiref.sync.async_to_sync(), in a plain function.",
                id="api.E004",
            )


@register()
def check_rate_limits(app_configs, **kwargs):
    """Find rate-limited tasks that share a queue: they delay the others in it."""
    queues = {task: queue_of(task) for task in all_tasks()}
    for task, queue in queues.items():
        if task.rate_limit and list(queues.values()).count(queue) > 1:
            yield Warning(
                f"The rate limit of {task.name} also delays the other tasks of the queue {queue}.",
                hint="Route it to a queue of its own, and start a worker for that queue.",
                id="api.W006",
            )
{% if has_flower %}


@register(deploy=True)
def check_flower(app_configs, **kwargs):
    users = settings.FLOWER_BASIC_AUTH.split(",")
    if any(user.partition(":")[2] in ("", "change-me") for user in users):
        yield Error(
            "FLOWER_BASIC_AUTH needs a password: anyone who reaches Flower can see and revoke tasks.",
            hint="Set it to user:password. If you don't run Flower, silence this check.",
            id="api.E002",
        )
{% endif %}
{% if overridden %}


@register(deploy=True)
def check_overridden(app_configs, **kwargs):
    """Find variables that Celery prefers to the settings."""
    for name in ["{{ overridden | join('", "') }}"]:
        if os.environ.get(name):
            yield Warning(
                f"The environment variable {name} overrides config/settings.py.",
                hint="Remove it from the environment and from .env.",
                id="api.W005",
            )
{% endif %}
{% print broker.checks | default %}
{% print worker_pool.checks | default %}
{% print periodic_tasks.checks | default %}
{% for server in servers %}
{% print server.checks | default %}
{% endfor %}
