"""A drill: a worker is killed while it runs a job, and another one must continue."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from functools import partial

from celery import current_app

from durable_jobs import conf
from durable_jobs.models import Job, Worker
from durable_jobs.tasks import job

TIMEOUT = 90  # seconds for each wait, and the length of a lease


@job(name="durable_jobs.drill", time_limit=600)
def wait_to_be_killed(self):
    """Wait in the first run. Later ones find the cursor."""
    if self.cursor is None:
        self.report(0, cursor=1)
        time.sleep(600)


def drill(app):
    """Start two workers of this app, such as "mysite", and kill the one that runs a job.

    Returns the seconds until the other one has continued the job. They have a queue of their own, which is gone
    afterward, as are all rows. Raises RuntimeError if the settings allow no drill, and with the end of the workers' log
    if they do not start or do not continue the job.
    """
    for name, value in {"task_always_eager": False, "task_create_missing_queues": True}.items():
        if current_app.conf[name] != value:
            raise RuntimeError(f"A drill needs CELERY_{name.upper()} = {value}")
    queue = f"drill-{uuid.uuid4().hex[:8]}"
    names = [f"{queue}@{number}" for number in (1, 2)]
    row = Job.objects.none()
    with tempfile.TemporaryFile("a+") as log:
        workers = {name: start(app, name, queue, log) for name in names}
        wait = partial(wait_for, workers.values(), log)
        try:
            wait(Worker.objects.filter(name__in=names), 2, "The workers do not start")
            stored = wait_to_be_killed.using(label="Drill", queue=queue).enqueue()
            row = Job.objects.filter(pk=stored.pk)
            wait(row.exclude(cursor=None), 1, "They do not start the job")
            os.killpg(workers[row.get().worker].pid, signal.SIGKILL)
            killed_at = time.monotonic()
            wait(row.filter(state="succeeded"), 1, "No other worker continues: is Beat running?")
            return time.monotonic() - killed_at
        finally:
            for worker in workers.values():
                stop(worker)
            row.delete()
            Worker.objects.filter(name__in=names).delete()
            delete_queues(queue, names)


def start(app, name, queue, log):
    """Start a worker in a process group of its own."""
    options = f"-n {name} -Q {queue} -c 1 -I {__name__} --without-gossip --without-mingle"
    variables = {key: value for key, value in os.environ.items() if key != "LIVENESS_FILE"}
    command = [sys.executable, "-m", "celery", "-A", app, "worker", *options.split()]
    pipes = {"stdout": log, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=variables, start_new_session=True, **pipes)  # noqa: S603


def stop(worker):
    """Stop this worker, and kill what is left of it."""
    worker.terminate()
    with suppress(subprocess.TimeoutExpired):
        worker.wait(timeout=30)
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def delete_queues(queue, names):
    """Delete this queue, its exchange if it has one, and the queues of the workers' remote control."""
    controls = map(current_app.control.mailbox.get_queue, names)
    with current_app.connection_for_write() as broker:
        for entity in [current_app.amqp.queues[queue], *controls]:
            bound = entity(broker.default_channel)
            bound.declare()  # kombu deletes the bindings that it knows
            bound.delete()
            if bound.exchange.name == queue:
                bound.exchange.delete()


def wait_for(workers, log, rows, count, problem):
    """Wait for so many rows. Raises RuntimeError with the problem if there are none in time, or no worker is left."""
    until = time.monotonic() + TIMEOUT + conf.LEASE_SECONDS
    while rows.count() < count:
        if time.monotonic() > until or all(worker.poll() is not None for worker in workers):
            log.seek(0)
            raise RuntimeError(f"{problem}. The end of their log:\n{log.read()[-3000:]}")
        time.sleep(0.2)
