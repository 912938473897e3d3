"""Tasks that wait, die or fail when a test of faults needs it."""

import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from itertools import repeat
from pathlib import Path

from asgiref.sync import sync_to_async
from celery import current_task, shared_task
from celery.exceptions import Retry
from django.db import Error, connection, transaction
from django_tasks import task

from durable_jobs.models import Job
from durable_jobs.tasks import JobTask

from . import limited  # noqa: F401  workers then know its tasks

logger = logging.getLogger(__name__)


def note(task, what):
    note_id(what, task.request.id)


def note_id(what, id):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{what} {id} {os.getpid()}\n")


def wait_for(gate):
    """Wait until this file exists, or the one with the id of this process."""
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


@shared_task(base=JobTask, bind=True)
def log_and_retry(self, gate):
    note(self, "start")
    logger.warning("the body says %s", self.request.id)
    wait_for(gate)
    if not self.request.retries:
        raise self.retry(countdown=0)
    read.delay(self.request.id)


@shared_task(base=JobTask, bind=True, time_limit=2)
def hold_too_long(self, gate):
    note(self, "start")
    wait_for(gate)


@shared_task(base=JobTask, bind=True, time_limit=60, soft_time_limit=10)
def hold_softly(self, gate, error=""):
    note(self, "start")
    wait_for(gate)
    if error:
        raise ValueError(error)


@shared_task(base=JobTask, bind=True, autoretry_for=(Error,), default_retry_delay=1, max_retries=99)
def hold_its_row(self, gate):
    note(self, "start")
    with transaction.atomic():
        self.report(50, cursor=1)
        wait_for(gate)


@shared_task(base=JobTask, bind=True)
def commit_slowly(self, times, seconds):
    """Run long transactions that lock the job's own row."""
    note(self, "start")
    for done in range(int(times)):
        with transaction.atomic():
            self.report(done, int(times), cursor=done)
            time.sleep(float(seconds))
        time.sleep(1.5)  # time for the sweep to check its lease


@shared_task(base=JobTask, bind=True)
def count(self, gate):
    """Store a cursor every 50 ms."""
    note(self, "start")
    number = self.cursor or 0
    while not (number and Path(gate).exists()):
        number += 1
        self.report(0, cursor=number)
        time.sleep(0.05)
    return [number, self.cursor]


def write_chunk(task, chunk):
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO chunks VALUES (%s, %s)", [task.request.id, chunk])
    time.sleep(0.02)
    task.report(chunk, cursor=chunk + 1)


@shared_task(base=JobTask, bind=True)
def write_chunks(self, gate, in_block=""):
    """Write a row for each chunk, and a cursor after it or in the same transaction."""
    note(self, "start")
    chunk = self.cursor or 0
    while not Path(gate).exists():
        with transaction.atomic() if in_block else nullcontext():
            write_chunk(self, chunk)
        chunk += 1
    return chunk


@shared_task(base=JobTask, bind=True)
async def write_chunks_in_a_coroutine(self, gate):
    note(self, "start")
    chunk = self.cursor or 0
    while not Path(gate).exists():
        await sync_to_async(write_chunk)(self, chunk)
        chunk += 1
    return chunk


@shared_task(base=JobTask, bind=True)
def terminate(self):
    note(self, "start")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@shared_task(base=JobTask, bind=True)
def hold_the_interpreter(self, seconds):
    """Hold the GIL, as a long computation in C does."""
    note(self, "start")
    ctypes.PyDLL(None).sleep(int(seconds))


@shared_task(base=JobTask, bind=True)
def block(self, seconds):
    """Hold the GIL, and note when it is free again."""
    note(self, "start")
    ctypes.PyDLL(None).sleep(int(seconds))
    note(self, "end")


@shared_task(base=JobTask, bind=True, time_limit=60, soft_time_limit=1)
def rest_softly(self, seconds):
    time.sleep(float(seconds))


