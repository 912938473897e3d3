"""Plain tasks. Those of all apps note what they do in the file of the variable NOTES."""

import os
import signal
import time
from pathlib import Path

from celery import shared_task
from celery.exceptions import SoftTimeLimitExceeded
from celery.result import allow_join_result
from celery.signals import worker_process_init
from celery.worker.control import control_command
from django.db import connection


def note(task, kind, *words):
    """Append a line about a task, which is an id, to the file: processes have the same clock."""
    line = [kind, task, os.getpid(), time.time(), *words]
    with open(os.environ["NOTES"], "a") as file:
        # Not print(), which writes the line end separately: a task may be terminated in between.
        file.write(" ".join(map(str, line)) + "\n")


def wait_for(gate):
    """Wait until this file exists, or the one with the id of this process."""
    while not Path(gate).exists() and not Path(f"{gate}-{os.getpid()}").exists():
        time.sleep(0.05)


@worker_process_init.connect
def start_slowly(**kwargs):
    """Like a child process that loads a model."""
    time.sleep(float(os.environ.get("CHILD_STARTS", 0)))


@control_command(args=[("seconds", float)])
def freeze(state, seconds):
    """Let the main process of each worker do nothing else."""
    time.sleep(seconds)


@shared_task
def add(x, y):
    return x + y


@shared_task
def join(name, *args):
    """Send another task of this module, and wait for its result."""
    with allow_join_result():
        return globals()[name].apply_async(args, ignore_result=False).get(timeout=300)


@shared_task
def total(numbers):
    return sum(numbers)


@shared_task(ignore_result=True)
def add_quietly(x, y):
    return x + y


@shared_task(soft_time_limit=1)
def query_for_long():
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(60)")


@shared_task(bind=True)
def quick(self):
    note(self.request.id, "start")


@shared_task(bind=True, default_retry_delay=1)
def work(self, gate):
    """Report progress until the file `gate` exists."""
    note(self.request.id, "start")
    done = 0
    while not Path(gate).exists():
        done += 1
        self.update_state(state="PROGRESS", meta={"done": done})
        time.sleep(0.1)
    note(self.request.id, "end")
    return "done"


@shared_task(bind=True, ignore_result=True, default_retry_delay=1)
def wait(self, gate):
    """Wait until the file `gate` exists, without progress."""
    note(self.request.id, "start")
    wait_for(gate)
    note(self.request.id, "end")


@shared_task(bind=True, default_retry_delay=1)
def nap(self, seconds, cancel=False):
    """Sleep, and ask for its own cancellation if told so."""
    note(self.request.id, "start", self.request.retries)
    if cancel:
        self.AsyncResult(self.request.id).revoke(terminate=True)
    time.sleep(seconds)
    note(self.request.id, "end")


@shared_task(bind=True)
def stubborn(self):
    """Ignore the soft time limit."""
    note(self.request.id, "start")
    while True:
        try:
            time.sleep(60)
        except SoftTimeLimitExceeded:
            note(self.request.id, "soft")


@shared_task
def find_connection():
    """Return the process id of PostgreSQL's end of the database connection."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


@shared_task(bind=True, autoretry_for=(OSError,), default_retry_delay=2)
def fail_twice(self):
    note(self.request.id, "start")
    if self.request.retries < 2:
        raise OSError("not yet")
    return self.request.retries


@shared_task(bind=True, ignore_result=True)
def retry_later(self, countdown):
    note(self.request.id, "start")
    if not self.request.retries:
        raise self.retry(countdown=countdown)


@shared_task(bind=True)
def retry_slowly(self, gate, ends):
    """Stay in the first try until the file `gate` exists. The second one succeeds, or fails."""
    if not self.request.retries:
        retry = self.retry(countdown=0, throw=False)
        wait_for(gate)
        raise retry
    if ends == "FAILURE":
        raise OSError


@shared_task(bind=True, default_retry_delay=1)
def kill_child(self):
    note(self.request.id, "start")
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(bind=True)
def circle(self, gate, seconds):
    """Send this task again and again, until the gate exists."""
    time.sleep(float(seconds))
    if not Path(gate).exists():
        self.delay(gate, seconds)


@shared_task
def tick(path):
    """Write the time of this run into a file: it is more exact than the file's own time."""
    Path(path).write_text(str(time.time()))
