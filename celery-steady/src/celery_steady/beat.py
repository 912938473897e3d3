"""The setting beat_scheduler: "celery_steady.beat:Scheduler"."""

from contextlib import suppress

from celery import beat

from celery_steady import defaults, versions


class Patient:
    def __init__(self, app, *args, **kwargs):
        defaults.for_beat(app)
        super().__init__(app, *args, **kwargs)


class Scheduler(Patient, beat.PersistentScheduler):
    """Starts over if Beat's file can't be read. Celery does too, but not after every error.

    For example, the file may name a schedule's class that the code no longer has (celery issue 8008).
    """

    def setup_schedule(self):
        for name, entry in self.app.conf.beat_schedule.items():
            self._maybe_entry(name, entry)  # an error of a setting is not the file's
        try:
            super().setup_schedule()
        except Exception as error:
            with suppress(Exception):
                self._store.close()
            # Replace it with an empty file, which setup_schedule() then opens.
            self._destroy_open_corrupted_schedule(error).close()
            super().setup_schedule()


Scheduler = versions.choose("Beat", Scheduler, beat.PersistentScheduler)
