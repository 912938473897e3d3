"""Additions to Celery's Beat: it enqueues each job once per due time, and runs the sweeper."""

import logging
import threading
import time
import uuid
from datetime import timedelta
from functools import partial
from queue import SimpleQueue

from celery.beat import BeatLazyFunc, SchedulingError
from django.db import IntegrityError, close_old_connections, connection

from durable_jobs.beat.sweeper import Sweeper
from durable_jobs.database import may_succeed_later, wait_for
from durable_jobs.models import Job
from durable_jobs.tasks import JobTask

logger = logging.getLogger(__name__)


def start(sender, **kwargs):
    """Prepare Beat's service (`sender`), which has just started."""
    OncePerDueTime(sender).start()
    Sweeper(watch_ticks(sender)).start()


def watch_ticks(beat):
    """Return a function that returns how many seconds the scheduler's next tick is overdue."""
    tick, due_at = beat.scheduler.tick, time.monotonic()

    def timed_tick():
        nonlocal due_at
        interval = tick()
        due_at = time.monotonic() + interval
        return interval

    beat.scheduler.tick = timed_tick
    return lambda: time.monotonic() - due_at


class OncePerDueTime:
    """Enqueues each job of the schedule once per due time, although two Beats may run.

    It replaces apply_async() of Beat's scheduler, and gives each job an id that is made of its due time.
    """

    def __init__(self, beat):
        self.tasks, self.scheduler = beat.app.tasks, beat.scheduler
        self.celery_apply_async = beat.scheduler.apply_async
        self.postponed = SimpleQueue()

    def start(self):
        self.scheduler.apply_async = self.apply_async
        threading.Thread(target=self.enqueue_postponed, daemon=True).start()

    def apply_async(self, entry, **celery_options):
        task = self.tasks.get(entry.task)
        if task is None:  # Celery sends it, as a worker may know it
            logger.error("%s: this project has no task %s", entry.name, entry.task)
        if not isinstance(task, JobTask):
            return self.celery_apply_async(entry, **celery_options)
        if "task_id" in entry.options:
            raise SchedulingError(f"{entry.name}: the schedule of a job cannot have a task_id")
        args = [value(arg) for arg in entry.args or ()]
        kwargs = {key: value(arg) for key, arg in (entry.kwargs or {}).items()}
        options = {"task_id": id_of_due_time(entry), **entry.options}
        call = partial(self.enqueue, task, args, kwargs, **options)
        try:
            result = call()
        except Exception as error:
            if may_succeed_later(error):
                return self.postponed.put(call)
            raise SchedulingError(f"{entry.name}: {error}") from error
        # Store last_run_at. Otherwise a Beat that was killed would compute this due time again, its id would be
        # refused, and the job that was due meanwhile would be skipped.
        self.scheduler.sync()
        return result

    def enqueue(self, task, args, kwargs, task_id, **options):
        """Enqueue a job, unless another Beat was faster."""
        close_old_connections()  # nothing else does it in Beat's process
        try:
            return task.apply_async(args, kwargs, task_id=task_id, **options)
        except IntegrityError:
            if not Job.objects.filter(pk=task_id).exists():
                raise

    def enqueue_postponed(self):
        """Enqueue the jobs that were due while the database was unavailable. Runs in its own thread."""
        while True:
            call = self.postponed.get()
            try:
                wait_for(call)
            except Exception as error:  # without this thread, all later ones would be lost
                logger.error("a scheduled job cannot be stored: %r", error)
            connection.close()  # it may not be needed again for months


def id_of_due_time(entry):
    """Return the id of the job that this entry of the schedule starts now.

    It is made of the entry's name and the number of intervals (with crontab: minutes) that have passed
    since 1970, so Beats that were started at different times get the same id.
    """
    remaining = entry.schedule.remaining_estimate(entry.last_run_at)
    # A timestamp, because local time repeats an hour when the clock goes back.
    due = time.time() + remaining.total_seconds()
    length = getattr(entry.schedule, "run_every", timedelta(minutes=1))
    interval = f"{entry.name} {due // length.total_seconds()}"
    # A one-off entry of django-celery-beat that was enabled again is due at the same time as before.
    if hasattr(entry.schedule, "clocked_time"):
        interval += f" {entry.last_run_at}"
    return str(uuid.uuid5(uuid.NAMESPACE_OID, interval))


def value(arg):
    """Return an argument of a task that is due. Celery allows functions in the schedule."""
    return arg() if isinstance(arg, BeatLazyFunc) else arg
