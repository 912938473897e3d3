"""What a worker prepares before it starts, and before each job."""

from django.db import connection

from durable_jobs import versions
from durable_jobs.messages import fields_in
from durable_jobs.worker.remote_control import cancel_revoked_jobs


def start(**kwargs):
    """Prepare a worker that has not started yet."""
    versions.log_what_is_off()
    cancel_revoked_jobs()


def skip_health_check(task, **kwargs):
    """Skip Django's health check, which is a query. On a dead connection, the claim is tried again."""
    if fields_in(vars(task.request)):
        connection.health_check_done = True
