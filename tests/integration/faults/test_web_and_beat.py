"""Beat hangs, old jobs cannot be deleted, jobs are large, a name server hangs."""

import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.bake import TEMPLATE
from harness.faults import on_one
from harness.project import Project, wait_for
from harness.stack import LEASE

# Beat's loop hangs, but its sweeper continues


@on_one
def test_a_beat_that_hangs_touches_no_liveness_file(stack, tmp_path):
    """The sweeper, another thread, continues, so Sweep.ended_at does not show that Beat hangs."""
    file = tmp_path / "alive"
    beat = stack.replace_beat(FAULT="hanging_beat", LIVENESS_FILE=file)
    wait_for(file.exists)
    wait_for(lambda: time.time() - file.stat().st_mtime > 2 * LEASE)
    assert beat.is_running()
    code = """
from django.utils import timezone
sweep = Sweep.objects.get()
result = [(timezone.now() - time).total_seconds() for time in (sweep.ended_at, sweep.tick_due_at)]
"""
    swept, late = stack.ask(code)
    assert swept < LEASE < 2 * LEASE < late


# Beat's sweeper ends


@on_one
def test_beat_exits_when_its_sweeper_thread_dies(stack):
    """A supervisor can then restart it."""
    assert stack.replace_beat(FAULT="ending_sweeper").wait() == 1


# Old jobs cannot be deleted


def enqueue_many(stack, count, *args, **options):
    code = "result = [job.pk for job in enqueue_many([read.using(**options).s(*args)] * count)]"
    return stack.ask(code, args=args, count=count, options=options)


def enqueue_ended(stack, count):
    """Return the ids of `count` jobs that have ended."""
    jobs = enqueue_many(stack, count, "", countdown=99)
    stack.ask("cancel(Job.objects.filter(pk__in=jobs))", jobs=jobs)
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


def locked(stack, jobs):
    """Another transaction locks a row that refers to one of the jobs."""
    stack.ask("Failure.objects.create(job_id=job, started_at=Now())", job=jobs[0])
    return stack.locked(f"SELECT FROM durable_jobs_failure WHERE job_id = '{jobs[0]}' FOR UPDATE")


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


@pytest.mark.parametrize("hindered", [locked, slow])
@on_one
def test_old_jobs_that_are_hard_to_delete_stop_nothing(stack, gate, hindered):
    job = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(job)
    old = enqueue_ended(stack, 2000)
    with hindered(stack, old):
        backdate(stack, old)
        time.sleep(1)  # a round of the sweeper
        stack.worker.kill()
        later = stack.enqueue("quick", queue="io", countdown=1)
        stack.wait_until_succeeded(later, crashes=0)
        wait_for(lambda: stack.row(job)["crashes"])
    wait_for(lambda: not remaining(stack, old))
    stack.ask("cancel(Job.objects.filter(pk=job))", job=job)


# Jobs are large: Beat needs little memory


def watch_memory(stack):
    """Restart Beat. Return a function that returns how many megabytes it has needed since."""
    stack.beat.stop()
    stack.beat.start()
    stack.wait_until_final(stack.enqueue("quick", countdown=1))
    Path(f"/proc/{stack.beat.pid}/clear_refs").write_text("5")  # forgets the peak
    idle = stack.beat.peak
    return lambda: stack.beat.peak - idle


@on_one
def test_beat_does_not_load_the_results_that_it_deletes(stack):
    """1,000 jobs with results of 500 kB."""
    megabytes = watch_memory(stack)
    old = enqueue_ended(stack, 1000)
    backdate(stack, old, result="x" * 500_000)
    wait_for(lambda: not remaining(stack, old))
    assert megabytes() < 40


LARGE = {  # how many jobs, a field of each, and how many megabytes Beat may need for all
    "cursors": (100, 'cursor="x" * 5_000_000', 40),
    "arguments": (1000, 'args=["x" * 40_000]', 40),
    "many arguments": (1000, 'args=[["xy"] * 10_000]', 150),
}


@pytest.mark.parametrize("count, field, limit", LARGE.values(), ids=LARGE)
@on_one
def test_beat_needs_little_memory_for_due_jobs(stack, count, field, limit):
    """It need not load cursors, which no message has. Arguments of 60 kB may need 600 kB."""
    megabytes = watch_memory(stack)
    jobs = enqueue_many(stack, count, "", countdown=99, queue="nobody")
    try:
        stack.ask(f"Job.objects.filter(pk__in=jobs).update(send_at=Now(), {field})", jobs=jobs)
        wait_for(lambda: stack.messages_in("nobody") >= count)
    finally:
        stack.ask('Job.objects.filter(queue="nobody").delete()')
        stack.empty("nobody")
    assert megabytes() < limit


# A name server (DNS) hangs

NUMBERS = """
import ctypes
glibc = ctypes.CDLL("libc.so.6")
glibc.__res_state.restype = ctypes.POINTER(ctypes.c_int * 2)  # its first fields: seconds, attempts
assert glibc.__res_init() == 0
print(*glibc.__res_state().contents)
"""


def test_a_name_server_that_hangs_delays_a_request_by_two_seconds(bake):
    """glibc's default is ten seconds: two attempts of five."""
    dockerfile = bake(durable_jobs="yes", deployment="docker").read("Dockerfile")
    options = re.search('RES_OPTIONS="(.+)"', dockerfile)[1]
    printed = Project(TEMPLATE).call(sys.executable, "-c", NUMBERS, RES_OPTIONS=options)
    seconds, attempts = map(int, printed.split())
    assert seconds * attempts == 2
