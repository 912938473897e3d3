"""Bodies that wait, die or fail when a test of faults wants it."""

import os
import signal
import time
from pathlib import Path

from celery import shared_task
from django.db import Error, connection

from jobs.tasks import JobTask


def note(task, what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{what} {task.request.id} {os.getpid()}\n")


def wait_for(gate):
    """Until the gate is there: for all, or for this process."""
    while not Path(gate).exists() and not Path(f"{gate}-{os.getpid()}").exists():
        time.sleep(0.05)


@shared_task(base=JobTask, bind=True)
def hold(self, gate):
    note(self, "start")
    wait_for(gate)
    note(self, "end")
    return os.getpid()


@shared_task(base=JobTask, bind=True)
def hold_then_retry(self, gate):
    note(self, "start")
    wait_for(gate)
    if not self.request.retries:
        raise self.retry(countdown=0)


@shared_task(base=JobTask, bind=True, time_limit=2)
def hold_too_long(self, gate):
    note(self, "start")
    wait_for(gate)


@shared_task(base=JobTask, bind=True)
def quick(self):
    note(self, "start")


@shared_task(base=JobTask, bind=True)
def die(self):
    note(self, "start")
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(base=JobTask, bind=True, autoretry_for=(Error,), default_retry_delay=1, max_retries=99)
def write(self, number, seconds):
    """What a body should be: safe to repeat, and repeated when the database is away."""
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO written VALUES (%s) ON CONFLICT DO NOTHING", [number])
    connection.close()
    note(self, "start")
    time.sleep(float(seconds))


@shared_task(bind=True)
def plain(self, gate):
    note(self, "start")
    wait_for(gate)
    note(self, "end")
