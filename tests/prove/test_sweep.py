"""Nothing stops Beat's sweep: neither rows that cannot be deleted, nor huge ones, nor refused jobs.

Real processes, as in test_faults.py, with the same property `seconds`.
"""

import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.faults import POOLS, on_one, stacks, succeeded
from harness.project import wait_for
from harness.stack import RESEND

on_sqs = stacks(brokers=["sqs"], pools=POOLS[:1])
on_rabbitmq = stacks(brokers=["rabbitmq"], pools=POOLS[:1])


def enqueue_many(stack, count, *args, **options):
    code = "result = [job.pk for job in Job.objects.enqueue_many(read, [args] * count, **options)]"
    return stack.ask(code, args=args, count=count, options=options)


# Old jobs


def enqueue_ended(stack, count):
    """Return the ids of `count` jobs that have ended."""
    jobs = enqueue_many(stack, count, "", countdown=99)
    stack.ask("Job.objects.filter(pk__in=jobs).cancel()", jobs=jobs)
    return jobs


def backdate(stack, jobs, **fields):
    """Write that these jobs ended 31 days ago, and set these fields."""
    code = """
ended = Now() - timedelta(days=31)
Job.objects.filter(pk__in=jobs).update(finished_at=ended, **fields)
"""
    stack.ask(code, jobs=jobs, fields=fields)


def remaining(stack, jobs):
    """Return how many of these jobs still have a row."""
    return stack.ask("result = Job.objects.filter(pk__in=jobs).count()", jobs=jobs)


def run_sql(stack, *statements):
    stack.ask("for sql in statements:\n    connection.cursor().execute(sql)", statements=statements)


@contextmanager
def kept(stack, jobs):
    """A model with PROTECT refers to one job, a table unknown to Django refers to another."""
    run_sql(
        stack,
        f"INSERT INTO keeps VALUES ('{jobs[0]}')",
        "CREATE TABLE mentions (job uuid REFERENCES jobs_job DEFERRABLE INITIALLY DEFERRED)",
        f"INSERT INTO mentions VALUES ('{jobs[1]}')",
    )
    try:
        yield
        wait_for(lambda: remaining(stack, jobs) == 2)  # all others are deleted
    finally:
        run_sql(stack, "TRUNCATE keeps", "DROP TABLE mentions")
        stack.beat.stop()
        stack.beat.start()  # and tries these two again now, not in an hour


def locked(stack, jobs):
    """Another transaction locks a row that refers to one of the jobs."""
    stack.ask("Failure.objects.create(job_id=job, started_at=Now())", job=jobs[0])
    return stack.locked(f"SELECT FROM jobs_attempt WHERE job_id = '{jobs[0]}' FOR UPDATE")


@contextmanager
def many(stack, jobs):
    """100,000 other jobs ended earlier, and must be deleted first."""
    copy = """
INSERT INTO jobs_job SELECT (jsonb_populate_record(
    job, jsonb_build_object('id', gen_random_uuid(), 'finished_at', now() - interval '99 days'))).*
FROM jobs_job job, generate_series(1, 100000) WHERE id = %s"""
    run_sql(stack, copy.replace("%s", f"'{jobs[0]}'"))
    stack.beat.stop()
    stack.beat.start()  # and begins with the oldest: it had passed jobs that it could not delete
    try:
        yield
        assert remaining(stack, jobs) == len(jobs)
    finally:
        run_sql(stack, "DELETE FROM jobs_job WHERE finished_at < now() - interval '90 days'")


@contextmanager
def slow(stack, jobs):
    """Each deletion reads the 400,000 rows of a table that refers to jobs without an index."""
    run_sql(stack, "INSERT INTO keeps SELECT FROM generate_series(1, 400000)")
    beat = "FROM pg_stat_activity WHERE query LIKE 'DELETE%' OR query LIKE 'COMMIT%'"
    try:
        yield
        assert remaining(stack, jobs)
    finally:
        run_sql(stack, f"SELECT pg_terminate_backend(pid) {beat}", "TRUNCATE keeps")


@pytest.mark.parametrize("hindered", [kept, locked, many, slow])
@on_one
def test_old_jobs_that_are_hard_to_delete_stop_nothing(stack, gate, since, hindered):
    job = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(job)
    old = enqueue_ended(stack, 2000)
    with hindered(stack, old):
        backdate(stack, old)
        time.sleep(1)  # a round of the sweep
        start = time.monotonic()
        stack.worker.kill()
        [row] = stack.wait_until_final(stack.enqueue("quick", queue="io", countdown=1))
        wait_for(lambda: stack.row(job)["crashes"])
        since(start)
    assert succeeded([row], crashes=0), row
    wait_for(lambda: not remaining(stack, old))
    stack.ask("Job.objects.filter(pk=job).cancel()", job=job)


# Memory


def watch_memory(stack):
    """Restart Beat. Return a function that returns how many megabytes it has needed since."""
    stack.beat.stop()
    stack.beat.start()
    stack.wait_until_final(stack.enqueue("quick", countdown=1))
    Path(f"/proc/{stack.beat.pid}/clear_refs").write_text("5")  # forgets the peak
    idle = stack.beat.peak
    return lambda: stack.beat.peak - idle


