"""The result backend of jobs: AsyncResult(id) reads the row."""

from contextlib import suppress

from celery import states
from celery.app import backends
from celery.backends.base import BaseBackend
from django.core.exceptions import ValidationError

from .models import Job, publish

STATES = {
    "queued": states.PENDING,
    "running": states.STARTED,
    "succeeded": states.SUCCESS,
    "failed": states.FAILURE,
    "cancelled": states.REVOKED,
}
ERRORS = {"failed": "TaskError", "cancelled": "TaskRevokedError"}  # in celery.exceptions


def backend(app, url=None):
    """Return the result backend of the settings, which knows the ids of jobs besides."""
    kind, url = backends.by_url(app.conf.result_backend, app.loader)
    return type(kind.__name__, (Rows, kind), {})(app=app, url=url)


def read(id, app):
    """Return what AsyncResult shall know of the job with this id, or None if there is no such job."""
    job = None
    with suppress(ValidationError):  # the id is no UUID
        job = Job.objects.filter(pk=id).first()
    if job is None:
        return None
    if job.state == "queued" and app.conf.task_always_eager:
        publish([job])  # a test's transaction does not commit, and get() would wait for ever
        job.refresh_from_db()
    result = job.result
    if kind := ERRORS.get(job.state):
        result = {"exc_type": kind, "exc_message": job.error, "exc_module": "celery.exceptions"}
    return {"status": STATES[job.state], "result": result}


class Rows:
    """A result backend that reads the rows of jobs."""

    def get_task_meta(self, task_id, cache=True):
        return read(task_id, self.app) or super().get_task_meta(task_id, cache=cache)

    def wait_for_pending(self, result, **options):
        backend = JobBackend(self.app) if read(result.id, self.app) else super()
        return backend.wait_for_pending(result, **options)


class JobBackend(BaseBackend):
    def _ensure_not_eager(self):
        """Do not warn: what a job returns is in its row in eager mode, too."""

    def get_task_meta(self, task_id, cache=True):
        # Celery's answer for unknown tasks
        return read(task_id, self.app) or {"status": states.PENDING, "result": None}
