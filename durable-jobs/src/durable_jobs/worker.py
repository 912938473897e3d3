"""What a worker does besides its tasks, most of it in its main process. shutdown.py says how it ends."""

import logging
import signal as signals
import threading
import time
import uuid
from datetime import timedelta

from celery import current_app, exceptions
from celery.worker import state
from celery.worker.control import Panel
from django.db import close_old_connections, connection
from django.db.models import F, Q
from django.db.models.functions import Now

from . import conf, shutdown, updates
from .celery import cancel
from .database import wait_for
from .events import BatchedEvents
from .expressions import IN_CANCELLED_BODY, QUEUED
from .lease import POLL_SECONDS, RECOVERY_DELAY, recover, renew_for_children
from .models import Job
from .pools import has_children
from .turns import free_cancelled, grant, put_off

logger = logging.getLogger(__name__)


def start(**kwargs):
    """Prepare a worker that has not started yet."""
    current_app.steps["consumer"].add(BatchedEvents)
    cancel_revoked_jobs()


def assign_run_token(request, **kwargs):
    """Choose a run's token in the main process, so that this process knows the run of a dead child."""
    if "job" in request.request_dict:
        request.request_dict["run_token"] = uuid.uuid4()


def prepare_connection(task, **kwargs):
    """Close a connection that is broken or too old, as Django does before a request."""
    if not task.request.is_eager:
        close_old_connections()
        if "job" in (task.request.headers or {}):
            # Skip Django's health check, which is a query. On a dead connection, the claim is tried again.
            connection.health_check_done = True


# Child processes


def watch_children(sender, **kwargs):
    """Watch the child processes, if any, of a worker that is ready. `sender` is its consumer."""
    if has_children(sender.controller):
        # A C extension may block all threads of a child process, so renew its lease here as well.
        threading.Thread(target=renew_leases_of_children, daemon=True).start()
        # Check for dead children every POLL_SECONDS. Celery does it every 5 s.
        if sender.hub:
            sender.hub.call_repeatedly(POLL_SECONDS, sender.pool.maintain_pool)


def renew_leases_of_children():
    while True:
        time.sleep(conf.LEASE_SECONDS / 3)
        try:
            requests = [r for r in tuple(state.active_requests) if "run_token" in r.request_dict]
            if requests:
                ids = [request.id for request in requests]
                tokens = [request.request_dict["run_token"] for request in requests]
                in_body = Q(run_token__in=tokens) | IN_CANCELLED_BODY
                renew_for_children(Job.objects.filter(in_body, pk__in=ids))
        except Exception as error:  # the next try may succeed
            logger.warning("cannot renew leases: %r", error)
        connection.close()  # a child must not inherit it


def recover_job_of_dead_child(sender, task_id, exception, **kwargs):
    """Recover the job of a killed child at once, without waiting for its lease to lapse."""
    token = (sender.request.headers or {}).get("run_token")
    if token and isinstance(exception, exceptions.WorkerLostError):
        # Wait until the database has rolled back the child's transaction.
        in_thread(recover, Job.objects.filter(pk=task_id, run_token=token), delay=POLL_SECONDS)
        free_place(task_id, sender.request.headers)


def free_place_of_dead_child(request, terminated, signum, **kwargs):
    """Free the place of a cancelled job whose child was killed by a revoke, without waiting for its lease."""
    if terminated and signum == signals.SIGKILL and shutdown.is_prefork:
        free_place(request.id, request.headers or {})


def free_place(id, headers):
    if "limit" in headers:
        in_thread(free_cancelled, id, headers["crashes"], delay=POLL_SECONDS)


# Jobs that this worker does not run


def in_thread(update, *args, delay=0):
    """Call update(*args) in a thread: the worker's loop must not wait for a lock or the database."""

    def wait_for_update():
        try:
            wait_for(update, *args)
        except Exception as error:  # nothing else would report it
            logger.warning("cannot change a job: %r", error)
        connection.close()  # a child must not inherit it

    timer = threading.Timer(delay, wait_for_update)
    timer.daemon = True  # a worker that ends does not wait for the database
    timer.start()


def requeue_unknown(id, message, **kwargs):
    """If an unknown task is that of a job, requeue the job: another worker may know the task."""
    if "job" in (message.headers or {}):
        in_thread(requeue_later, Job.objects.filter(QUEUED, pk=id))


def requeue_later(row):
    """Requeue a job whose task is unknown, after a pause that grows with the time it has waited.

    With a short pause, jobs whose task was removed from the code would keep Beat and the broker busy. A job
    with a limit is held again: it must not keep its place meanwhile.
    """
    if keys := list(row.filter(limit_key__isnull=False).values_list("limit_key", flat=True)):
        put_off(row)
        grant(keys)
        return
    waited = row.values_list(Now() - F("due_at"), flat=True).first() or timedelta()
    updates.requeue(row, max(RECOVERY_DELAY, waited.total_seconds() / 10))


# Remote control, from Flower or `celery control`


def cancel_revoked_jobs():
    """Cancel a job when this worker is told to revoke or to terminate its task.

    The signal task_revoked is too late for a job that does not run yet: Celery sends it when a slot
    takes the message, or never.
    """
    revoke = Panel.data["revoke"]

    def cancel_and_forget(task_id):
        # Celery ignores the messages of a revoked id for three hours. A job may be run again.
        for pk in cancel(task_id):
            state.revoked.discard(pk)

    def cancel_and_revoke(worker, task_id, terminate=False, signal=None, **kwargs):
        if signal in (None, "SIGTERM", "TERM"):  # which a child takes for a shutdown
            signal = "SIGKILL"
        try:
            return revoke(worker, task_id, terminate=terminate, signal=signal, **kwargs)
        finally:
            in_thread(cancel_and_forget, task_id)

    def cancel_and_terminate(worker, signal, task_id, **kwargs):
        return cancel_and_revoke(worker, task_id, terminate=True, **kwargs)

    Panel.data |= {"revoke": cancel_and_revoke, "terminate": cancel_and_terminate}