@shared_task(
    base=JobTask,
    bind=True,
    time_limit=600,
    soft_time_limit=1,
    autoretry_for=(Error,),  # for chaos, which restarts the database
    default_retry_delay=1,
    max_retries=99,
)
def query_too_long(self, in_block=""):
    note(self, "start")
    with transaction.atomic() if in_block else nullcontext(), connection.cursor() as cursor:
        self.report(1, cursor=1)  # in a transaction it locks the job's row
        cursor.execute("SELECT pg_sleep(600)")


@shared_task(base=JobTask, bind=True, time_limit=2)
def report_too_long(self):
    note(self, "start")
    try:
        while True:
            self.report(1)
            time.sleep(0.05)
    finally:
        note(self, "end")


@shared_task(base=JobTask)
def tick():
    """Beat starts this job."""


def note_call(request, name, pages):
    """Note what Beat has passed on, for the tests of schedules."""
    queue, expires = request.delivery_info["routing_key"], bool(request.expires)
    with open(f"{os.environ['NOTES']}-of-calls", "a") as file:
        file.write(json.dumps([name, pages, queue, expires]) + "\n")


@shared_task(base=JobTask, bind=True)
def scheduled_job(self, name, pages):
    note_call(self.request, name, pages)


@shared_task(bind=True)
def scheduled_plain(self, name, pages):
    note_call(self.request, name, pages)


@task
def scheduled_function(name, pages):
    note_call(current_task.request, name, pages)


@shared_task(base=JobTask, bind=True)
def quick(self):
    note(self, "start")


@shared_task(base=JobTask, bind=True)
def step(self, *queues):
    """Enqueue the next step in the first of these queues."""
    note(self, "start")
    if queues:
        self.enqueue_next(step, queues[1:], queue=queues[0])


@shared_task(base=JobTask, bind=True)
def retry_in_a_transaction(self):
    note(self, "start")
    if not self.request.retries:
        with transaction.atomic():
            raise self.retry(countdown=0.1)


@shared_task(
    base=JobTask, bind=True, autoretry_for=(OSError,), default_retry_delay=0, max_retries=1
)
def fail_twice(self):
    raise OSError("away")


@shared_task(base=JobTask, bind=True)
def fail_and_continue(self):
    try:
        if not self.request.retries:
            raise OSError("away")
    except OSError:
        self.retry(countdown=0, throw=False)


@shared_task(base=JobTask, bind=True)
def retry_after(self, seconds):
    note(self, "start")
    raise self.retry(countdown=float(seconds))


@shared_task(base=JobTask, bind=True)
def set_session(self, setting):
    note(self, "start")
    connection.cursor().execute(f"SET {setting}")


@shared_task(base=JobTask, bind=True)
def report_in_a_thread(self):
    """Return the exceptions that were raised."""
    calls = [lambda: self.report(1), lambda: self.report(1, cursor=1), lambda: self.cursor]
    with ThreadPoolExecutor(1) as thread:
        return [repr(thread.submit(call).exception()) for call in calls]


@shared_task(base=JobTask, bind=True)
def read(self, text):
    note(self, "start")


@shared_task(base=JobTask, bind=True)
def rest(self, seconds):
    note(self, "start")
    time.sleep(float(seconds))


@shared_task(base=JobTask, bind=True)
def die(self, seconds=0):
    note(self, "start")
    time.sleep(float(seconds))
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(base=JobTask, bind=True, autoretry_for=(Error,), default_retry_delay=1, max_retries=99)
def write(self, number, seconds, then=()):
    """Write a number, and those in `then` in next jobs.

    Correct: safe to repeat, and retried when the database is unavailable.
    """
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO written VALUES (%s) ON CONFLICT DO NOTHING", [number])
    connection.close()
    note(self, "start")
    time.sleep(float(seconds))
    if then:
        self.enqueue_next(write, [then[0], seconds, then[1:]])


@shared_task(bind=True, default_retry_delay=1)  # also after its child was lost
def plain(self, gate):
    note(self, "start")
    wait_for(gate)
    note(self, "end")


