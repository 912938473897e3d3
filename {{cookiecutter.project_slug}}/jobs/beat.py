"""Additions to Celery's Beat: it enqueues each job once per due time, counts errors, and runs the sweep."""

import logging
import threading
import time
import uuid
from datetime import timedelta
from queue import SimpleQueue

from celery import current_app
from celery.beat import BeatLazyFunc, ScheduleEntry, SchedulingError
from django.db import Error, close_old_connections, connection
from django.db.models.functions import Now

from . import sweep
from .database import may_succeed_later, wait_for
from .models import Job
from .queryset import new_fields
from .tasks import JobTask, check_options

logger = logging.getLogger(__name__)


def start(sender, **kwargs):
    """Prepare Beat's service (`sender`), which has just started."""
    enqueue_once_per_due_time(sender)
    sweep.start(watch_ticks(sender), count_errors(sender))


def check_entry(name, args, kwargs, options):
    """Raise TypeError or ValueError if Beat cannot start the task `name` with this call."""
    task = current_app.tasks.get(name)
    if task is None:
        raise ValueError(f"there is no task {name!r}: write the full path, such as app.tasks.name")
    if not isinstance(args, (list, tuple)) or not isinstance(kwargs, dict):
        raise TypeError("args must be a list, such as [10], and kwargs a dictionary")
    args = [None if isinstance(arg, BeatLazyFunc) else arg for arg in args]
    kwargs = {key: None if isinstance(arg, BeatLazyFunc) else arg for key, arg in kwargs.items()}
    if isinstance(task, JobTask):
        check_options({key: options[key] for key in options if key != "countdown"})
        new_fields(Now(), task, args, kwargs, countdown=options.get("countdown"))
    elif task.typing:
        task.__header__(*args, **kwargs)


def count_errors(beat):
    """Return a function that returns how many errors Beat and its scheduler have logged.

    They log an error when they cannot start a task or cannot read an entry of the schedule.
    """
    counter = ErrorCounter(level=logging.ERROR)
    for name in {"celery.beat", type(beat.scheduler).__module__, __name__}:
        logging.getLogger(name).addHandler(counter)
    return lambda: counter.count


class ErrorCounter(logging.Handler):
    count = 0

    def emit(self, record):
        self.count += 1


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
        if entry.task not in beat.app.tasks:  # Celery sends it, as a worker may know it
            logger.error("%s: this project has no task %s", entry.name, entry.task)
        if not isinstance(beat.app.tasks.get(entry.task), JobTask):
            return apply_async(entry, **options)
        if "task_id" in entry.options:
            raise SchedulingError(f"{entry.name}: the schedule of a job cannot have a task_id")
        # The id is made of the entry's name and the number of intervals (with crontab: minutes) that have
        # passed since 1970, so Beats that were started at different times get the same id. `due` is a
        # timestamp, because local time repeats an hour when the clock goes back.
        schedule = entry.schedule
        remaining = schedule.remaining_estimate(entry.last_run_at)
        due = time.time() + remaining.total_seconds()
        length = getattr(schedule, "run_every", timedelta(minutes=1))
        interval = f"{entry.name} {due // length.total_seconds()}"
        task_id = str(uuid.uuid5(uuid.NAMESPACE_OID, interval))
        # A plain entry, because each scheduler has its own class of entries.
        entry = ScheduleEntry(
            entry.name,
            entry.task,
            schedule=schedule,
            args=entry.args,
            kwargs=entry.kwargs,
            options={**entry.options, "task_id": task_id},
            app=beat.app,
        )
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
                logger.error("a scheduled job cannot be stored: %r", error)
            connection.close()  # it may not be needed again for months

    beat.scheduler.apply_async = apply_once
    threading.Thread(target=store_postponed, daemon=True).start()
