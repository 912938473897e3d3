"""Beat remembers in a file when it last sent each task."""

from contextlib import suppress

from celery import beat


class Scheduler(beat.PersistentScheduler):
    """Starts over if the file can't be read. Celery does too, but not after every error.

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
