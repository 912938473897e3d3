"""Jobs that wait, die or fail when a test of faults needs it."""

import asyncio
import ctypes
import fcntl
import itertools
import logging
import os
import signal
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

from celery import current_task, shared_task
from django.db import Error, connection, transaction
from django_tasks import task
from trials.tasks import note, wait_for

from durable_jobs.models import Job
from durable_jobs.tasks import job

logger = logging.getLogger(__name__)


@job
def run(self, code):
    """Run code with the names of this module, and return its `result`."""
    note(self.request.id, "start")
    names = {**globals(), "self": self, "result": None}
    exec(code, names)
    return names["result"]


@job
def hold(self, gate):
    note(self.request.id, "start")
    wait_for(gate)
    note(self.request.id, "end")
    return os.getpid()


@job
def hold_then_retry(self, gate, then=""):
    note(self.request.id, "start")
    logger.warning("the function says %s", self.request.id)
    wait_for(gate)
    if not self.request.retries:
        raise self.retry(countdown=0)
    if then:
        read.delay(self.request.id)


@job(time_limit=2)
def hold_too_long(self, gate, reports=""):
    note(self.request.id, "start")
    try:
        while not Path(gate).exists():
            if reports:
                self.report(1)
            time.sleep(0.05)
    finally:
        note(self.request.id, "end")


@job(time_limit=60, soft_time_limit=10)
def hold_softly(self, gate, error=""):
    note(self.request.id, "start")
    wait_for(gate)
    if error:
        raise ValueError(error)


@job(autoretry_for=(Error,), default_retry_delay=1, max_retries=99)
def hold_its_row(self, gate):
    note(self.request.id, "start")
    with transaction.atomic():
        self.report(50, cursor=1)
        wait_for(gate)


@job
def count(self, gate):
    """Store a cursor every 50 ms."""
    note(self.request.id, "start")
    number = self.cursor or 0
    while not (number and Path(gate).exists()):
        number += 1
        self.report(0, cursor=number)
        time.sleep(0.05)
    return [number, self.cursor]


@job
def write_chunks(self, gate):
    """Write a row for each chunk, and a cursor after it."""
    note(self.request.id, "start")
    chunk = self.cursor or 0
    while not Path(gate).exists():
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO chunks VALUES (%s, %s)", [self.request.id, chunk])
        time.sleep(0.02)
        self.report(chunk, cursor=chunk + 1)
        chunk += 1
    return chunk


@job
def walk(self, point):
    """Take three steps, of which one writes a row. The first run is killed at this point."""
    job = Job.objects.get(pk=self.request.id)
    note(self.request.id, "start", *job.steps)
    points = itertools.count(1)

    def pass_point():
        if next(points) == point and not job.crashes:
            os.kill(os.getpid(), signal.SIGKILL)

    def call(name):
        pass_point()
        note(self.request.id, "call", name)
        pass_point()
        return [name]

    def write(name):
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO chunks VALUES (%s, %s)", [self.request.id, name])
        return call(name)

    def query(execute, *args):
        pass_point()
        answer = execute(*args)
        pass_point()
        return answer

    with connection.execute_wrapper(query):
        return [self.step(name, write if name == "1" else call, name) for name in "012"]


@job
def hold_the_interpreter(self, seconds):
    """Hold the GIL, as a long computation in C does, and note when it is free again."""
    note(self.request.id, "start")
    ctypes.PyDLL(None).sleep(int(seconds))
    note(self.request.id, "end")


@job(
    time_limit=600,
    soft_time_limit=1,
    autoretry_for=(Error,),  # for chaos, which restarts the database
    default_retry_delay=1,
    max_retries=99,
)
def query(self, seconds, in_block=""):
    """Wait for a query, for longer than the soft time limit."""
    note(self.request.id, "start")
    with transaction.atomic() if in_block else nullcontext(), connection.cursor() as cursor:
        self.report(1, cursor=1)  # in a transaction it locks the job's row
        cursor.execute("SELECT pg_sleep(%s)", [float(seconds)])


@job
def tick(self):
    """Beat starts this job."""


def note_call(name, pages):
    """Note what Beat has passed on, for the tests of schedules."""
    request = current_task.request
    queue, expires = request.delivery_info["routing_key"], bool(request.expires)
    note(request.id, "call", name, pages, queue, expires)


@job
def scheduled_job(self, name, pages):
    note_call(name, pages)


@shared_task
def scheduled_plain(name, pages):
    note_call(name, pages)


@task
def scheduled_function(name, pages):
    note_call(name, pages)


@job
def quick(self):
    note(self.request.id, "start")


@job
def read(self, text):
    note(self.request.id, "start")


@job
def rest(self, seconds):
    note(self.request.id, "start")
    time.sleep(float(seconds))


@job
def die(self, seconds=0):
    note(self.request.id, "start")
    time.sleep(float(seconds))
    os.kill(os.getpid(), signal.SIGKILL)


@job
def step(self, *queues):
    """Enqueue the next step in the first of these queues."""
    note(self.request.id, "start")
    if queues:
        self.enqueue_next(step.using(queue=queues[0]).s(*queues[1:]))


@job(autoretry_for=(OSError,), default_retry_delay=0, max_retries=1)
def fail_twice(self):
    raise OSError("away")


@job(autoretry_for=(Error,), default_retry_delay=1, max_retries=99)
def write(self, number, seconds, then=()):
    """Write a number, and those in `then` in next jobs.

    Correct: safe to repeat, and retried when the database is unavailable.
    """
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO written VALUES (%s) ON CONFLICT DO NOTHING", [number])
    connection.close()
    note(self.request.id, "start")
    time.sleep(float(seconds))
    if then:
        self.enqueue_next(write.s(then[0], seconds, then[1:]))


@job(queue="io")
def declared(self):
    note(self.request.id, "start")


@job
def routed(self):
    note(self.request.id, "start")


if "OLD_CODE" not in os.environ:

    @job
    def new(self):
        note(self.request.id, "start")


# Coroutines that are jobs


@job
async def report_in_a_coroutine(self, gate):
    note(self.request.id, "start")
    try:
        while not Path(gate).exists():
            self.report(1, 2, "waits")
            await asyncio.sleep(0.05)
    finally:
        note(self.request.id, "end")


@job(time_limit=6, soft_time_limit=2)
async def wait_too_long(self, gate):
    note(self.request.id, "start")
    try:
        while not Path(gate).exists():
            await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        note(self.request.id, "cancelled")
        raise
    note(self.request.id, "end")


# Tasks with limits: see LIMITS in stack.py. Locked files are the witness of how many run at once.

SLOTS = {"one": 1, "two": 2, "tenant": 2}


@contextmanager
def slot(task, limit):
    """Lock one of the limit's files while a function runs. If its process dies, it is unlocked.

    If all are locked, note the jobs that have them.
    """
    holders = []
    for each in range(SLOTS[limit.split(":")[0]]):
        file = os.open(f"{os.environ['NOTES']}-{limit}-{each}", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pwrite(file, task.request.id.encode(), 0)
            break
        except BlockingIOError:
            holders.append(os.pread(file, 36, 0).decode())
            os.close(file)
    else:
        note(task.request.id, "exceeded", limit, *holders)
        yield
        return
    note(task.request.id, "start", limit)
    try:
        yield
    finally:
        note(task.request.id, "end", limit)
        os.close(file)


@job(limit=lambda limit, **_: limit)
def limited(self, limit, gate="/", seconds=0):
    """Report nothing, so that a cancel does not end it."""
    with slot(self, limit):
        wait_for(gate)
        time.sleep(float(seconds))
