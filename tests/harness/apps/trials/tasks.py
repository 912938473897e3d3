"""Tasks that note each of their starts and ends in the file of the variable NOTES."""

import os
import signal
import time
from pathlib import Path

from celery import shared_task
from celery.exceptions import SoftTimeLimitExceeded
from celery.result import allow_join_result
from django.db import connection


def note(kind, task):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{kind} {task.request.id} {os.getpid()} {time.time()}\n")


@shared_task
def add(x, y):
    return x + y


@shared_task
def join(name, *args):
    """Send another task of this module, and wait for its result."""
    with allow_join_result():
        return globals()[name].delay(*args).get(timeout=300)


@shared_task
def total(numbers):
    return sum(numbers)


@shared_task(bind=True)
def quick(self):
    note("start", self)


@shared_task(bind=True, default_retry_delay=1)
def work(self, gate):
    """Report progress until the file `gate` exists."""
    note("start", self)
    done = 0
    while not Path(gate).exists():
        done += 1
        self.update_state(state="PROGRESS", meta={"done": done})
        time.sleep(0.1)
    note("end", self)
    return "done"


@shared_task(bind=True, ignore_result=True, default_retry_delay=1)
def wait(self, gate):
    """Wait until the file `gate` exists, without results."""
    note("start", self)
    while not Path(gate).exists():
        time.sleep(0.05)
    note("end", self)


@shared_task(bind=True)
def hold(self, gate):
    """Wait until the file `gate` exists, without progress."""
    note("start", self)
    while not Path(gate).exists():
        time.sleep(0.05)


@shared_task(bind=True)
def stubborn(self):
    """Ignore the soft time limit."""
    note("start", self)
    while True:
        try:
            time.sleep(60)
        except SoftTimeLimitExceeded:
            note("soft", self)


@shared_task
def find_connection():
    """Return the process id of PostgreSQL's end of the database connection."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


@shared_task(bind=True, autoretry_for=(OSError,), default_retry_delay=2)
def fail_twice(self):
    note("start", self)
    if self.request.retries < 2:
        raise OSError("not yet")
    return self.request.retries


@shared_task(bind=True, ignore_result=True)
def retry_later(self, countdown):
    note("start", self)
    if not self.request.retries:
        raise self.retry(countdown=countdown)


@shared_task(bind=True, default_retry_delay=1)
def kill_child(self):
    note("start", self)
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(bind=True, ignore_result=True)
def kill_worker(self, gate="never"):
    """Kill the whole worker, unless the file `gate` exists: workers lead their process groups."""
    note("start", self)
    if not Path(gate).exists():
        os.killpg(0, signal.SIGKILL)


@shared_task(bind=True, ignore_result=True, rate_limit="1/m")
def limited(self):
    note("start", self)


@shared_task
def tick(path):
    Path(path).touch()
