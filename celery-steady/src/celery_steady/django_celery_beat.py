"""The setting beat_scheduler with django-celery-beat: "celery_steady.django_celery_beat:DatabaseScheduler"."""

from contextlib import suppress
from pathlib import Path

from django_celery_beat import schedulers

from celery_steady import versions
from celery_steady.beat import Patient


class DatabaseScheduler(Patient, schedulers.DatabaseScheduler):
    """Touches Beat's schedule file with each turn of its loop, so that a health check notices if it hangs.

    Celery's own scheduler writes this file; one in a database would not.
    """

    def __init__(self, app, *args, schedule_filename=None, **kwargs):
        self.schedule_file = schedule_filename and Path(schedule_filename)
        super().__init__(app, *args, **kwargs)

    def tick(self, *args, **kwargs):
        seconds = super().tick(*args, **kwargs)
        if self.schedule_file:
            with suppress(OSError):  # in a folder that is read-only, the health check finds no file
                self.schedule_file.touch()
        return seconds


DatabaseScheduler = versions.choose("Beat", DatabaseScheduler, schedulers.DatabaseScheduler)
