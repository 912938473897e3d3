"""What a worker's main process does beside its tasks. Celery's signals call it: see apps.py."""

import logging
import os
import threading
import time
import uuid
from contextlib import suppress

from celery import exceptions, signals
from celery.utils.functional import maybe_list
from celery.worker import state
from celery.worker.control import Panel
from django.conf import settings
from django.db import close_old_connections, connection

from .lease import TICK, judge, lock, renew, rows, runs
from .models import Job
from .pools import has_children, pool

logger = logging.getLogger(__name__)


def start(sender, **kwargs):
    """Prepare for the worker's pool: `sender` is the worker, which has not started it yet."""
    if has_children(sender):
        signals.worker_ready.connect(keep_children)
    else:
        signals.worker_shutting_down.connect(end_in_time)
    follow_revokes()


def name_run(request, **kwargs):
    """Choose the token of a job's run, so that it is known here which run a dead child had."""
    if "job" in request.request_dict:
        request.request_dict["run"] = uuid.uuid4()


def drop_dead_connections(task, **kwargs):
    """Like a request, a task starts with database connections that work."""
    if not task.request.is_eager:
        close_old_connections()
        if "job" in (task.request.headers or {}):
            connection.health_check_done = True  # spares a question: a job's claim is tried again


# Child processes


def keep_children(sender, **kwargs):
    """Renew leases here as well: a body in C may hold up all threads of its child."""
    threading.Thread(target=renew_leases_of_children, daemon=True).start()
    if sender.hub:  # Celery looks for dead children when it hears of one, too early, and every 5 s
        sender.hub.call_repeatedly(TICK, sender.pool.maintain_pool)


def renew_leases_of_children():
    while True:
        time.sleep(settings.JOB_LEASE_SECONDS / 3)
        try:
            requests = [r for r in tuple(state.active_requests) if "run" in r.request_dict]
            active = {request.request_dict["run"]: request.id for request in requests}
            renew(Job.objects.filter(pk__in=active.values(), run__in=active))
        except Exception as error:  # whatever it is: the next time it may be possible
            logger.warning("cannot renew leases: %r", error)
        connection.close()  # a child must not inherit it


def notice_death(sender, task_id, exception, **kwargs):
    """Have the job of a killed child judged at once, not when its lease has lapsed."""
    run = (sender.request.headers or {}).get("run")
    if run and isinstance(exception, exceptions.WorkerLostError):
        # Not in the loop of the worker. By then the child's transaction has been rolled back.
        threading.Timer(TICK, judge_run, [task_id, run]).start()


def judge_run(pk, run):
    try:
        judge(Job.objects.filter(pk=pk, run=run))
    except Exception as error:  # whatever it is: then the lease lapses
        logger.warning("cannot judge the job %s of a dead child: %r", pk, error)
    connection.close()


# Bodies in this process


def end_in_time(**kwargs):
    """Have the process end and its jobs go on elsewhere: Celery waits for the last body."""
    pool.start_thread(end)
    if not state.reserved_requests:
        pool.end_idle_worker()


def end():
    time.sleep(settings.CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT)
    try:
        with lock:
            rows(runs.values()).requeue()
    finally:
        os._exit(0)


# Flower's and `celery inspect`'s remote control


def follow_revokes():
    """Cancel the job of every task that this worker is told to revoke or to terminate.

    Celery's signal task_revoked comes when the message reaches a free slot, on some pools never.
    """
    revoke = Panel.data["revoke"]

    def cancel(ids):
        for pk in ids:
            with suppress(Exception):  # some task's own kind of id, or the database is away
                Job.objects.filter(pk=pk).cancel()
        connection.close()  # a child must not inherit it

    def cancel_and_revoke(state, task_id, terminate=False, signal=None, **kwargs):
        # Not in the worker's loop, which ends bodies in time: one of them may hold the job's row.
        threading.Thread(target=cancel, args=[maybe_list(task_id) or []]).start()
        # Whatever signal Flower asks for: one that children ignore would leave the task running.
        return revoke(state, task_id, terminate=terminate, signal="SIGKILL", **kwargs)

    def cancel_and_terminate(state, signal, task_id, **kwargs):
        return cancel_and_revoke(state, task_id, terminate=True, **kwargs)

    Panel.data |= {"revoke": cancel_and_revoke, "terminate": cancel_and_terminate}
