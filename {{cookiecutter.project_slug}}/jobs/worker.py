"""What a worker does around its tasks, most of it in its main process. apps.py connects it to signals."""

import logging
import os
import threading
import time
import uuid
from functools import partial
from multiprocessing.connection import wait

from celery import current_app, exceptions, platforms
from celery.bootsteps import RUN, StartStopStep
from celery.worker import state
from celery.worker.control import Panel
from django.conf import settings
from django.db import close_old_connections, connection, transaction
from django.db.models import F
from django.db.models.functions import Now

from . import conf, updates
from .celery import cancel
from .database import wait_for
from .events import BatchedEvents
from .expressions import QUEUED
from .lease import POLL_SECONDS, RECOVERY_DELAY, recover, renew_for_children
from .models import Job
from .pools import has_children, pool, remap_sigterm, shutting_down
from .runs import jobs_of, lock, runs

logger = logging.getLogger(__name__)

IDLE_SECONDS = 10  # seconds that a worker's shutdown waits for children without work
bodies_in_children = False  # whether this worker's bodies run in child processes


def start(sender, **kwargs):
    """Prepare the worker (`sender`), whose pool has not started yet."""
    global bodies_in_children
    bodies_in_children = has_children(sender)
    current_app.steps["consumer"].add(BatchedEvents)
    current_app.steps["worker"].add(LimitShutdown)
    cancel_revoked_jobs()


def assign_run_token(request, **kwargs):
    """Choose a run's token in the main process, so that this process knows the run of a dead child."""
    if "job" in request.request_dict:
        request.request_dict["run"] = uuid.uuid4()


def drop_dead_connections(task, **kwargs):
    """Close connections that are broken or too old, as Django does before a request."""
    if not task.request.is_eager:
        close_old_connections()
        if "job" in (task.request.headers or {}):
            # Skip Django's health check, which is a query. On a dead connection, the claim is tried again.
            connection.health_check_done = True


# Child processes


def watch_children(sender, **kwargs):
    """Watch the child processes, if any, once the worker is ready. `sender` is its consumer."""
    if not bodies_in_children:
        return
    remap_sigterm()
    # A C extension may block all threads of a child process, so renew its lease here as well.
    threading.Thread(target=renew_leases_of_children, daemon=True).start()
    threading.Thread(target=end_if_stuck, args=[sender.controller.blueprint], daemon=True).start()
    # Celery's own method always waits for the whole time, and children would not learn of the shutdown.
    sender.controller.wait_for_soft_shutdown = partial(wait_for_children, sender.pool)
    # Check for dead children every POLL_SECONDS. Celery does it every 5 s.
    if sender.hub:
        sender.hub.call_repeatedly(POLL_SECONDS, sender.pool.maintain_pool)


def wait_for_children(pool):
    """Wait until all tasks have ended, but no longer than SOFT_SHUTDOWN_SECONDS.

    Celery calls this in a signal handler, so nothing else reads the results of the children meanwhile:
    a child has ended its task when its result can be read.
    """
    shutting_down[0] = True
    until = time.monotonic() + settings.CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT
    pids = {request.worker_pid for request in tuple(state.active_requests)}
    results = [child.outqR_fd for child in pool._pool._pool if child.pid in pids]
    logger.warning("soft shutdown: %d children have a task", len(results))
    while len(wait(results, timeout=0)) < len(results) and time.monotonic() < until:
        time.sleep(0.1)


def end_if_stuck(blueprint):
    """End a worker whose shutdown waits for children that have no work or take too long.

    Celery would wait for ever if the main process had written only half of a task's message to a child
    when the shutdown began or the broker was lost. During the shutdown, Celery does not update
    `active_requests`: a child that is listed there may be idle. Therefore the total wait is also limited,
    to IDLE_SECONDS plus the longest time limit. A soft shutdown has its own timeout instead of that.
    """
    handler = platforms.signals["SIGQUIT"]  # a soft shutdown begins by replacing it
    longest = max(task.time_limit or 0 for task in current_app.tasks.values())
    idle = ending = 0
    while idle < IDLE_SECONDS and ending < IDLE_SECONDS + longest:
        time.sleep(1)
        if platforms.signals["SIGQUIT"] != handler:
            longest = settings.CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT
        elif blueprint.state <= RUN:
            continue
        ending += 1
        idle = 0 if state.active_requests else idle + 1
    # Log in a thread, because the stuck code may hold the lock of a log handler.
    error = "a child does not end: the worker ends without it"
    threading.Thread(target=logger.error, args=[error], daemon=True).start()
    time.sleep(1)
    os._exit(1)


