"""Web processes and Beat die or hang, the schedule is late, old jobs cannot be deleted.

The headings are those of "The web and Beat" in reliability.md.
"""

import json
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.bake import TEMPLATE
from harness.faults import on_each_broker, on_one, ran_once
from harness.project import Project, wait_for
from harness.stack import LEASE, succeeded

# A web server process dies between commit and message


@pytest.mark.promise("Accepted means stored")
@on_each_broker
def test_a_web_killed_between_commit_and_publish_loses_no_job(stack):
    with pytest.raises(OSError):
        stack.post("quick", key="killed", die=True)
    [job] = stack.ask(
        'result = list(Job.objects.filter(idempotency_key="killed").values_list("pk", flat=True))'
    )
    stack.wait_until_succeeded(job, crashes=0)
    assert stack.post("quick", key="killed") == job


# Beat dies, or two run


@on_each_broker
def test_without_beat_jobs_may_wait_but_none_is_lost(stack, gate):
    """New jobs run. A job whose worker died is recovered once Beat is back."""
    stack.beat.kill()
    lost = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(lost)
    stack.worker.kill()
    stack.worker.start()
    stack.wait_until_succeeded(stack.enqueue("quick", queue="cpu"), crashes=0)
    gate.touch()
    time.sleep(LEASE + 1)
    assert stack.row(lost)["state"] == "running"

    stack.beat.start()
    stack.wait_until_succeeded(lost, crashes=1)


@on_one
def test_most_of_many_jobs_wait_for_a_beat_that_died_a_moment_ago(stack):
    """Their call leaves them to the sweeper, which seems to run."""
    stack.beat.kill()
    code = """
from unittest.mock import patch
Sweep.objects.update(ended_at=Now())
with patch("durable_jobs.enqueue.SENT_IMMEDIATELY", 3):
    result = [str(job.pk) for job in enqueue_many([quick.using(queue="cpu").s()] * 10)]
"""
    jobs = stack.ask(code)
    stack.wait_until_succeeded(*jobs[:3], crashes=0)
    assert {row["state"] for row in stack.rows(*jobs[3:])} == {"queued"}
    stack.beat.start()
    stack.wait_until_succeeded(*jobs, crashes=0)
    assert ran_once(stack, jobs)


@on_one
def test_two_beats_start_a_job_once(stack):
    """The second one starts half a second later; both schedule the job every second."""
    started = "Job.objects.filter(task='faults.tasks.tick')"
    stack.ask(f"{started}.delete()")
    beats = []
    for name in ["first", "second"]:
        beats.append(stack.make_beat(name, FAULT="every_second"))
        beats[-1].start()
        time.sleep(0.5)
    wait_for(lambda: stack.ask(f"result = {started}.count()") >= 12)
    for beat in beats:
        beat.stop()
    code = f"""
import shelve
ticks = [shelve.open(file)["entries"]["every second"].total_run_count for file in files]
times = sorted({started}.values_list("created_at", flat=True))
result = *ticks, len(times), (times[-1] - times[0]).total_seconds()
"""
    files = [f"{stack.folder}/{name}" for name in ["first", "second"]]
    first, second, jobs, seconds = stack.ask(code, files=files)
    assert min(first, second) >= 6
    assert max(first, second) - 1 <= jobs <= seconds + 3
    assert "Traceback" not in "".join(beat.printed for beat in beats)


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


@on_one
def test_a_liveness_file_that_cannot_be_touched_stops_nothing(stack):
    """Here its folder is missing."""
    beat = stack.replace_beat(LIVENESS_FILE="/missing/beat")
    stack.wait_until_final(stack.enqueue("quick", countdown=1))
    stack.wait_until_final(stack.enqueue("quick", countdown=1))
    assert "/missing/beat" in beat.printed


# Beat's sweeper ends


@on_one
def test_beat_exits_when_its_sweeper_thread_dies(stack):
    """A supervisor can then restart it."""
    assert stack.replace_beat(FAULT="ending_sweeper").wait() == 1


# The database is unavailable when a scheduled job is due


@on_one
def test_a_tick_during_a_database_outage_is_not_lost(stack):
    """The next tick would be an hour later."""
    ticks = "Job.objects.filter(task='faults.tasks.tick')"
    stack.ask(f"{ticks}.delete()")
    stack.database.kill()
    beat = stack.replace_beat(FAULT="every_hour")
    wait_for(lambda: "waiting for the database" in beat.printed)
    stack.database.start()
    wait_for(lambda: stack.ask(f"result = {ticks}.count()"))
    time.sleep(1)
    assert stack.ask(f"result = {ticks}.count()") == 1


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


