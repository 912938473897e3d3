"""What a worker prepares before it starts, and before each task."""

from celery import current_app
from django.db import close_old_connections, connection

from durable_jobs import versions
from durable_jobs.malformed import DropMalformed
from durable_jobs.messages import fields_in
from durable_jobs.worker import rabbitmq
from durable_jobs.worker.events import BatchedEvents
from durable_jobs.worker.remote_control import cancel_revoked_jobs


def start(**kwargs):
    """Prepare a worker that has not started yet."""
    versions.log_what_is_off()
    current_app.steps["consumer"].add(DropMalformed)
    if versions.fits("batched task events"):
        current_app.steps["consumer"].add(BatchedEvents)
    if versions.fits("repairs for RabbitMQ"):
        rabbitmq.prepare(current_app)
    cancel_revoked_jobs()


def prepare_connection(task, **kwargs):
    """Close a connection that is broken or too old, as Django does before a request.

    With CELERY_DB_REUSE_MAX, Celery itself does so only now and then.
    """
    if not connection.in_atomic_block:  # of a test
        close_old_connections()
    if fields_in(vars(task.request)):
        # Skip Django's health check, which is a query. On a dead connection, the claim is tried again.
        connection.health_check_done = True