def renew_leases_of_children():
    while True:
        time.sleep(conf.JOB_LEASE_SECONDS / 3)
        try:
            requests = [r for r in tuple(state.active_requests) if "run" in r.request_dict]
            active = {request.request_dict["run"]: request.id for request in requests}
            if active:
                renew_for_children(Job.objects.filter(pk__in=active.values(), run_token__in=active))
        except Exception as error:  # the next try may succeed
            logger.warning("cannot renew leases: %r", error)
        connection.close()  # a child must not inherit it


def recover_job_of_dead_child(sender, task_id, exception, **kwargs):
    """Recover the job of a killed child at once, without waiting for its lease to lapse."""
    run = (sender.request.headers or {}).get("run")
    if run and isinstance(exception, exceptions.WorkerLostError):
        # Wait until the database has rolled back the child's transaction.
        run_in_thread(
            partial(recover, Job.objects.filter(pk=task_id, run_token=run)), delay=POLL_SECONDS
        )


# Jobs that this worker does not run


def run_in_thread(*queries, delay=0):
    """Run these queries in a thread: the worker's loop must not wait for a lock or the database."""

    def run():
        for query in queries:
            try:
                wait_for(query)
            except Exception as error:  # nothing else would report it
                logger.warning("cannot change a job: %r", error)
        connection.close()  # a child must not inherit it

    timer = threading.Timer(delay, run)
    timer.daemon = True  # a worker that ends does not wait for the database
    timer.start()


def requeue_unknown(id, message, **kwargs):
    """If an unknown task is that of a job, requeue the job: another worker may know the task."""
    if "job" in (message.headers or {}):
        run_in_thread(partial(requeue_later, Job.objects.filter(QUEUED, pk=id)))


def requeue_later(row):
    """Requeue a job whose task is unknown, after a pause that grows with the time it has waited.

    With a short pause, jobs whose task was removed from the code would keep Beat and the broker busy.
    """
    for waited in row.values_list(Now() - F("due_at"), flat=True):
        updates.requeue(row, max(RECOVERY_DELAY, waited.total_seconds() / 10 if waited else 0))


# Bodies in this process


class LimitShutdown(StartStopStep):
    """Limits a shutdown without a signal too: Celery ends a worker after an error in its main loop."""

    def close(self, worker):
        limit_shutdown(worker.exitcode or 0)


def limit_shutdown(exitcode=0, sig=None, **kwargs):
    """Requeue the jobs and end the process in time. Without this, Celery waits for the last body."""
    has_begun, shutting_down[0] = shutting_down[0], True
    if has_begun or bodies_in_children:  # prefork has Celery's soft shutdown
        return
    pool.start_thread(partial(requeue_and_exit, exitcode))
    if sig and not state.reserved_requests:
        pool.end_idle_worker()


def requeue_and_exit(exitcode=0):
    time.sleep(settings.CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT)
    try:
        with lock:
            for run in runs.values():
                run.in_body = False  # write_and_renew() must not claim the job again
            for pause in POLL_SECONDS, 0:  # twice: a renewal may lock a row for a moment
                with transaction.atomic():
                    # The leases of locked rows will lapse.
                    updates.requeue(updates.skip_locked(jobs_of(runs.values())))
                time.sleep(pause)
    finally:
        os._exit(exitcode)


# Remote control, from Flower or `celery control`


def cancel_revoked_jobs():
    """Cancel a job when this worker is told to revoke or to terminate its task.

    The signal task_revoked is too late for a job that does not run yet: Celery sends it when a slot
    takes the message, or never.
    """
    revoke = Panel.data["revoke"]

    def cancel_and_revoke(worker, task_id, terminate=False, signal=None, **kwargs):
        run_in_thread(partial(cancel, task_id))
        # Always SIGKILL: a signal that children ignore would not end the body.
        return revoke(worker, task_id, terminate=terminate, signal="SIGKILL", **kwargs)

    def cancel_and_terminate(worker, signal, task_id, **kwargs):
        return cancel_and_revoke(worker, task_id, terminate=True, **kwargs)

    Panel.data |= {"revoke": cancel_and_revoke, "terminate": cancel_and_terminate}
