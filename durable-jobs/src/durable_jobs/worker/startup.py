"""What a worker prepares before it starts, and before each job."""

from celery import signals
from celery_steady import django

from durable_jobs import versions
from durable_jobs.messages import fields_in
from durable_jobs.pools import IS_GEVENT, pool_name
from durable_jobs.process import process
from durable_jobs.worker import children
from durable_jobs.worker.heartbeat import heartbeat
from durable_jobs.worker.remote_control import cancel_revoked_jobs


def start(sender, **kwargs):
    """Prepare the worker `sender`, which has not started yet.

    Raises SystemExit for gevent if Python is not patched, because each task would block all others.
    """
    name = pool_name(sender.pool_cls)
    if name == "gevent" and not IS_GEVENT:
        raise SystemExit("gevent has not patched Python. Type the option in full: --pool gevent")
    process.is_prefork = name == "prefork"
    versions.log_what_is_off()
    cancel_revoked_jobs()
    if versions.fits("fast recovery of child processes"):
        signals.worker_ready.connect(children.watch_children)
        signals.task_received.connect(children.assign_run_token)
    signals.worker_ready.connect(heartbeat.start)


def keep_connections(app):
    """When a job starts, close no connection: it was claimed on one. Celery and celery-steady would."""
    fixups = [fixup.worker_fixup.on_task_prerun for fixup in app._fixups if fixup]
    for receiver in [django.check_connections, *fixups]:
        signals.task_prerun.disconnect(receiver)
    signals.task_prerun.connect(check_connections)


def check_connections(task, **kwargs):
    """Give a plain task a working connection."""
    if not fields_in(vars(task.request)):
        django.check_connections(task)
