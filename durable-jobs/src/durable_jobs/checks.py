"""Checks for `manage.py check`: jobs that would be lost, would never run or, with --deploy, never end."""

import os
from collections import Counter
from inspect import unwrap

from celery import current_app
from celery.beat import ScheduleEntry
from celery.contrib.django.task import DjangoTask
from celery.utils.imports import symbol_by_name
from django.apps import apps
from django.conf import settings
from django.core.checks import Error, Info, Tags, Warning, register
from django.db import connection, router
from django.db.models import CASCADE, Count

from durable_jobs import conf, limits
from durable_jobs.beat.entries import check_entry, check_row
from durable_jobs.messages import import_tasks, job_names, known_queues, queue_of
from durable_jobs.models import Batch, Job
from durable_jobs.pools import TIME_LIMITED, pool_name

READ_COMMITTED = 2  # psycopg's IsolationLevel, and the default of PostgreSQL


@register()
def check_database(app_configs, pool=None, **kwargs):
    """Refuse databases in which jobs would be lost or never start. This opens no connection."""
    alias, vendor, use_tz = router.db_for_write(Job), connection.vendor, settings.USE_TZ
    options = connection.settings_dict["OPTIONS"]
    # With a stricter level, whoever waits for a lock then reads what was true before.
    isolation = options.get("isolation_level")
    # psycopg2 prepares no statements. Django's dummy backend has no driver.
    driver = getattr(getattr(connection, "Database", None), "__name__", None)
    is_known = vendor in ("postgresql", "sqlite") and driver != "psycopg2"
    is_right = is_known and isolation in (None, READ_COMMITTED) and use_tz
    if alias != "default" or not is_right:
        error = "Jobs require PostgreSQL (psycopg 3) or SQLite as the database 'default', and USE_TZ = True."
        hint = f"Currently {alias=}, {vendor=}, {driver=}, {use_tz=}, {isolation=}: correct your database router or settings."
        yield Error(error, hint=hint, id="durable_jobs.E005")
    if vendor == "postgresql" and options.get("pool") and (pool or worker_pool()) == "prefork":
        yield Error(
            "Prefork workers can't use psycopg's connection pool: a child process inherits it without its threads.",
            hint='Remove "pool" from the OPTIONS of the database, or run workers with --pool threads.',
            id="durable_jobs.E007",
        )


@register()
def check_consumer(app_configs, consumer=None, **kwargs):
    """Refuse a consumer of workers that would not release their jobs when they stop."""
    consumer = consumer or current_app.conf.worker_consumer
    if consumer == conf.CONSUMER:
        return  # Windows has not all that it imports
    consumer = symbol_by_name(consumer)
    if conf.CONSUMER not in [f"{base.__module__}:{base.__name__}" for base in consumer.__mro__]:
        yield Error(
            f"Jobs require a worker_consumer that extends durable_jobs.worker.consumer.Consumer, not {consumer.__module__}.{consumer.__qualname__}.",
            hint="Derive your class from it, or remove CELERY_WORKER_CONSUMER.",
            id="durable_jobs.E008",
        )


def refuse_to_start(sender, **kwargs):
    """End a worker or Beat (`sender`) with such settings: Celery ignores what Django's checks find."""
    pool = pool_name(getattr(sender, "pool_cls", "threads"))  # Beat has none, and forks nothing
    errors = [*check_database(None, pool)]
    if consumer := getattr(sender, "consumer_cls", None):
        errors += check_consumer(None, consumer)
    errors = [error for error in errors if not error.is_silenced()]
    if errors:
        raise SystemExit("\n".join(map(str, errors)))


@register()
def check_foreign_keys(app_configs, **kwargs):
    """Find rows that would be deleted together with an old job."""
    for relation in [*Job._meta.related_objects, *Batch._meta.related_objects]:
        is_own = relation.related_model._meta.app_label == "durable_jobs"
        if relation.on_delete is CASCADE and not is_own:
            yield Warning(
                f"{relation.field} has on_delete=CASCADE: its rows are deleted {conf.RETENTION_DAYS} days after their job has ended.",
                hint="Write on_delete=models.SET_NULL, null=True.",
                id="durable_jobs.W013",
            )


@register()
def check_queues(app_configs, **kwargs):
    """Check the queues that tasks are routed to."""
    import_tasks()
    known = known_queues()
    for name, task in sorted(current_app.tasks.items()):
        queue = queue_of(task, [], {})
        if queue not in known and not name.startswith("celery."):
            yield Warning(
                f"{name} goes to the queue {queue}, which is not in CELERY_TASK_QUEUES: a worker without --queues does not run it.",
                hint="Add the queue to CELERY_TASK_QUEUES, or fix CELERY_TASK_ROUTES.",
                id="durable_jobs.W005",
            )


