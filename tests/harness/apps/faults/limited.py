"""Tasks with limits. Locked files are the witness of how many bodies run at once."""

import fcntl
import os
import time
from contextlib import contextmanager
from pathlib import Path

from celery import shared_task

from durable_jobs import batches
from durable_jobs.tasks import JobTask


def note_body(kind, task, key, *holders):
    """Append a line to the file of all bodies. It has the same clock in all processes."""
    line = " ".join([kind, key, task.request.id, str(time.time()), *holders]) + "\n"
    with open(f"{os.environ['NOTES']}-of-bodies", "a") as file:
        file.write(line)


@contextmanager
def place(task, key, number):
    """Lock one of `number` files while a body runs. The kernel releases it if the process dies.

    If all are locked, note the jobs that have them.
    """
    holders = []
    for each in range(number):
        file = os.open(f"{os.environ['NOTES']}-{key}-{number}-{each}", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pwrite(file, task.request.id.encode(), 0)
            break
        except BlockingIOError:
            holders.append(os.pread(file, 36, 0).decode())
            os.close(file)
    else:
        note_body("exceeded", task, key, *holders)
        yield
        return
    note_body("start", task, key)
    try:
        yield
    finally:
        note_body("end", task, key)
        os.close(file)


@shared_task(base=JobTask, bind=True, limit=lambda key, **_: f"one:{key}")
def one(self, key, seconds):
    with place(self, key, 1):
        time.sleep(float(seconds))


@shared_task(base=JobTask, bind=True, limit=lambda key, **_: f"two:{key}")
def two(self, key, seconds):
    with place(self, key, 2):
        time.sleep(float(seconds))


@shared_task(base=JobTask, bind=True, limit=lambda key, **_: f"one:{key}")
def one_until(self, key, gate):
    """Report nothing, so that a cancel does not end it."""
    with place(self, key, 1):
        while not Path(gate).exists():
            time.sleep(0.05)


@shared_task(base=JobTask, bind=True, limit=lambda key, **_: f"one:{key}")
def report_until(self, key, gate):
    """Write a line after each report. It takes no lock: a frozen body would keep it."""
    note_body("start", self, key)
    try:
        while not Path(gate).exists():
            self.report(1)
            note_body("reported", self, key)
            time.sleep(0.05)
    finally:
        note_body("end", self, key)


@shared_task(base=JobTask, bind=True, limit=lambda key, **_: f"rate:{key}")
def rated(self, key):
    note_body("start", self, key)


# An API that takes 5 calls a second, at most 2 at once for each tenant: see LIMITS in stack.py


@shared_task(base=JobTask, bind=True, limit=lambda tenant_id, **_: f"tenant:{tenant_id}")
def call_api(self, tenant_id, contact_id):
    with place(self, tenant_id, 2):
        time.sleep(0.1)
    return contact_id


@shared_task(base=JobTask, bind=True)
def summarize(self, tenant_id):
    note_body("summary", self, tenant_id)


def call_all(tenant_id, contacts):
    calls = [[tenant_id, contact] for contact in contacts]
    return batches.enqueue(call_api, calls, on_finish=summarize.si(tenant_id))
