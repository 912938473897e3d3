"""Workers are killed and stopped: no job is lost, and a stop repeats nothing.

The headings are those of "Workers" in reliability.md.
"""

import os
import re
import signal
import subprocess
import time
from collections import Counter, defaultdict
from functools import partial

import pytest
import redis

from harness.faults import (
    ONE,
    on_each,
    on_each_pool,
    on_each_with_default_timings,
    on_prefork,
    on_prefork_and_threads,
    ran_once,
    stacks,
    stop_before_it_knows,
)
from harness.mails import NEWSLETTER, Mails
from harness.project import wait_for

# A worker is killed


@pytest.mark.promise("A killed worker's job runs again within 60 seconds")
@on_each_with_default_timings
def test_a_killed_worker_loses_no_job_with_the_default_timings(stack, gate):
    assert kill_a_worker(stack, gate) < 60


@stacks(**ONE, sqlite=True)
def test_a_killed_worker_loses_no_job_on_sqlite(stack, gate):
    kill_a_worker(stack, gate)


def kill_a_worker(stack, gate):
    job = stack.enqueue("hold", gate)
    worker = os.getpgid(stack.wait_until_started(job))
    [killed] = [each for each in stack.workers if each.pid == worker]
    killed.kill()
    start = time.monotonic()
    gate.touch()
    stack.wait_until_succeeded(job, crashes=1)
    return time.monotonic() - start


@on_prefork
def test_a_drill_kills_a_worker_of_its_own_and_leaves_nothing_behind(stack):
    drill = stack.process("python manage.py durable_jobs drill --yes", "drill")
    drill.launch()
    assert drill.wait() == 0 and re.search(r"after \d+ s$", drill.printed), drill.printed
    rows = "Job.objects.filter(label='Drill'), Worker.objects.filter(name__startswith='drill')"
    assert stack.ask(f"result = [rows.count() for rows in ({rows})]") == [0, 0]
    with redis.Redis(port=stack.broker.port) as broker:
        assert broker.keys("*drill*") == []
        [controls] = broker.keys("*_kombu.binding.celery.pidbox")  # has a prefix
        bound = broker.smembers(controls)
        assert bound and not any(b"drill" in name for name in bound)
    ps = subprocess.run(["ps", "axeww"], capture_output=True, text=True, check=True).stdout
    processes = [line for line in ps.splitlines() if stack.variables["DATABASE_URL"] in line]
    assert processes and not [line for line in processes if "drill-" in line]


# A child process is killed


@stacks(pools=["prefork"])
def test_a_killed_child_loses_nothing(stack, gate):
    """Its worker notices at once, so the job does not wait until its lease of 600 s lapses."""
    worker = stack.replace_worker(JOB_LEASE_SECONDS=600)
    job = stack.enqueue("hold", gate, queue="cpu")
    task = stack.send("plain.wait", gate, queue="cpu")
    children = [stack.wait_until_started(job), stack.wait_until_started(task)]
    # When a later job ends, every early acknowledgement has been sent.
    stack.wait_until_final(stack.enqueue("quick", queue="cpu"))

    for child in children:
        os.kill(child, signal.SIGKILL)
    wait_for(lambda: stack.row(job)["state"] == "queued")
    gate.touch()

    stack.wait_until_succeeded(job, crashes=1)
    wait_for(lambda: stack.notes("end", task))
    assert worker.is_running()


POINTS = 26  # between and inside the steps of walk(): before and after each query and each call


@pytest.mark.promise("A finished step isn't repeated")
@on_prefork
@pytest.mark.parametrize("kills", [POINTS, pytest.param(200, marks=pytest.mark.nightly)])
def test_whenever_a_child_is_killed_each_step_is_taken_and_no_stored_one_again(stack, kills):
    code = "result = [job.pk for job in enqueue_many([walk.s(point) for point in points])]"
    jobs = stack.ask(code, points=[1 + number % POINTS for number in range(kills)])
    rows = stack.wait_until_succeeded(*jobs, crashes=1)
    assert all(row["result"] == [["0"], ["1"], ["2"]] for row in rows)
    stack.wait_until_succeeded(*stack.ask(code, points=[POINTS + 1]), crashes=0)
    stored, called = {}, defaultdict(list)
    for kind, job, _, _, *names in stack.lines():
        if kind == "start":
            stored[job] = names
        elif kind == "call":
            assert not {*names} & {*stored[job]}
            called[job] += names
    assert all({*called[job]} == {*"012"} and len(called[job]) <= 4 for job in jobs)
    # The step that only writes to the database took effect once.
    code = """
with connection.cursor() as cursor:
    cursor.execute("SELECT job::text, array_agg(chunk) FROM chunks GROUP BY job")
    result = dict(cursor.fetchall())
"""
    written = stack.ask(code)
    assert [written[job] for job in jobs] == [[1]] * kills