@shared_task(bind=True, default_retry_delay=0, max_retries=2)
def die_plainly(self):
    note(self, "start")
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(bind=True)
def compute(self):
    """Compute forever in C, so that no signal handler of Python runs."""
    note(self, "start")
    max(repeat(1))


@shared_task(bind=True)
def kill_worker(self, gate):
    """Kill the worker with all its children, until the gate exists."""
    note(self, "start")
    if not Path(gate).exists():
        os.killpg(0, signal.SIGKILL)


@shared_task(bind=True)
def circle(self, gate, seconds):
    """Send this task again and again, until the gate exists."""
    time.sleep(float(seconds))
    if not Path(gate).exists():
        self.delay(gate, seconds)


@shared_task(base=JobTask, bind=True, queue="io")
def declared(self):
    note(self, "start")


@shared_task(base=JobTask, bind=True)
def routed(self):
    note(self, "start")


if "OLD_CODE" not in os.environ:

    @shared_task(base=JobTask, bind=True)
    def new(self):
        note(self, "start")


# Django's own Tasks


@task
def add(a, b):
    return a + b


@task
def look_up(word):
    raise LookupError(word)


@task(takes_context=True, queue_name="cpu")
def hold_a_function(context, gate):
    note_id("start", context.task_result.id)
    wait_for(gate)


@task(takes_context=True, queue_name="cpu")
async def hold_a_coroutine(context, gate):
    note_id("start", context.task_result.id)
    while not Path(gate).exists():
        await asyncio.sleep(0.05)
    return await Job.objects.filter(pk=context.task_result.id).acount()


# Coroutines that are jobs


@shared_task(base=JobTask, bind=True)
async def report_in_a_coroutine(self, gate):
    note(self, "start")
    try:
        while not Path(gate).exists():
            self.report(1, 2, "waits")
            await asyncio.sleep(0.05)
    finally:
        note(self, "end")


@shared_task(base=JobTask, bind=True, time_limit=3, soft_time_limit=2)
async def wait_too_long(self, gate):
    note(self, "start")
    try:
        while not Path(gate).exists():
            await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        note(self, "cancelled")
        raise
    note(self, "end")


# Bodies with an unusual end


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def nested(levels):
    result = []
    for _ in range(levels):
        result = [result]
    return result


@shared_task(base=JobTask, bind=True)
def raise_mute(self):
    note(self, "start")
    raise Mute


@shared_task(base=JobTask, bind=True)
def raise_retry(self):
    note(self, "start")
    raise Retry("by hand")


@shared_task(base=JobTask, bind=True)
def retry_with_an_object(self):
    note(self, "start")
    raise self.retry(args=[object()])


@shared_task(base=JobTask, bind=True)
def retry_in_a_queue_with_a_long_name(self):
    note(self, "start")
    raise self.retry(queue="q" * 300)


@shared_task(base=JobTask)
def raise_at_length(length):
    raise ValueError("x" * int(length))


@shared_task(base=JobTask)
def return_at_length(length):
    return "x" * int(length)


@shared_task(base=JobTask, bind=True)
def return_nested(self):
    note(self, "start")
    return nested(100_000)


@shared_task(base=JobTask, bind=True)
def return_what_no_database_takes(self):
    """Return JSON that Python can write but PostgreSQL's limits refuse, as they refuse 256 MB."""
    note(self, "start")
    sys.setrecursionlimit(40_000)
    return nested(30_000)


@shared_task(base=JobTask, bind=True)
def leave_a_transaction(self):
    note(self, "start")
    transaction.set_autocommit(False)
    connection.cursor().execute("SELECT 1")


@shared_task(base=JobTask, bind=True)
def leave_an_aborted_transaction(self):
    note(self, "start")
    transaction.set_autocommit(False)
    with suppress(Error):
        connection.cursor().execute("INSERT INTO written VALUES (-1), (-1)")