@on_one
def test_beat_does_not_load_the_results_that_it_deletes(stack, record_property):
    """1,000 jobs with results of 500 kB."""
    megabytes = watch_memory(stack)
    old = enqueue_ended(stack, 1000)
    backdate(stack, old, result="x" * 500_000)
    wait_for(lambda: not remaining(stack, old))
    record_property("megabytes", megabytes())
    assert megabytes() < 40


LARGE = {  # how many jobs, a field of each, and how many megabytes Beat may need for all
    "cursors": (100, 'cursor="x" * 5_000_000', 40),
    "arguments": (1000, 'args=["x" * 40_000]', 40),
    "large arguments": (20, 'args=[["xy"] * 500_000]', 150),
}


@pytest.mark.parametrize("count, field, limit", LARGE.values(), ids=LARGE)
@on_one
def test_beat_needs_little_memory_for_due_jobs(stack, record_property, count, field, limit):
    """It need not load cursors, which no message has. In Python, arguments of 3 MB need 30 MB."""
    megabytes = watch_memory(stack)
    jobs = enqueue_many(stack, count, "", countdown=99, queue="nobody")
    try:
        stack.ask(f"Job.objects.filter(pk__in=jobs).update(sweep_at=Now(), {field})", jobs=jobs)
        wait_for(lambda: stack.messages_in("nobody") >= count)
    finally:
        stack.ask('Job.objects.filter(queue="nobody").delete()')
        stack.empty("nobody")
    record_property("megabytes", megabytes())
    assert megabytes() < limit


@on_one
def test_a_huge_job_that_was_stored_before_the_limit_fails_without_being_loaded(
    stack, record_property
):
    """Otherwise Beat would end at the 512 MB that it has in Compose, each time it sends the job."""
    megabytes = watch_memory(stack)
    [job] = enqueue_many(stack, 1, "", countdown=99)
    args = "SELECT jsonb_build_array(jsonb_agg(repeat('x', 96))) FROM generate_series(1, 1000000)"
    run_sql(stack, f"UPDATE jobs_job SET args = ({args}), sweep_at = now() WHERE id = '{job}'")
    [row] = stack.wait_until_final(job)
    error = "The arguments have 100,000,004 bytes, but JOB_MAX_BYTES is 16,000,000: pass an id"
    assert (row["state"], row["error"]) == ("failed", error)
    assert stack.beat.is_running()
    record_property("megabytes", megabytes())
    assert megabytes() < 40


# Messages that are lost or refused


@on_one
def test_many_lost_messages_are_noticed_soon_among_plain_tasks(stack, gate, since):
    """The queue always holds more than these 40. One by one they would take 320 s."""
    stack.replace_beat(JOB_RESEND_SECONDS=8)
    stack.ask("for _ in range(90): circle.delay(gate, 0.05)", gate=str(gate))
    start = time.monotonic()
    code = """
from unittest.mock import patch
with patch("jobs.queryset.publish"):
    result = [Job.objects.enqueue(quick).pk for _ in range(40)]
"""
    jobs = stack.ask(code)
    try:
        rows = stack.wait_until_final(*jobs)
        since(start)
        assert stack.messages_in("celery") > 40
    finally:
        gate.touch()
    assert succeeded(rows, crashes=0), rows
    wait_for(lambda: stack.messages_in("celery") == 0)  # so that the next test does not wait


@on_sqs
def test_arguments_too_large_for_the_broker_are_refused_at_enqueue(stack):
    """The broker accepts the largest allowed ones, even with a limit of 256 KiB for a message."""
    limit = """
import boto3
from django.conf import settings
sqs = boto3.client("sqs", endpoint_url=settings.SQS_ENDPOINT, region_name=settings.SQS_REGION)
url = settings.CELERY_BROKER_TRANSPORT_OPTIONS["predefined_queues"]["cpu"]["url"]
sqs.set_queue_attributes(QueueUrl=url, Attributes={"MaximumMessageSize": str(limit)})
"""
    code = """
from django.conf import settings
def enqueue_largest(letter):
    for size in range(2 * settings.JOB_MAX_BYTES // len(json.dumps(letter)), 0, -100):
        try:
            return Job.objects.enqueue(read, [letter * size], queue="cpu").pk
        except ValueError as error:
            assert "JOB_MAX_BYTES" in str(error), error
result = [enqueue_largest(letter) for letter in ["x", "é", "😀", '"']]
"""
    stack.ask(limit, limit=2**18)
    try:
        rows = stack.wait_until_final(*stack.ask(code))
    finally:
        stack.ask(limit, limit=2**20)
    assert succeeded(rows, crashes=0), rows


