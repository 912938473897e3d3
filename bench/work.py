"""The work that all contestants do."""

import time
from contextlib import suppress

from celery import shared_task


def work(path, seconds=0, rounds=0):
    """Wait, compute, and write down from when to when."""
    began = time.time()
    time.sleep(seconds)
    sum(number * number for number in range(rounds))
    with open(path, "a") as file:
        file.write(f"{began} {time.time()}\n")


plain = shared_task(name="work.plain")(work)
with suppress(ImportError):  # bare Celery has no jobs
    from jobs.tasks import JobTask

    job = shared_task(name="work.job", base=JobTask)(work)
