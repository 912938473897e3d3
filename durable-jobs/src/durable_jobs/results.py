"""The result of a job: AsyncResult(id) reads its row."""

import sys

from celery import states
from celery.backends.base import BaseBackend
from celery_steady import results

from durable_jobs.models import Failure, Job
from durable_jobs.validation import uuids

STATES = {
    "queued": states.PENDING,
    "running": states.STARTED,
    "succeeded": states.SUCCESS,
    "failed": states.FAILURE,
    "cancelled": states.REVOKED,
}
UNKNOWN = {"status": states.PENDING, "result": None}  # what Celery answers for an unknown id


def read(task_id):
    """Return status and result of a job, as Celery's backends do, or None if this is no id of a job."""
    keys = list(uuids([task_id]))
    job = (
        Job.objects.filter(pk__in=keys)
        .only("state", "result", "error", "progress", "message")
        .first()
    )
    if job is None:
        return None
    meta = {"status": STATES[job.state], "result": job.result}
    if job.state == "running" and (job.progress or job.message):  # as update_state() would say it
        meta["status"] = "PROGRESS"
        meta["result"] = {"done": job.progress, "total": 100, "message": job.message}
    elif job.state == "cancelled":
        meta["result"] = exception("celery.exceptions.TaskRevokedError", job.error)
    elif job.state == "failed":
        last = job.failures.last()
        # Not if it failed afterward, without a run of its own
        if last and job.error.startswith(last.error):
            meta["traceback"] = last.traceback
        else:
            last = Failure(exception="celery.exceptions.TaskError")
        meta["result"] = exception(last.exception, job.error)
    return meta


def exception(path, text):
    """Return an exception as Celery's backends store it, from the path of its class and what Python prints of it."""
    module, _, name = path.rpartition(".")
    while module not in sys.modules and "." in module:  # Order.DoesNotExist
        module, _, outer = module.rpartition(".")
        name = f"{outer}.{name}"
    for prefix in path, name:
        text = text.removeprefix(f"{prefix}: ")
    return {"exc_type": name, "exc_message": text, "exc_module": module}


class JobBackend(BaseBackend):
    """Reads jobs only. It polls the rows, because no message reports a job's result."""

    def _ensure_not_eager(self):
        """Do not warn: in eager mode, too, a job's result is in its row."""

    def get_task_meta(self, task_id, cache=True):
        return read(task_id) or UNKNOWN


class JobRowsMixin:
    """Reads jobs from their rows. All other ids are left to the result backend."""

    def get_task_meta(self, task_id, cache=True):
        return read(task_id) or super().get_task_meta(task_id, cache=cache)

    def wait_for_pending(self, result, **options):
        backend = JobBackend(self.app) if read(result.id) else super()
        return backend.wait_for_pending(result, **options)


def backend(app):
    """Return the app's result backend, extended to read the rows of jobs."""
    kind, url = results.by_url(app)
    return type(kind.__name__, (JobRowsMixin, kind), {})(app=app, url=url)
