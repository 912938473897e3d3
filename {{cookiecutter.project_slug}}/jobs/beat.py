"""Additions to Celery's Beat: it enqueues each job once per due time, and runs the sweep."""

import logging
import threading
import time
import uuid
from copy import copy
from datetime import timedelta
from queue import SimpleQueue

from celery.beat import SchedulingError
from django.db import Error, close_old_connections, connection

from . import sweep
from .database import may_succeed_later, wait_for
from .models import Job
from .tasks import JobTask

logger = logging.getLogger(__name__)


def start(sender, **kwargs):
    """Prepare Beat's service (`sender`), which has just started."""
    enqueue_once_per_due_time(sender)
    sweep.start(watch_ticks(sender))


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


def enqueue_once_per_due_time(beat):
    """Give each job of the schedule an id made of its due time, so that two Beats start it only once."""
    apply_async, postponed = beat.scheduler.apply_async, SimpleQueue()

    def apply_once(entry, **options):
        if not isinstance(beat.app.tasks.get(entry.task), JobTask):
            return apply_async(entry, **options)
        if "task_id" in entry.options:
            raise SchedulingError(f"{entry.name}: the schedule of a job cannot have a task_id")
        schedule, entry = entry.schedule, copy(entry)
        # The id is made of the entry's name and the number of intervals (with crontab: minutes) that have
        # passed since 1970, so Beats that were started at different times get the same id. The clock is
        # read twice, so `due` may be a few milliseconds early, in the previous interval: add a second.
        due = schedule.now() + schedule.remaining_estimate(entry.last_run_at) + timedelta(seconds=1)
        length = getattr(schedule, "run_every", timedelta(minutes=1))
        interval = f"{entry.name} {due.timestamp() // length.total_seconds()}"
        entry.options = {**entry.options, "task_id": str(uuid.uuid5(uuid.NAMESPACE_OID, interval))}
        try:
            return store(entry, **options)
        except Error:
            postponed.put(entry)

    def store(entry, **options):
        close_old_connections()  # nothing else does it in Beat's process
        try:
            return apply_async(entry, **options)
        except SchedulingError as error:
            if may_succeed_later(error.__context__):
                raise error.__context__ from None
            # If the job exists, another Beat was faster, which is no error.
            if not Job.objects.filter(pk=entry.options["task_id"]).exists():
                raise

    def store_postponed():
        """Store the jobs that were due while the database was unavailable. Runs in its own thread."""
        while True:
            entry = postponed.get()
            try:
                wait_for(store, entry, advance=False)
            except Exception as error:  # without this thread, all later ones would be lost
                logger.warning("a scheduled job cannot be stored: %r", error)
            connection.close()  # it may not be needed again for months

    beat.scheduler.apply_async = apply_once
    threading.Thread(target=store_postponed, daemon=True).start()
