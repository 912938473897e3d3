"""The result backend of jobs: task.AsyncResult(id) reads the row."""

from contextlib import suppress

from celery import states
from celery.backends.base import BaseBackend
from django.core.exceptions import ValidationError

from .models import Job

STATES = {
    "queued": states.PENDING,
    "running": states.STARTED,
    "succeeded": states.SUCCESS,
    "failed": states.FAILURE,
    "cancelled": states.REVOKED,
}
ERRORS = {"failed": "TaskError", "cancelled": "TaskRevokedError"}  # in celery.exceptions


class JobBackend(BaseBackend):
    def get_task_meta(self, task_id, cache=True):
        job = None
        with suppress(ValidationError):  # the id is no UUID
            job = Job.objects.filter(pk=task_id).first()
        if job is None:
            return {"status": states.PENDING, "result": None}  # Celery's answer for unknown tasks
        result = job.result
        if kind := ERRORS.get(job.state):
            result = {"exc_type": kind, "exc_message": job.error, "exc_module": "celery.exceptions"}
        return {"status": STATES[job.state], "result": result}