def store_large(stack, countdown=None):
    """Store 200 jobs, 1 in 20 too large for SQS. Return the ids of these, and of the others."""
    code = """
result = [], []
for number in range(200):
    with transaction.atomic():
        job = Job.objects.enqueue(read, ["x"], queue="cpu", countdown=countdown)
        if is_large := number % 20 == 10:
            job.args = ["x" * 1_200_000]
            job.save(update_fields=["args"])
        result[not is_large].append(job.pk)
"""
    return stack.ask(code, countdown=countdown)


@on_sqs
def test_jobs_that_the_broker_refuses_delay_no_other(stack, since):
    """Neither jobs that are sent at once, without Beat, nor jobs that Beat sends."""
    beat = stack.replace_beat(JOB_MAX_BYTES=10**9)  # it sends them, although they are too large
    beat.pause()
    _, good = store_large(stack)
    rows = stack.wait_until_final(*good)
    _, good = store_large(stack, countdown=1)
    start = time.monotonic()
    beat.resume()
    good.append(stack.enqueue("quick", queue="io", countdown=1))
    rows += stack.wait_until_final(*good)
    since(start)
    assert succeeded(rows, crashes=0), rows
    stack.ask("Job.objects.all().cancel()")


@on_sqs
def test_jobs_that_the_broker_refuses_fail(stack, since):
    """Meanwhile it accepts others of their queue, which are sent without Beat."""
    stack.replace_beat(JOB_MAX_BYTES=10**9)
    start = time.monotonic()
    refused, _ = store_large(stack)

    active = "result = Job.objects.filter(pk__in=jobs, state__in=ACTIVE).exists()"

    def have_ended():
        stack.enqueue("quick", queue="cpu")
        time.sleep(0.5)
        return not stack.ask(active, jobs=refused)

    wait_for(have_ended)  # five tries each; the stand-in serves 50 calls a second
    since(start)
    rows = stack.rows(*refused)
    assert {row["state"] for row in rows} == {"failed"}, rows
    assert {row["error"].split(":")[0] for row in rows} == {"The broker refused it 5 times"}


@contextmanager
def small(stack, queue, length):
    """Have RabbitMQ refuse messages while this queue is full."""
    policy = f'{{"max-length": {length}, "overflow": "reject-publish"}}'
    stack.broker.control("set_policy", "small", f"^{queue}$", policy, "--apply-to", "queues")
    try:
        yield
    finally:
        stack.broker.control("clear_policy", "small")


@on_rabbitmq
def test_jobs_that_a_full_queue_refused_run_when_it_has_room(stack, gate, since):
    """They run soon: however long it was full, the next try is at most RESEND seconds away."""
    held = [stack.enqueue("hold", gate, queue="cpu") for _ in range(4)]
    stack.wait_until_started(*held)
    pauses = """
refused = Job.objects.filter(pk__in=jobs, times_sent=0).annotate(pause=F("sweep_at") - Now())
result = [job.pause.total_seconds() for job in refused]
"""
    seen = []
    with small(stack, "cpu", 5):
        jobs = [stack.enqueue("quick", queue="cpu") for _ in range(13)]
        for _ in range(16):  # meanwhile some are refused several times
            time.sleep(1)
            seen += stack.ask(pauses, jobs=jobs)
        start = time.monotonic()
        gate.touch()
        rows = stack.wait_until_final(*held, *jobs)
        since(start)
    assert succeeded(rows, crashes=0), rows
    assert max(seen) <= RESEND


@on_rabbitmq
def test_a_full_queue_fails_no_job(stack, since):
    """It accepts others all the time, but refuses each job several times."""
    start = time.monotonic()
    with small(stack, "cpu", 2):
        jobs = [stack.enqueue("rest", 0.5, queue="cpu") for _ in range(150)]
        rows = stack.wait_until_final(*jobs)
        since(start)
    assert succeeded(rows, crashes=0), rows


# Beat itself


@on_one
def test_a_liveness_file_that_cannot_be_touched_stops_nothing(stack, since):
    """Here its folder is missing."""
    beat = stack.replace_beat(LIVENESS_FILE="/missing/beat")
    stack.wait_until_final(stack.enqueue("quick", countdown=1))
    start = time.monotonic()
    stack.wait_until_final(stack.enqueue("quick", countdown=1))
    since(start)
    assert "/missing/beat" in beat.printed


@on_one
def test_beat_exits_when_its_sweep_thread_dies(stack, since):
    """A supervisor can then restart it."""
    start = time.monotonic()
    assert stack.replace_beat("faults.ending_sweep").wait() == 1
    since(start)


@on_one
def test_a_tick_during_a_database_outage_is_not_lost(stack, since):
    """The next tick would be an hour later."""
    ticks = "Job.objects.filter(task='faults.tasks.tick')"
    stack.ask(f"{ticks}.delete()")
    stack.database.kill()
    beat = stack.replace_beat("faults.every_hour")
    wait_for(lambda: "waiting for the database" in beat.printed)
    start = time.monotonic()
    stack.database.start()
    wait_for(lambda: stack.ask(f"result = {ticks}.count()"))
    since(start)
    time.sleep(1)
    assert stack.ask(f"result = {ticks}.count()") == 1
