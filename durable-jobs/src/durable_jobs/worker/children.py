"""The child processes of a prefork worker, as its main process sees them.

The main process gives each run its token, renews the leases of children that a C extension blocks, and
recovers the jobs of dead children.
"""

import logging
import signal as signals
import threading
import time
import uuid

from celery import exceptions
from celery.worker import state
from django.db import connection
from django.db.models import Q

from durable_jobs import conf
from durable_jobs.admission import free_cancelled
from durable_jobs.database import in_thread
from durable_jobs.messages import HEADER, fields_in
from durable_jobs.models import Job
from durable_jobs.states import STILL_RUNNING
from durable_jobs.worker.lease import POLL_SECONDS, recover, renew
from durable_jobs.worker.pools import has_children
from durable_jobs.worker.runs import process

logger = logging.getLogger(__name__)


def assign_run_token(request, **kwargs):
    """Choose a run's token in the main process, so that this process knows the run of a dead child."""
    if fields := fields_in(request.request_dict):
        request.request_dict[HEADER] = {**fields, "run_token": uuid.uuid4()}


def watch_children(sender, **kwargs):
    """Watch the child processes, if any, of a worker that is ready. `sender` is its consumer."""
    if has_children(sender.controller):
        # A C extension may block all threads of a child process, so renew its lease here as well.
        threading.Thread(target=renew_leases_of_children, daemon=True).start()
        # Check for dead children every POLL_SECONDS. Celery does it every 5 s.
        if sender.hub:
            sender.hub.call_repeatedly(POLL_SECONDS, sender.pool.maintain_pool)


def renew_leases_of_children():
    while True:
        time.sleep(conf.LEASE_SECONDS / 3)
        try:
            found = {r.id: fields_in(r.request_dict) for r in tuple(state.active_requests)}
            if tokens := {id: fields["run_token"] for id, fields in found.items() if fields}:
                of_children = Q(run_token__in=tokens.values()) | STILL_RUNNING
                renew(Job.objects.filter(of_children, pk__in=tokens))
        except Exception as error:  # the next try may succeed
            logger.warning("cannot renew leases: %r", error)
        connection.close()  # a child must not inherit it


def recover_job_of_dead_child(sender, task_id, exception, **kwargs):
    """Recover the job of a killed child immediately, without waiting for its lease to lapse."""
    fields = fields_in(sender.request.headers)
    if fields and isinstance(exception, exceptions.WorkerLostError):
        # Wait until the database has rolled back the child's transaction.
        row = Job.objects.filter(pk=task_id, run_token=fields["run_token"])
        in_thread(recover, row, delay=POLL_SECONDS)
        free_slot(task_id, fields)


def free_slot_of_dead_child(request, terminated, signum, **kwargs):
    """Free the slot of a cancelled job whose child was killed by a revoke, without waiting for its lease."""
    if terminated and signum == signals.SIGKILL and process.is_prefork:
        free_slot(request.id, fields_in(request.headers))


def free_slot(id, fields):
    if fields and fields["limit_key"]:
        in_thread(free_cancelled, id, fields["crashes"], delay=POLL_SECONDS)
