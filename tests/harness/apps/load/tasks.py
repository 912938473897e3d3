"""Notes the start and the end of each task, of all apps, for test_services.py."""

from celery import signals
from trials.tasks import note


@signals.task_prerun.connect
def note_start(task_id, task, **kwargs):
    note(task_id, "began", task.name, task.request.retries)


@signals.task_postrun.connect
def note_end(task_id, task, state, **kwargs):
    note(task_id, "ended", task.name, state)
