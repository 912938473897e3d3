"""The result backend of jobs: AsyncResult(id) reads the job's row."""

from contextlib import suppress

from celery import states
from celery.app import backends
from celery.backends.base import BaseBackend
from django.core.exceptions import ValidationError

from .models import Job
from .publish import publish

STATES = {
    "queued": states.PENDING,
    "running": states.STARTED,
    "succeeded": states.SUCCESS,
    "failed": states.FAILURE,
    "cancelled": states.REVOKED,
}
ERRORS = {"failed": "TaskError", "cancelled": "TaskRevokedError"}  # in celery.exceptions


def backend(app, url=None):
    """Return the result backend of the settings, extended to read the rows of jobs.

    `url` is ignored: Celery gives none.
    """
    kind, url = backends.by_url(app.conf.result_backend, app.loader)
    return type(kind.__name__, (JobRowsMixin, kind), {})(app=app, url=url)


def read_job(id, app):
    """Return the job's status and result as Celery's backends do, or None if there is no such job."""
    job = None
    with suppress(ValidationError):  # the id is not a UUID
        job = Job.objects.filter(pk=id).first()
    if job is None:
        return None
    if job.state == "queued" and app.conf.task_always_eager:
        publish([job])  # a test's transaction never commits, so get() would wait forever
        job.refresh_from_db()
    result = job.result
    if error := ERRORS.get(job.state):
        result = {"exc_type": error, "exc_message": job.error, "exc_module": "celery.exceptions"}
    return {"status": STATES[job.state], "result": result}


class JobRowsMixin:
    """Reads jobs from their rows. All other ids are left to the result backend."""

    def get_task_meta(self, task_id, cache=True):
        return read_job(task_id, self.app) or super().get_task_meta(task_id, cache=cache)

    def wait_for_pending(self, result, **options):
        backend = JobBackend(self.app) if read_job(result.id, self.app) else super()
        return backend.wait_for_pending(result, **options)


class JobBackend(BaseBackend):
    """Reads jobs only. It polls the row, because no message reports a job's result."""

    def _ensure_not_eager(self):
        """Do not warn: in eager mode, too, a job's result is in its row."""

    def get_task_meta(self, task_id, cache=True):
        # For an unknown id, answer as Celery does.
        return read_job(task_id, self.app) or {"status": states.PENDING, "result": None}
