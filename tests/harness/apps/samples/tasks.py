"""Tasks for projects without the example: a job with progress, and plain tasks."""

import time
from pathlib import Path

from celery import shared_task

from durable_jobs.tasks import JobTask


@shared_task(base=JobTask, bind=True)
def count(self, to):
    for done in range(to):
        self.report(done, to, f"{done} of {to}")
        time.sleep(0.1)
    return to


@shared_task
def add(*numbers):
    return sum(numbers)


@shared_task
def add_all(sums):
    return sum(sums)


@shared_task
def note_time(path):
    """Write the time of this run into a file: it is more exact than the file's own time."""
    Path(path).write_text(str(time.time()))
