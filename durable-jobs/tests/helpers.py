"""What tests of several files use: tasks, steps of a job's life, queries and their plans."""

import os
import re
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from queue import SimpleQueue

import pytest
from celery import current_app, shared_task
from celery.app.task import Context
from celery.app.trace import build_tracer
from django.contrib.admin.models import LogEntry
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from durable_jobs import publish, transitions
from durable_jobs.beat.sweeper import Sweeper
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue
from durable_jobs.exceptions import JobError
from durable_jobs.messages import HEADER
from durable_jobs.models import Job
from durable_jobs.states import ADMITTED, LEASED
from durable_jobs.tasks import JobTask
from durable_jobs.worker.execution import trace
from durable_jobs.worker.runs import Run

try:
    from django.tasks import task
except ImportError:  # Django 5.2
    from django_tasks import task


# One job

CLAIM = {  # arguments of a claim by a job's first message
    "worker": "",
    "retries": 0,
    "crashes": 0,
    "time_limit": timedelta(seconds=60),
    "lease": timedelta(seconds=30),
}


def of_job(**fields):
    """Return the header that marks the first message of a job."""
    return {"durable_job": {"crashes": 0, "limit_key": None, **fields}}


@shared_task(base=JobTask, bind=True)
def add(self, x, y):
    self.report(1, 2, "adding")
    return x + y


@shared_task(base=JobTask, bind=True)
def act(self):
    return act.function(self)


def run(function):
    """Enqueue and run a job that calls function(task). Return the job as it is afterwards."""
    act.function = function
    return deliver(enqueue(act))


def deliver(job):
    publish.publish([job])
    job.refresh_from_db()
    return job


def receive(task, headers, args=()):
    """Let a task handle a message with these headers as a worker's process does. Return what Celery gets."""
    tracer = build_tracer(task.name, task, app=current_app)
    return trace(task, tracer, headers["id"], args, {}, {"hostname": "here", **headers})


def claim_and_lapse(job, limit=60):
    """Claim the job for a worker that then disappears."""
    message = {"retries": job.retries, "crashes": job.crashes}
    assert claim(job.pk, time_limit=timedelta(seconds=limit), **message)
    lapse(job)


def claim(pk, run=None, **message):
    """Claim a job with a message that has these fields. Return what claim() returns."""
    return transitions.claim(id=pk, run_token=run or uuid.uuid4(), **CLAIM | message)


def run_of(job):
    """Return a Run of this job, as a worker has it that got a message of the job now."""
    header = {"crashes": job.crashes, "batch": job.batch_id, "limit_key": job.limit_key}
    request = Context(id=job.pk, hostname="", retries=job.retries, **{HEADER: header})
    return Run(current_app.tasks[job.task], request)


def requeue(jobs, seconds=0, **changes):
    """Queue these jobs again, whatever their states are. Returns how many."""
    due = Now() + timedelta(seconds=seconds)
    fields = {**transitions.NEXT_RUN, "blocked_by": None}
    return jobs.update(**{**fields, "due_at": due, "send_at": due, **changes})


def runs_on(seconds=30):
    """Return the fields of a running job whose lease ends in so many seconds."""
    fields = {"state": "running", "run_token": uuid.uuid4(), "send_at": None}
    return {**fields, "lease_ends_at": Now() + timedelta(seconds=seconds)}


def finish(jobs, state, **changes):
    """End these jobs. Returns how many."""
    cleared = dict.fromkeys(["run_token", "send_at", "lease_ends_at", "blocked_by"])
    return jobs.update(**cleared, state=state, finished_at=Now(), **changes)


def lapse(*jobs):
    """Make these jobs due for the sweeper, in this order."""
    for index, job in enumerate(jobs):
        past = Now() - timedelta(seconds=1000 - index)
        rows = Job.objects.filter(pk=job.pk)
        rows.filter(ADMITTED).update(send_at=past) or rows.filter(LEASED).update(lease_ends_at=past)


def messages_unless(name, error):
    """Return a messages_in() that raises this error for the queue `name`, and finds the others empty."""

    def messages_in(queue, broker):
        if queue == name:
            raise error
        return 0

    return messages_in


