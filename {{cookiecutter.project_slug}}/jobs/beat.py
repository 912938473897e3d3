"""What Beat's process does besides its schedule: one job for each due time, and the sweep."""

import uuid
from copy import copy
from datetime import timedelta

from celery.beat import SchedulingError
from django.db import IntegrityError, close_old_connections

from . import sweep
from .tasks import JobTask


def start(sender, **kwargs):
    """Prepare Beat's service, the `sender`, which has just started."""
    name_ticks(sender)
    sweep.start()


def name_ticks(beat):
    """Give a job that Beat starts the id of its due time, so that two Beats start it only once."""
    apply_async = beat.scheduler.apply_async

    def apply_tick(entry, **options):
        if not isinstance(beat.app.tasks.get(entry.task), JobTask):
            return apply_async(entry, **options)
        close_old_connections()  # in Beat's process nothing else does
        schedule, entry = entry.schedule, copy(entry)
        # The id is made of the entry's name and the number of the interval (of crontab: the minute)
        # since 1970, so Beats that were started at different times get the same one. The clock is read
        # twice, so `due` may be a few milliseconds early, in the interval before: add a second.
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
