"""The child processes of a prefork worker, as its main process sees them.

The main process gives each run its token, renews the leases of children that a C extension blocks, and
recovers the jobs of dead children.
"""

import logging
import signal as os_signal
import threading
import time
import uuid

from celery.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.worker import state
from celery.worker.request import Request

from durable_jobs import conf
from durable_jobs.messages import HEADER, fields_in
from durable_jobs.models import Job
from durable_jobs.process import process
from durable_jobs.worker.forks import between_forks, in_thread
from durable_jobs.worker.lease import POLL_SECONDS, recover, renew

logger = logging.getLogger(__name__)

# What Celery says of a child that has died
DEATHS = (KeyboardInterrupt, SystemExit, Terminated, TimeLimitExceeded, WorkerLostError)


class JobRequest(Request):
    """The message of a job, in a worker's main process."""

    def terminate(self, pool, signal=None):
        # After SIGTERM, a child with a job would wait 5 s for a shutdown: see child_has_crashed().
        super().terminate(
            pool, os_signal.SIGKILL if signal in (None, os_signal.SIGTERM) else signal
        )

    def on_timeout(self, soft, timeout):
        """Leave the job of a child that Celery kills at its time limit to on_failure(), which Celery calls, too."""
        if soft or not self.has_child():
            super().on_timeout(soft, timeout)

    def on_failure(self, exc_info, *args, **kwargs):
        """Recover the job of a child that died, without Celery's task_failure: recover() says what it means."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if not isinstance(error, DEATHS) or not self.has_child():
            return super().on_failure(exc_info, *args, **kwargs)
        is_late = isinstance(error, TimeLimitExceeded)
        recover_later(self.id, self.request_dict, is_late)
        if self._already_revoked or isinstance(error, Terminated):
            return super().on_failure(exc_info, *args, **kwargs)
        state.task_ready(self)
        event = "task-failed" if is_late else "task-retried"
        self.send_event(event, exception=repr(error), traceback=str(exc_info.traceback))
        logger.error("The child process of %s[%s] ended: %r", self.name, self.id, error)

    def has_child(self):
        return process.is_prefork and fields_in(self.request_dict)


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


def recover_later(id, headers, is_late=False):
    """Recover this job once the database has rolled back its child's transaction.

    This does not wait for its lease to lapse. If Celery killed the child at its time limit (`is_late`), the job fails.
    """
    fields = fields_in(headers)
    if fields and "run_token" in fields:
        row = Job.objects.filter(pk=id, run_token=fields["run_token"])
        in_thread(recover, row, is_late, delay=POLL_SECONDS)