@on_prefork
def test_a_task_function_whose_child_gets_sigterm_every_time_fails(stack):
    """The main process is not stopping, so each time counts as a crash."""
    job = stack.enqueue("run", "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", queue="cpu")
    [row] = stack.wait_until_final(job)
    assert (row["state"], row["error"]) == ("failed", "Its worker died 3 times")
    assert stack.starts(job) == 3


# A worker is stopped


@on_each
def test_a_stopped_worker_loses_nothing(stack, gate, tmp_path):
    """A job that ends in time succeeds, the rest is handed back, and no crash is counted."""
    nearly_done = tmp_path / "nearly-done"
    ends = stack.enqueue("hold", nearly_done, queue="cpu")
    job = stack.enqueue("hold", gate, queue="cpu")
    task = stack.send("plain.wait", gate, queue="cpu")
    stack.wait_until_started(ends, job, task)

    os.kill(stack.worker.pid, signal.SIGTERM)
    wait_for(lambda: "hutdown" in stack.worker.printed)
    nearly_done.touch()
    stack.wait_until_succeeded(ends, crashes=0)
    assert ran_once(stack, [ends])
    assert stack.worker.wait() == 0
    assert stack.row(job)["state"] == "queued"  # before any lease has lapsed
    gate.touch()
    stack.worker.start()

    rows = stack.wait_until_succeeded(job, crashes=0)
    assert rows[0]["failures"] == []
    wait_for(lambda: stack.notes("end", task))


@on_prefork
def test_a_stopped_worker_ends_a_function_that_has_just_started(stack, gate):
    worker = stack.replace_worker("--queues cpu --concurrency 1")
    job = stop_before_it_knows(stack, worker, partial(stack.enqueue, "hold", gate, queue="cpu"))
    assert worker.wait() == 0
    assert stack.row(job)["state"] == "queued"  # before any lease has lapsed


@on_each_pool
def test_a_worker_whose_children_are_stopped_too_loses_nothing(stack, gate):
    """systemd and honcho send SIGTERM to the whole process group."""
    job = stack.enqueue("hold", gate, queue="cpu")
    task = stack.send("plain.wait", gate, queue="cpu")
    stack.wait_until_started(job, task)

    os.killpg(stack.worker.pid, signal.SIGTERM)
    stack.worker.wait()
    assert stack.row(job)["state"] == "queued"  # before any lease has lapsed
    gate.touch()
    stack.worker.start()

    [row] = stack.wait_until_succeeded(job, crashes=0)
    assert row["failures"] == []
    wait_for(lambda: stack.notes("end", task))


# A long job is killed, stopped or retried


@pytest.mark.promise("Jobs run at least once")
@on_prefork_and_threads
def test_a_newsletter_continues_where_its_worker_was_killed(stack):
    """Everybody gets it, and at most one of them twice."""
    count = int(os.environ.get("MAILS", "400"))
    send = 'result = enqueue(send_newsletter, [newsletter.pk], queue="news").pk'
    with Mails(count // 2 + 50) as mails:
        worker = stack.make_worker("news", "--queues news", **mails.variables).start()
        job = stack.ask(NEWSLETTER + send, count=count)
        wait_for(lambda: len(mails.received) == mails.count)
        worker.kill()
        mails.proceed.set()
        worker.start()
        [row] = stack.wait_until_succeeded(job, crashes=1)
    assert len(Counter(mails.received)) == count == row["result"]["sent"]
    assert len(mails.received) - count <= 1
