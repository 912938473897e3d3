"""How a worker ends: what SIGTERM does to its jobs and its plain tasks.

With each pool, the worker takes no more messages and sets `shutting_down`. From then on it starts no job, and
a function ends when it has stored a cursor with report(). Its job is *released*: queued, without a crash.

Prefork:

1. The main process gets SIGTERM. It waits until all children have ended their tasks, but at most
   worker_soft_shutdown_timeout: see celery_steady/shutdown.py.
2. Celery sends SIGTERM to the children that still have a task. SystemExit ends the function, and the child
   releases its job: worker/runs.py. A child that gets SIGTERM alone has crashed: process.child_has_crashed().
3. The main process ends with its children. If one never ends, its supervisor must kill them.

Threads and gevent:

1. The process gets SIGTERM. It ends with its last task. With gevent, this may take five seconds more.
2. After worker_soft_shutdown_timeout, a thread releases the jobs that are left, and ends the process:
   requeue_and_exit().

The broker delivers plain tasks again that have not ended. Ctrl-C, `celery control shutdown` and an error of
Celery end a worker too. Then threads and gevent do the same, and prefork waits for all functions.
"""

import os
from functools import partial

from celery import current_app, signals
from celery_steady.shutdown import close
from django.db import transaction

from durable_jobs import transitions
from durable_jobs.database import limit_locks, skip_locked
from durable_jobs.limits import limit_of
from durable_jobs.pools import pool, shutting_down
from durable_jobs.process import process
from durable_jobs.states import UNFINISHED
from durable_jobs.worker.heartbeat import heartbeat
from durable_jobs.worker.lease import POLL_SECONDS
from durable_jobs.worker.runs import jobs_of


def begin(consumer, exitcode=0):
    """Begin the shutdown of this worker. May be called in a signal handler."""
    if shutting_down.value:
        return
    shutting_down.value = True
    if not process.is_prefork:  # Celery alone would wait for the last function
        pool.start_thread(partial(requeue_and_exit, consumer, exitcode))


# Threads and gevent


def requeue_and_exit(consumer, exitcode=0):
    """Release the jobs that have not ended after worker_soft_shutdown_timeout, and end the process."""
    pool.sleep(current_app.conf.worker_soft_shutdown_timeout)
    try:
        with process.lock:
            release([run for run in process.runs.values() if not run.limit_key])
        # Give plain tasks back, in a thread of its own: a broker that hangs must not delay the end.
        pool.start_thread(partial(pool.send, close, consumer))
        pool.sleep(POLL_SECONDS)
        signals.worker_shutdown.send(None)  # os._exit() comes before Celery would send it
        heartbeat.forget()
        with process.lock:
            # Jobs with a limit at the very last: their functions must end before their slots are used again. And once
            # more those without one: a renewal may have locked their rows for a moment.
            release(process.runs.values())
    finally:
        os._exit(exitcode)


@transaction.atomic
def release(some_runs):
    """Queue these jobs for other workers. The leases of locked rows will lapse.

    Their functions run until the process ends, mostly within the second after which the jobs may start. With a slow
    database it is later: then a job without a limit may run twice for a moment. Jobs with a limit keep their slots,
    unless the limit has a rate: then they must be admitted again.
    """
    limit_locks()
    rows = skip_locked(jobs_of(some_runs).filter(UNFINISHED))
    keys = {run.limit_key for run in some_runs} - {None}
    unrated = [key for key in keys if not limit_of(key).rate]
    transitions.release_before_exit(rows, 2 * POLL_SECONDS, keeping=unrated)