def seconds_until_due(job):
    job.refresh_from_db()
    return ((job.send_at or job.lease_ends_at) - timezone.now()).total_seconds()


def call_concurrently(count, function):
    """Call a function in `count` threads at once, each with its own connection. Return a list."""
    barrier = threading.Barrier(count)

    def call(number):
        try:
            connection.ensure_connection()
            barrier.wait(20)
            return function()
        finally:
            connection.close()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def errors(job):
    return [failure.error for failure in job.failures.all()]


def run_while_open(change, function):
    """Call change() in a transaction that ends when function(), in another one, waits for it.

    Return what function() returns.
    """
    pids = SimpleQueue()

    def call():
        connection.ensure_connection()
        pids.put(connection.connection.info.backend_pid)
        try:
            return function()
        finally:
            connection.close()

    with ThreadPoolExecutor() as threads:
        with transaction.atomic(), connection.cursor() as cursor:
            change()
            called, waits = threads.submit(call), None
            pid = pids.get(timeout=60)
            while not (waits or called.done()):
                time.sleep(0.01)
                cursor.execute("SELECT pg_blocking_pids(%s) <> '{}'", [pid])
                [waits] = cursor.fetchone()
        return called.result(60)


def enqueue_and_publish(count):
    jobs = [enqueue(add, [1, 2]) for _ in range(count)]
    for job in jobs:
        publish.publish([job])
    return jobs


def seconds_waited(job):
    job.refresh_from_db()
    return (timezone.now() - job.due_at).total_seconds()


# Celery's canvas, batches


@shared_task(base=JobTask)
def total(numbers):
    return sum(numbers)


@shared_task(base=JobTask)
def echo(*args, **kwargs):
    return [*args, *sorted(kwargs.items())]


@shared_task
def plain(*args):
    pass


@task
def double(x):
    return 2 * x


@shared_task(base=JobTask, bind=True)
def retry_once(self, *args):
    if not self.request.retries:
        raise self.retry()
    return [type(arg).__name__ for arg in args]


broken = set()  # the numbers for which work() fails


@shared_task(base=JobTask)
def work(n):
    if n in broken:
        raise JobError("broken")
    return n


@shared_task(base=JobTask)
def collect(*args):
    return list(args)


def failed(**fields):
    """Return a job that failed in its third try, after a crash."""
    fields = {"task": work.name, "args": [1], "queue": "celery", **fields}
    fields |= {"state": "failed", "retries": 2, "crashes": 1, "error": "no", "public_error": "no"}
    fields |= {"finished_at": timezone.now(), "started_at": timezone.now(), "message": "Row 7"}
    return Job.objects.create(**fields)


def follow(batch):
    """Return the results of what this batch has started."""
    batch.refresh_from_db()
    return list(Job.objects.filter(follows=batch.pk).values_list("result", flat=True))


# Limits


@shared_task(base=JobTask, limit=lambda tenant, **_: f"tenant:{tenant}")
def call(tenant, number=0):
    return number


@shared_task(base=JobTask, limit="one")
def alone(number=0):
    return number


@shared_task(base=JobTask, limit="api")
def ask(number=0):
    return number


@shared_task(base=JobTask)
def free(number=0):
    return number


def start(job):
    """Claim a job as a worker does. Returns its Run."""
    run = run_of(job)
    assert run.claim()
    return run


def end(run, result=None):
    with run:
        run.succeed(result)


# Beat

sweeper = Sweeper(tick_delay=lambda: 0)  # each test gets a new one

# Races, with threads and real transactions

ROUNDS = int(os.environ.get("ROUNDS", 150))


def race(rounds, *functions):
    """Call these functions with each number, all at once, each in a thread with its own connection.

    Returns, for each function, the list of what it returned.
    """
    barrier = threading.Barrier(len(functions))

    def call(function):
        try:
            connection.ensure_connection()
            return [barrier.wait(20) and None or function(number) for number in range(rounds)]
        except BaseException:
            barrier.abort()
            raise
        finally:
            connection.close()

    with ThreadPoolExecutor(len(functions)) as threads:
        futures = [threads.submit(call, function) for function in functions]
    errors = [error for each in futures if (error := each.exception())]
    # When one thread fails, the others have a BrokenBarrierError.
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [each.result() for each in futures]


