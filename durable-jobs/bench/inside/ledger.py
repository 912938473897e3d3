"""Measurements that only an output has: those of its ledger, the table of jobs."""

import time
import uuid
from base64 import b64encode
from datetime import timedelta
from statistics import median
from urllib.parse import urlencode

from celery import current_app
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from sending import empty, rate, seconds_of
from users.models import User
from work_tasks import job as task
from work_tasks import plain

from durable_jobs.actions import cancel
from durable_jobs.beat import purge
from durable_jobs.beat.republish import Sender
from durable_jobs.beat.sweeper import recover_lapsed
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job, Sweep
from durable_jobs.transitions import claim, succeed

LATER = 10**6  # seconds
# What a worker claims a job with, besides its id and the token
CLAIM = {"worker": "celery@worker", "retries": 0, "crashes": 0}
CLAIM |= {"time_limit": timedelta(seconds=600), "lease": timedelta(seconds=30)}


def parts(count):
    """Return [INSERTs of a row, publishes of its message, both in turn] a second, measured twice.

    First with bare SQL and Kombu, then with Django's create() and Celery's apply_async().
    """
    job = job_for_later("parts")
    row = Job.objects.filter(pk=job.pk).values().get()
    message = current_app.amqp.create_task_message(str(job.pk), job.task, job.args, job.kwargs)
    options = {"routing_key": "parts", "headers": message.headers, **message.properties}
    with connection.cursor() as cursor, current_app.producer_or_acquire() as producer:
        cursor.execute("SELECT * FROM durable_jobs_job WHERE id = %s", [job.pk])
        [[_, *values]], names = (
            cursor.fetchall(),
            [f'"{column.name}"' for column in cursor.description],
        )
        places = ", ".join("%s" for _ in names)
        statement = f"INSERT INTO durable_jobs_job ({', '.join(names)}) VALUES ({places})"
        current_app.amqp.queues["parts"](producer.channel).declare()

        def insert():
            cursor.execute(statement, [uuid.uuid4(), *values])

        def publish():
            producer.publish(message.body, exchange="", serializer="json", **options)

        def create():
            Job.objects.create(**row | {"id": uuid.uuid4()})

        def delay():
            plain.apply_async(job.args, queue="parts")

        rates = []
        for store, send in [(insert, publish), (create, delay)]:
            send()  # connects
            calls = [()] * count
            alone = rate(store, calls), rate(send, calls)
            rates.append([*alone, rate(lambda: (store(), send()), calls)])  # noqa: B023
        return rates


def claims(waiting, count):
    """Return how many jobs a second are claimed while `waiting` jobs wait.

    The planner's statistics are those of an idle hour and do not count these jobs. Jobs that this
    does not claim keep waiting.
    """
    empty("job")
    finished(100)
    sql("ALTER TABLE durable_jobs_job SET (autovacuum_enabled = off)", "ANALYZE durable_jobs_job")
    copies(job_for_later("later"), waiting)
    jobs = list(Job.objects.filter(queue="later").order_by("?").values_list("pk")[:count])
    return rate(lambda pk: claim(id=pk, run_token=uuid.uuid4(), **CLAIM), jobs)


def statements():
    """Return the three statements of a job as a script for pgbench, of another job each time."""
    token = uuid.uuid4()
    with CaptureQueriesContext(connection) as captured:
        job = enqueue(task, ["-", 0, 0], queue="pgbench")
        key = {"id": job.pk, "run_token": token}
        assert claim(**key, **CLAIM)
        assert succeed(**key, result={"sent": 1}, message="Sent")
    Job.objects.filter(pk=job.pk).delete()
    script = ";\n".join(query["sql"] for query in captured.captured_queries) + ";\n"
    assert len(captured) == 3, script
    for value in job.pk, token:
        script = script.replace(f"'{value.hex}'", "lpad(to_hex(:id::bigint), 32, '0')")
    return f"\\set id random(1, {2**62})\n{script}"


def sweep_due(count, queues):
    """Return how many jobs a second the sweep sends after an outage, from this many queues."""
    empty("job")
    queue, due = f"'due' || n % {queues}", "now() - interval '1 second'"
    copies(job_for_later("later"), count, queue=queue, send_at=due, created_at=due)
    began, sender = time.perf_counter(), Sender()
    while Job.objects.filter(times_sent=0, queue__startswith="due").exists():
        sender.send_due()
        recover_lapsed()
    seconds = time.perf_counter() - began
    assert Job.objects.filter(times_sent=1, queue__startswith="due").count() == count
    return count / seconds


def pages(count):
    """Return the ms of each page with `count` finished jobs, and how many are purged a second."""
    fill(count)
    owner = User.objects.get(username="owner")
    newest = Job.objects.filter(owner=owner).order_by("-created_at")
    position = urlencode({"p": newest[int(count * 0.9)].created_at})
    client = Client(SERVER_NAME="127.0.0.1")
    client.force_login(owner, "django.contrib.auth.backends.ModelBackend")

    def get(url):
        answer = client.get(url, secure=True)
        assert answer.status_code == 200 and b"work.job" in answer.content, answer.content

    taken = []
    for url in [
        "/api/jobs/",
        "/api/jobs/?state=failed",
        f"/api/jobs/?cursor={b64encode(position.encode()).decode()}",
        "/admin/durable_jobs/job/",
        f"/admin/durable_jobs/job/?q={newest[count // 2].pk}",
    ]:
        seconds = [seconds_of(get, url) for _ in range(23)]
        taken.append(median(seconds[3:]) * 1000)  # the first three compile and connect
    Sweep.objects.all().delete()  # else no job is deleted before Beat has counted it
    rounds = sum(map(seconds_of, [purge.of_jobs().delete_page] * 3))
    return taken, (count - newest.count()) / rounds


def fill(count):
    """Make a table with `count` finished jobs of the user "owner"."""
    empty("job")
    User.objects.filter(username="owner").delete()
    finished(count, User.objects.create_superuser("owner"))
    sql(
        "ALTER TABLE durable_jobs_job RESET (autovacuum_enabled)", "VACUUM ANALYZE durable_jobs_job"
    )


def job_for_later(queue, **options):
    """Enqueue a job that has no message yet."""
    return enqueue(task, ["-", 0, 0], queue=queue, countdown=LATER, **options)


def finished(count, owner=None):
    """Insert jobs that ended in the last sixty days; one in ten failed."""
    job = job_for_later("celery", owner=owner)
    cancel(type(job).objects.filter(pk=job.pk))
    age = f"now() - n * interval '60 days' / {count}"
    state = "CASE WHEN n % 10 = 0 THEN 'failed' ELSE 'succeeded' END"
    copies(job, count, state=state, created_at=age, finished_at=age)
    job.delete()


def copies(job, count, **columns):
    """Insert `count` copies of this job's row; `columns` are SQL, with `n` as the row's number."""
    # In quotation marks, because `then` is a word of SQL.
    values = {field.column: f'"{field.column}"' for field in job._meta.concrete_fields}
    values |= {"id": "gen_random_uuid()", **columns}
    names = ", ".join(f'"{name}"' for name in values)
    sql(
        f"INSERT INTO durable_jobs_job ({names}) SELECT {', '.join(values.values())}"
        f" FROM durable_jobs_job, generate_series(1, {count}) AS n WHERE id = '{job.pk}'"
    )


def sql(*statements):
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
