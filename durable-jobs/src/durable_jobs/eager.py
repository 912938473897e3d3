"""Runs jobs in the process that enqueues them: with CELERY_TASK_ALWAYS_EAGER, and in tests."""

from collections.abc import Callable
from typing import Any

from celery import current_app
from celery.app.trace import build_tracer
from django.db import connection
from django.db.models import QuerySet

from durable_jobs import transitions
from durable_jobs.database import in_transaction
from durable_jobs.messages import arguments_of, find_task, message_of
from durable_jobs.models import Job
from durable_jobs.worker.execution import trace

__all__ = ["run_jobs"]


def run_jobs(
    jobs: QuerySet | None = None, *, before_each_round: Callable[[], Any] = lambda: None
) -> None:
    """Run all queued jobs, or those of these, and those that they enqueue. They wait for no countdown and no limit."""
    tried = set()
    before_each_round()
    while run_queued(Job.objects.all() if jobs is None else jobs, tried):
        before_each_round()


def run_queued(jobs, tried):
    """Run these jobs once, if they are queued. Returns whether any were.

    A job may stay queued, for example because it is paused: `tried` remembers it.
    """
    queued = jobs.filter(state="queued")
    transitions.admit_all(queued)
    untried = [job for job in queued.order_by("created_at") if (job.pk, job.retries) not in tried]
    for job in untried:
        tried.add((job.pk, job.retries))
        run(job)
    if untried and connection.vendor == "postgresql" and in_transaction():
        # IDLE_TIMEOUT is not for the test's own transaction, which a debugger may stop.
        connection.cursor().execute("SET LOCAL idle_in_transaction_session_timeout TO DEFAULT")
    return bool(untried)


def run(job):
    """Run a job as a worker does that gets its message."""
    task, headers = find_task(job.task), message_of(job).headers
    args, kwargs = arguments_of(job)
    # Celery's task.apply() would not call apply_async() for a retry.
    tracer = build_tracer(task.name, task, app=current_app, eager=True)
    # Eager: nobody closes the connection, on which a test's transaction may be open.
    return trace(
        task, tracer, str(job.pk), args, kwargs, {**headers, "hostname": "eager", "is_eager": True}
    )