@register()
def check_options(app_configs, **kwargs):
    """Check the serializer and the rate limit of each job, and each limit that is a text."""
    tasks = [current_app.tasks[name] for name in job_names()]
    if names := [task.name for task in tasks if task.serializer != "json"]:
        yield Warning(
            f"The arguments of jobs are JSON, a call with others raises TypeError, and the serializer is another one for {', '.join(names)}.",
            hint='Pass primary keys, or types that you register with kombu.utils.json.register_type(), and write @job(serializer="json").',
            id="durable_jobs.W012",
        )
    for task in tasks:
        if task.rate_limit:
            yield Warning(
                f"{task.name} has rate_limit={task.rate_limit!r}: each worker applies it separately, and takes no other jobs while it holds delayed ones.",
                hint='Use limit="name" instead, and put the rate into DURABLE_JOBS["LIMITS"].',
                id="durable_jobs.W008",
            )
        try:
            if task.limit is not None and not callable(task.limit):
                limits.check_key(task.limit)
        except ValueError as error:
            yield Error(
                f"{task.name}: {error}.",
                hint='Write DURABLE_JOBS = {"LIMITS": {"openai": "5, 60/min"}} and limit="openai".',
                id="durable_jobs.E006",
            )


@register(Tags.database)
def check_blocked_jobs(app_configs, databases=None, **kwargs):
    """Find jobs that wait for a limit that is gone. Before the first migration, there is no table."""
    tables = connection.introspection.table_names() if "default" in (databases or []) else []
    if Job._meta.db_table in tables:
        counts = Counter()
        blocked = Job.objects.filter(blocked_by__isnull=False).values_list("blocked_by")
        for key, count in blocked.annotate(Count("pk")):
            counts[limits.name_of(key)] += count
        for name in sorted(counts.keys() - conf.LIMITS.keys()):
            yield Warning(
                f"{counts[name]} jobs wait for the limit {name!r}, which is no longer in DURABLE_JOBS['LIMITS'].",
                hint="They will never start: keep the limit until they have run, or cancel them.",
                id="durable_jobs.W009",
            )


@register(Tags.database)
def check_periodic_tasks(app_configs, databases=None, **kwargs):
    """Check that Beat can start the job of each row of django-celery-beat."""
    if not apps.is_installed("django_celery_beat") or "default" not in (databases or []):
        return
    from django_celery_beat.models import PeriodicTask

    if PeriodicTask._meta.db_table not in connection.introspection.table_names():
        return
    for row in PeriodicTask.objects.filter(enabled=True):
        try:
            check_row(row)
        except (TypeError, ValueError) as error:
            yield Warning(
                f"Beat cannot start the periodic task {row.name}: {error}",
                hint="Correct it in the admin.",
                id="durable_jobs.W010",
            )


@register()
def check_task_class(app_configs, **kwargs):
    """Check that the app has no class of tasks whose methods jobs would not call."""
    jobs = [current_app.tasks[name] for name in job_names()]
    for method in "__call__", "apply_async":
        missed = getattr(current_app.Task, method)
        names = [
            job.name for job in jobs if unwrap(getattr(type(job), method)) is not unwrap(missed)
        ]
        if names and missed is not getattr(DjangoTask, method):
            yield Warning(
                f"{method}() of your app's task class is not called for {', '.join(names)}.",
                hint="Name the class in @job(base=…), or add headers in a receiver of before_task_publish.",
                id="durable_jobs.W011",
            )


@register()
def check_schedule(app_configs, **kwargs):
    """Check that Beat can start each entry of CELERY_BEAT_SCHEDULE."""
    for name, fields in current_app.conf.beat_schedule.items():
        try:
            entry = ScheduleEntry(**{**fields, "name": name, "app": current_app})
            if entry.schedule is None:
                raise ValueError("it has no schedule")
            check_entry(entry.task, entry.args, entry.kwargs, entry.options)
        except Exception as error:  # a class of your own may raise any
            yield Error(
                f"Beat cannot start {name} of CELERY_BEAT_SCHEDULE: {error}",
                hint="Correct the entry. If its task belongs to another project, silence this check.",
                id="durable_jobs.E003",
            )


def worker_pool():
    # A worker without --pool has the pool of this variable, or else that of the setting.
    return os.environ.get("CELERY_WORKER_POOL") or current_app.conf.worker_pool


@register(deploy=True)
def check_pool(app_configs, **kwargs):
    if (pool := worker_pool()) not in TIME_LIMITED:
        yield Info(
            f"The pool {pool} has no time limits: a task that waits forever keeps its slot.",
            hint='Give each wait a timeout. Then add "durable_jobs.I001" to SILENCED_SYSTEM_CHECKS.',
            id="durable_jobs.I001",
        )
