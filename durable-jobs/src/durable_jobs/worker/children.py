"""The child processes of a prefork worker, as its main process sees them.

The main process gives each run its token, renews the leases of children that a C extension blocks, and
recovers the jobs of dead children.
"""

import logging
import signal
import threading
import time
import uuid

from celery import exceptions
from celery.worker import state

from durable_jobs import conf
from durable_jobs.messages import HEADER, fields_in
from durable_jobs.models import Job
from durable_jobs.worker.forks import between_forks, in_thread
from durable_jobs.worker.lease import POLL_SECONDS, recover, renew
from durable_jobs.worker.runs import process

logger = logging.getLogger(__name__)


def assign_run_token(request, **kwargs):
    """Choose a run's token in the main process, so that this process knows the run of a dead child."""
    if fields := fields_in(request.request_dict):
        request.request_dict[HEADER] = {**fields, "run_token": uuid.uuid4()}


def watch_children(sender, **kwargs):
    """Watch the child processes, if any, of a worker that is ready. `sender` is its consumer."""
    if process.is_prefork:
        # A C extension may block all threads of a child process, so renew its lease here as well.
        threading.Thread(target=renew_leases_of_children, daemon=True).start()
        # Check for dead children every POLL_SECONDS. Celery does it every 5 s.
        if sender.hub:
            sender.hub.call_repeatedly(POLL_SECONDS, sender.pool.maintain_pool)


def renew_leases_of_children():
    while True:
        time.sleep(conf.LEASE_SECONDS / 3)
        try:
            requests = {r.id: fields_in(r.request_dict) for r in tuple(state.active_requests)}
            if tokens := {id: fields["run_token"] for id, fields in requests.items() if fields}:
                rows = Job.objects.filter(pk__in=tokens, run_token__in=tokens.values())
                between_forks(renew, rows)
        except Exception as error:  # the next try may succeed
            logger.warning("cannot renew leases: %r", error)


def recover_job_of_dead_child(sender, task_id, exception, **kwargs):
    """Recover the job of a killed child immediately, without waiting for its lease to lapse.

    If Celery killed the child at its time limit, the job fails.
    """
    # Celery sends the signal of a time limit twice, the second time without headers.
    is_late = isinstance(exception, exceptions.TimeLimitExceeded)
    if is_late or isinstance(exception, exceptions.WorkerLostError):
        recover_later(task_id, sender.request, is_late)


def free_slot_of_dead_child(request, terminated, signum, **kwargs):
    """Free the slot of a cancelled job whose child was killed by a revoke, without waiting for its lease."""
    if terminated and signum == signal.SIGKILL and process.is_prefork:
        recover_later(request.id, request)


def recover_later(id, request, is_late=False):
    """Recover this job once the database has rolled back its child's transaction."""
    if fields := fields_in(vars(request)):
        row = Job.objects.filter(pk=id, run_token=fields["run_token"])
        in_thread(recover, row, is_late, delay=POLL_SECONDS)
