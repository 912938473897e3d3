"""A task that workers know because faults.tasks imports this module."""

from django_tasks import task


@task
def imported():
    return 1
