"""Tasks for test_services.py. The start and the end of each task, of all apps, is noted."""

import time
from importlib.util import find_spec

from celery import shared_task, signals
from trials.tasks import note


@signals.task_prerun.connect
def note_start(task_id, task, **kwargs):
    note(task_id, "began", task.name, task.request.retries)


@signals.task_postrun.connect
def note_end(task_id, task, state, **kwargs):
    note(task_id, "ended", task.name, state)


@shared_task
def rest(seconds):
    time.sleep(seconds)
    return "rested"


@shared_task(bind=True)
def try_again(self):
    if not self.request.retries:
        raise self.retry(countdown=2)
    return "tried again"


if find_spec("durable_jobs"):
    from durable_jobs.tasks import job

    @job
    def rest_job(self, seconds):
        time.sleep(seconds)
        return "rested"

    @job
    def try_job_again(self):
        if not self.request.retries:
            raise self.retry(countdown=2)
        return "tried again"
