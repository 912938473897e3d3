"""What `task.AsyncResult(id)` says of a job: it reads the row."""

from celery import states
from celery.backends.base import BaseBackend

from .models import Job

STATES = {
    "queued": states.PENDING,
    "running": states.STARTED,
    "succeeded": states.SUCCESS,
    "failed": states.FAILURE,
    "cancelled": states.REVOKED,
}


class JobBackend(BaseBackend):
    def get_task_meta(self, task_id, cache=True):
        job = Job.objects.filter(pk=task_id).first()
        if job is None:
            return {"status": states.PENDING, "result": None}  # as Celery says of unknown tasks
        result = {"exc_type": "JobFailed", "exc_message": job.error} if job.error else job.result
        return {"status": STATES[job.state], "result": result}