@contextmanager
def kept(stack, jobs):
    """A model with PROTECT refers to one job, a table unknown to Django refers to another."""
    run_sql(
        stack,
        f"INSERT INTO keeps VALUES ('{jobs[0]}')",
        "CREATE TABLE mentions"
        " (job uuid REFERENCES durable_jobs_job DEFERRABLE INITIALLY DEFERRED)",
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
    return stack.locked(f"SELECT FROM durable_jobs_failure WHERE job_id = '{jobs[0]}' FOR UPDATE")


@contextmanager
def many(stack, jobs):
    """100,000 other jobs ended earlier, and must be deleted first."""
    copy = """
INSERT INTO durable_jobs_job SELECT (jsonb_populate_record(
    job, jsonb_build_object('id', gen_random_uuid(), 'finished_at', now() - interval '99 days'))).*
FROM durable_jobs_job job, generate_series(1, 100000) WHERE id = %s"""
    run_sql(stack, copy.replace("%s", f"'{jobs[0]}'"))
    stack.beat.stop()
    stack.beat.start()  # and begins with the oldest: it had passed jobs that it could not delete
    try:
        yield
        assert remaining(stack, jobs) == len(jobs)
    finally:
        run_sql(
            stack, "DELETE FROM durable_jobs_job WHERE finished_at < now() - interval '90 days'"
        )


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
def test_old_jobs_that_are_hard_to_delete_stop_nothing(stack, gate, hindered):
    job = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(job)
    old = enqueue_ended(stack, 2000)
    with hindered(stack, old):
        backdate(stack, old)
        time.sleep(1)  # a round of the sweeper
        stack.worker.kill()
        [row] = stack.wait_until_final(stack.enqueue("quick", queue="io", countdown=1))
        wait_for(lambda: stack.row(job)["crashes"])
    assert succeeded([row], crashes=0), row
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
        stack.ask(f"Job.objects.filter(pk__in=jobs).update(sweep_at=Now(), {field})", jobs=jobs)
        wait_for(lambda: stack.messages_in("nobody") >= count)
    finally:
        stack.ask('Job.objects.filter(queue="nobody").delete()')
        stack.empty("nobody")
    assert megabytes() < limit


# A name server (DNS) hangs

LOOK_UP = """
import ctypes, json, socket, struct

class State(ctypes.Structure):  # the first fields of glibc's struct __res_state
    _fields_ = [
        ("timeout", ctypes.c_int),
        ("attempts", ctypes.c_int),
        ("options", ctypes.c_ulong),
        ("servers", ctypes.c_int),
        ("server", ctypes.c_char * 16),
    ]

silent = socket.socket(type=socket.SOCK_DGRAM)
silent.bind(("127.0.0.1", 0))
glibc = ctypes.CDLL("libc.so.6")
glibc.__res_state.restype = ctypes.POINTER(State)
assert glibc.__res_init() == 0
state = glibc.__res_state().contents
state.servers = 1
port, host = struct.pack("!H", silent.getsockname()[1]), socket.inet_aton("127.0.0.1")
address = struct.pack("=H", socket.AF_INET) + port + host + bytes(8)
ctypes.memmove(ctypes.addressof(state) + State.server.offset, address, len(address))
try:
    socket.getaddrinfo("example.com.", 80)
except socket.gaierror as error:
    assert error.errno == socket.EAI_AGAIN
    assert b"example" in silent.recv(1000)
    print(json.dumps([state.timeout, state.attempts]))
"""


@pytest.mark.parametrize("broker", ["redis"])  # CI runs the tests of this file by broker
def test_a_name_server_that_hangs_delays_a_request_by_two_seconds(bake, broker):
    """glibc's default is ten seconds: two attempts of five."""
    dockerfile = bake(durable_jobs="yes", broker=broker, deployment="docker").read("Dockerfile")
    options = re.search('RES_OPTIONS="(.+)"', dockerfile)[1]
    printed = Project(TEMPLATE).call(sys.executable, "-c", LOOK_UP, RES_OPTIONS=options)
    timeout, attempts = json.loads(printed)
    assert timeout * attempts == 2
