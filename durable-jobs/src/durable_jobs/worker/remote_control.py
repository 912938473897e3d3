"""Remote control, from Flower or `celery control`: a job is cancelled when its task is revoked."""

from celery.worker import state
from celery.worker.control import Panel

from durable_jobs.batches import cancel_ids
from durable_jobs.worker.forks import in_thread


def cancel_revoked_jobs():
    """Cancel a job when this worker is told to revoke or to terminate its task.

    The signal task_revoked is too late for a job that does not run yet: Celery sends it when a slot
    takes the message, or never.
    """
    revoke = Panel.data["revoke"]

    def cancel_and_forget(task_id):
        # Celery ignores the messages of a revoked id for three hours. A job may be run again.
        for pk in cancel_ids(task_id):
            state.revoked.discard(pk)

    def cancel_and_revoke(worker, task_id, **kwargs):
        try:
            return revoke(worker, task_id, **kwargs)
        finally:
            in_thread(cancel_and_forget, task_id)

    def cancel_and_terminate(worker, signal, task_id, **kwargs):
        return cancel_and_revoke(worker, task_id, terminate=True, signal=signal, **kwargs)

    Panel.data["revoke"], Panel.data["terminate"] = cancel_and_revoke, cancel_and_terminate
