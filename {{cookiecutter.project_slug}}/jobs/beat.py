"""What Beat's process does beside its schedule: it names ticks, and starts the sweep."""

import uuid
from copy import copy
from datetime import timedelta

from celery.beat import SchedulingError
from django.db import IntegrityError, close_old_connections

from . import sweep
from .tasks import JobTask


def start(sender, **kwargs):
    """Begin, once Beat has: `sender` is its service."""
    name_ticks(sender)
    sweep.start()


def name_ticks(beat):
    """Give a job that Beat starts the id of its tick: two Beats start one job."""
    apply_async = beat.scheduler.apply_async

    def apply_tick(entry, **options):
        if not isinstance(beat.app.tasks.get(entry.task), JobTask):
            return apply_async(entry, **options)
        close_old_connections()  # Beat has no requests or tasks that do it
        schedule, entry = entry.schedule, copy(entry)
        # Exact to milliseconds, so a second is added. Intervals begin when their Beat does: one tick
        # counts between two multiples of its length.
        due = schedule.now() + schedule.remaining_estimate(entry.last_run_at) + timedelta(seconds=1)
        length = getattr(schedule, "run_every", timedelta(minutes=1))
        tick = f"{entry.name} {due.timestamp() // length.total_seconds()}"
        task_id = str(uuid.uuid5(uuid.NAMESPACE_OID, tick))
        entry.options = {"task_id": task_id, **entry.options}
        try:
            return apply_async(entry, **options)
        except SchedulingError as error:
            if not isinstance(error.__context__, IntegrityError):
                raise

    beat.scheduler.apply_async = apply_tick
