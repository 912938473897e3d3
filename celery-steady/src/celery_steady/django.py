"""What a worker of a Django project needs. This module is imported only in such a project."""

import os

from celery import signals


def is_used():
    return bool(os.environ.get("DJANGO_SETTINGS_MODULE"))


def prepare_worker():
    from django.db import connections

    for connection in connections.all():
        if "connect_timeout" in (options := connection.settings_dict["OPTIONS"]):
            options["connect_timeout"] = max(30, int(options["connect_timeout"]))  # seconds
    signals.task_prerun.connect(check_connections)
    # The main process has connections of its own: link_error and task_failure of a child that was lost.
    signals.heartbeat_sent.connect(check_connections)


def check_connections(task=None, **kwargs):
    """Give each task a working database connection, as Django does for each request.

    With CELERY_DB_REUSE_MAX, Celery itself looks at a connection only now and then.
    """
    from django.db import close_old_connections, connection

    # The caller of an eager task may be reading from the connection, or in a transaction.
    if not (connection.in_atomic_block or (task and task.request.is_eager)):
        close_old_connections()