def in_thread(function):
    [[result]] = race(1, lambda _: function())
    return result


def beside_locked(job, function):
    """Call a function while another transaction locks this job. It may wait two seconds for the lock."""
    if not connection.features.has_select_for_update_skip_locked:
        pytest.skip("only PostgreSQL locks rows: set DATABASE_URL=postgres://…")

    def call():
        connection.cursor().execute("SET lock_timeout = '2s'")
        function()

    with transaction.atomic():
        Job.objects.select_for_update().get(pk=job.pk)
        in_thread(call)


def succeed_run(run):
    run.succeed(1)


def fail_run(run):
    try:
        raise JobError("no")
    except JobError:
        run.fail()


# Queries and plans


def queries(function, *args):
    """Return the SQL of each query, without quotes."""
    with CaptureQueriesContext(connection) as captured:
        function(*args)
    return [query["sql"].replace('"', "") for query in captured]


def multiply(row, count, **columns):
    """Store so many copies of a row, on PostgreSQL, much faster than bulk_create().

    `columns` are SQL, in which n is the number of the copy, from 1.
    """
    values = {field.column: f'"{field.column}"' for field in row._meta.concrete_fields}
    names, table = ", ".join(values.values()), row._meta.db_table
    new = ", ".join((values | {"id": "gen_random_uuid()"} | columns).values())
    sql = f"INSERT INTO {table} ({names}) SELECT {new} FROM {table}, generate_series(1, %s) AS n"  # noqa: S608
    with connection.cursor() as cursor:
        cursor.execute(f"{sql} WHERE id = %s", [count, row.pk])


def kinds(statements):
    """Return the first word of each statement, without those of transactions."""
    words = [sql.split()[0] for sql in statements]
    return [word for word in words if word not in ("SAVEPOINT", "RELEASE", "BEGIN", "COMMIT")]


def rows_read(sql):
    """Return the highest number of rows that a node of the plan read or removed."""
    plan = explain(sql)
    counts = re.findall(r"rows=(\d+)\S* loops=(\d+)", plan)
    nodes = [int(rows) * int(loops) for rows, loops in counts]
    removed = [int(rows) for rows in re.findall(r"Rows Removed by \w+: (\d+)", plan)]
    assert "Seq Scan on durable_jobs_job" not in plan, plan
    return max([*nodes, *removed])


def explain(sql):
    with connection.cursor() as cursor:
        cursor.execute("SAVEPOINT explained")
        cursor.execute(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {sql}")
        plan = "\n".join(line for (line,) in cursor.fetchall())
        cursor.execute("ROLLBACK TO SAVEPOINT explained")
    return plan


# What people and programs see

JOBS = "/admin/durable_jobs/job/"


@shared_task(base=JobTask)
def count():
    """Another task."""


@shared_task(base=JobTask, bind=True)
def greet(self, name="you"):
    return f"Hello {name}"


@shared_task(base=JobTask)
def fail():
    raise ValueError("<b>no</b>")


def listed(client, query="", url=JOBS):
    """Return the jobs of a list."""
    response = client.get(f"{url}?{query}")
    assert response.status_code == 200
    return list(response.context["cl"].result_list)


def ids(response):
    assert response.status_code == 200
    return [job["id"] for job in response.json()["results"]]


def logged():
    """Return who did what."""
    entries = LogEntry.objects.order_by("pk")
    return [(entry.user.username, entry.get_change_message()) for entry in entries]


def counting_queries(function, *args):
    with CaptureQueriesContext(connection) as captured:
        function(*args)
    return [query["sql"] for query in captured if "COUNT(" in query["sql"]]


def scrape(client):
    """Return the samples of GET /metrics that are not 0, as {name and labels: value}."""
    response = client.get("/metrics")
    assert response.status_code == 200
    found = {}
    for line in response.content.decode().splitlines():
        name, *labels, value = re.split('[{}",= ]+', line)
        if name != "#" and float(value):
            found[" ".join([name, *labels[1::2]])] = float(value)
    return found


def ago(seconds):
    return Now() - timedelta(seconds=seconds)
