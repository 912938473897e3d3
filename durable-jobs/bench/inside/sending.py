"""Send the work to each kind of queue."""

import os
import random
import time

NAMES = ["path", "seconds", "rounds"]  # the arguments of work()
WARM_UP = 3


class Plain:
    """Plain tasks of Celery. They have no rows: a task is done when it has written its line."""

    rows, send_many, pause = None, None, 0

    def __init__(self):
        from work_tasks import plain

        self.send = plain.delay


class Job:
    pause = 0

    def __init__(self):
        from work_tasks import job

        from durable_jobs.enqueue import enqueue, enqueue_many
        from durable_jobs.models import Job

        self.rows, self.succeeded = Job.objects, {"state": "succeeded"}
        self.send = lambda *arguments: enqueue(job, arguments).pk
        self.send_many = lambda calls: enqueue_many([job.s(*args) for args in calls])


class Procrastinate:
    pause = 0

    def __init__(self):
        from procrastinate.contrib.django.models import ProcrastinateJob
        from rivals.tasks import procrastinate_task as task

        self.rows, self.succeeded = ProcrastinateJob.objects, {"status": "succeeded"}
        named = lambda arguments: dict(zip(NAMES, arguments, strict=True))  # noqa: E731
        self.send = lambda *arguments: task.defer(**named(arguments))
        self.send_many = lambda calls: task.batch_defer(*map(named, calls))


class DjangoTasks:
    pause = 1  # second: its workers poll once in that time, so send at a random moment of it

    def __init__(self):
        from django.db import transaction
        from django_tasks_db.models import DBTaskResult
        from rivals.tasks import django_task as task

        self.rows, self.succeeded = DBTaskResult.objects, {"status": "SUCCESSFUL"}
        self.send = lambda *arguments: task.enqueue(*arguments).id

        @transaction.atomic  # it has no call for many tasks
        def send_many(calls):
            for arguments in calls:
                self.send(*arguments)

        self.send_many = send_many


KINDS = {"plain": Plain, "job": Job, "procrastinate": Procrastinate, "django-tasks": DjangoTasks}


def send(kind, count, arguments, options):
    """Send `count` tasks one by one, and as many again in bulk if the queue can.

    Returns [tasks, one by one a second, this process's CPU-ms for each, in bulk a second].
    Without a bulk the last is None.
    """
    if options.get("fresh", True):
        empty(kind)
    kind = KINDS[kind]()
    kind.send(*arguments)  # connects
    began = time.process_time()
    one_by_one = rate(kind.send, [arguments] * (count - 1))
    cpu_ms = (time.process_time() - began) * 1000 / (count - 1)
    if not (kind.send_many and options.get("in_bulk", True)):
        return [count, one_by_one, cpu_ms, None]
    in_bulk = count / seconds_of(kind.send_many, [arguments] * count)
    return [2 * count, one_by_one, cpu_ms, in_bulk]


def send_many(kind, count, path, is_swept):
    """Send `count` tasks in one call, perhaps when Beat runs. Return [when it began, seconds]."""
    empty(kind)
    if is_swept:
        from django.utils import timezone

        from durable_jobs.models import Sweep

        started = timezone.now()
        while not Sweep.objects.filter(ended_at__gt=started).exists():
            time.sleep(0.1)
    began, kind = time.time(), KINDS[kind]()
    return began, seconds_of(kind.send_many, [[path, 0, 0]] * count)


def send_each(kind, count, path):
    """Send each task when the previous one is done; return the seconds that each took."""
    kind, taken = KINDS[kind](), []
    for _ in range(WARM_UP + count):
        time.sleep(kind.pause * random.random())
        size, began = os.path.getsize(path), time.perf_counter()
        sent = kind.send(path, 0, 0)
        while not is_done(kind, sent, path, size):
            time.sleep(0.001)
        taken.append(time.perf_counter() - began)
    return taken[WARM_UP:]


def is_done(kind, sent, path, size):
    if kind.rows is None:
        return os.path.getsize(path) > size
    return kind.rows.filter(pk=sent, **kind.succeeded).exists()


def wait_for_rows(kind):
    """Wait until each row has succeeded."""
    kind, until = KINDS[kind](), time.monotonic() + 10
    while kind.rows is not None and kind.rows.exclude(**kind.succeeded).exists():
        assert time.monotonic() < until, list(kind.rows.exclude(**kind.succeeded).values()[:3])


def empty(kind):
    """Delete all rows."""
    if rows := KINDS[kind]().rows:
        from django.db import connection

        connection.cursor().execute(f"TRUNCATE {rows.model._meta.db_table} CASCADE")


def rate(function, calls):
    """Call the function with each of these arguments; return the calls a second."""
    began, done = time.perf_counter(), 0
    for arguments in calls:
        function(*arguments)
        done += 1
    return done / (time.perf_counter() - began)


def seconds_of(function, *arguments):
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began
