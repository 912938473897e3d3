"""The setting beat_scheduler: "celery_steady.beat:Scheduler"."""

from contextlib import suppress

from celery import beat

from celery_steady import versions
from celery_steady.patience import be_patient


class Patient:
    def __init__(self, app, *args, **kwargs):
        be_patient(app)
        super().__init__(app, *args, **kwargs)


class Scheduler(Patient, beat.PersistentScheduler):
    """Starts over if Beat's file can't be read. Celery does too, but not after every error.

    For example, the file may name a schedule's class that the code no longer has (celery issue 8008).
    """

    def setup_schedule(self):
        try:
            super().setup_schedule()
        except Exception as error:
            with suppress(Exception):
                self._store.close()
            # Replace it with an empty file, which setup_schedule() then opens.
            self._destroy_open_corrupted_schedule(error).close()
            super().setup_schedule()


Scheduler = versions.choose("Beat", Scheduler, beat.PersistentScheduler)
