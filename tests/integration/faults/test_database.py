"""The database restarts, crashes, freezes, is locked or accepts no writes: no job runs twice.

The headings are those of "The database" in reliability.md.
"""

import signal
import time

import pytest

from harness.faults import (
    on_each,
    on_each_pool,
    on_gevent,
    on_prefork,
    on_prefork_and_threads,
    ran_once,
)
from harness.project import wait_for
from harness.stack import LEASE

# The database restarts


@on_each
def test_a_restarted_database_loses_no_job(stack, gate):
    """An outcome is stored as soon as the database is back; no lease ends before."""
    jobs = [stack.enqueue("hold", gate, queue=queue) for queue in ["cpu", "io"]]
    jobs.append(stack.enqueue("count", gate, queue="cpu"))
    stack.wait_until_started(*jobs)
    stack.database.stop(signal.SIGINT)
    gate.touch()
    time.sleep(LEASE + 1)
    stack.database.start()
    rows = stack.wait_until_succeeded(*jobs, crashes=0)
    assert ran_once(stack, jobs)
    number, cursor = rows[2]["result"]
    assert number == cursor > 0


# PostgreSQL or its machine crashes


@pytest.mark.promise("Accepted means stored")
@on_prefork_and_threads
def test_a_crash_of_the_database_loses_no_claim(stack, gate):
    """A worker is frozen meanwhile and continues. Only the job of the dead worker runs again."""
    stack.beat.stop()
    jobs = [stack.enqueue("hold", gate, queue=queue) for queue in ["cpu", "cpu", "io"]]
    stack.wait_until_started(*jobs)
    stack.enqueue("quick", queue="later")  # each commit that waits for the disk brings others to it
    stack.worker.pause()
    stack.other.kill()
    stack.database.kill()
    stack.database.start()
    assert [row["state"] for row in stack.rows(*jobs)] == ["running"] * 3
    stack.worker.resume()
    for process in (stack.beat, stack.other):
        process.start()
    stack.wait_until_started(jobs[2], times=2)
    gate.touch()
    rows = stack.wait_until_final(*jobs)
    assert [row["crashes"] for row in rows] == [0, 0, 1], rows
    assert [stack.starts(job) for job in jobs] == [1, 1, 2]


# The database or the whole machine freezes for a while


def hold_eight(stack, gate):
    """Start four jobs in each worker, whose leases are not renewed together; return their ids."""
    jobs = []
    for pause in 0, 0.7:  # more than POLL_SECONDS
        time.sleep(pause)
        jobs += [stack.enqueue("hold", gate, queue=queue) for queue in ["cpu", "io"] * 2]
        stack.wait_until_started(*jobs)
    return jobs


def check_eight(stack, gate, jobs):
    """Let them end after some rounds of the sweep; assert that each has run once."""
    time.sleep(1)
    gate.touch()
    stack.wait_until_succeeded(*jobs, crashes=0)
    assert ran_once(stack, jobs)


@on_each_pool
def test_a_paused_database_lets_no_job_run_twice(stack, gate):
    jobs = hold_eight(stack, gate)
    stack.database.pause()
    time.sleep(LEASE + 2)
    stack.database.resume()
    check_eight(stack, gate, jobs)


# A row or the whole table is locked


@on_prefork_and_threads
def test_a_job_with_a_locked_row_runs_once_and_stops_no_other(stack, gate):
    """One row is locked by another connection, one by its own function."""
    jobs = [stack.enqueue("hold", gate, queue="cpu") for _ in range(3)]
    jobs.append(stack.enqueue("hold_its_row", gate, queue="cpu"))
    stack.wait_until_started(*jobs)
    with stack.locked(f"SELECT FROM durable_jobs_job WHERE id = '{jobs[0]}' FOR UPDATE"):
        time.sleep(LEASE + 1)
        stack.wait_until_succeeded(stack.enqueue("quick", queue="io", countdown=1), crashes=0)
    time.sleep(1)  # some rounds of the sweep
    gate.touch()
    stack.wait_until_succeeded(*jobs, crashes=0)
    assert ran_once(stack, jobs)


@on_gevent
def test_outcomes_that_wait_for_a_lock_stop_no_other_job(stack, gate):
    """Ten wait: as many as there are threads that store outcomes."""
    jobs = [stack.enqueue("hold", gate, queue="cpu") for _ in range(10)]
    stack.wait_until_started(*jobs)
    with stack.locked(f"SELECT FROM durable_jobs_job WHERE id IN {tuple(jobs)} FOR UPDATE"):
        gate.touch()
        wait_for(lambda: all(stack.notes("end", job) for job in jobs))
        others = [stack.enqueue("quick", queue="cpu") for _ in range(20)]
        stack.wait_until_succeeded(*others, crashes=0)
    stack.wait_until_succeeded(*jobs, crashes=0)
    assert ran_once(stack, [*jobs, *others])


@pytest.mark.parametrize("mode", ["ACCESS EXCLUSIVE", "SHARE"])
@on_prefork_and_threads
def test_a_locked_table_lets_no_job_run_twice(stack, gate, mode):
    """A migration takes such a lock. CREATE INDEX takes SHARE, so that the sweep can read rows."""
    jobs = hold_eight(stack, gate)
    with stack.locked(f"LOCK TABLE durable_jobs_job IN {mode} MODE"):
        time.sleep(LEASE + 2)
    check_eight(stack, gate, jobs)


# The database accepts no writes


@on_prefork_and_threads
def test_a_read_only_database_loses_no_job(stack, gate):
    """Outcomes are stored as soon as writes work; no function runs twice, no crash is counted."""

    def set_read_only(state):
        setting = f"ALTER SYSTEM SET default_transaction_read_only = {state}"
        assert stack.database.run("psql", "-q", "-c", setting, "-c", "SELECT pg_reload_conf()")

    jobs = [stack.enqueue("hold", gate, queue=queue) for queue in ["cpu", "io"]]
    stack.wait_until_started(*jobs)
    set_read_only("on")
    try:
        gate.touch()
        time.sleep(LEASE + 1)
    finally:
        set_read_only("off")
    stack.wait_until_succeeded(*jobs, crashes=0)
    assert ran_once(stack, jobs)


# The database is unavailable for longer than the rest of a job's time limit


@on_prefork
def test_an_outage_after_a_task_function_counts_towards_no_time_limit(stack, gate):
    """The outage takes 11 s, and the soft time limit is 10 s."""
    jobs = [
        stack.enqueue("hold_softly", gate, queue="cpu"),
        stack.enqueue("hold_softly", gate, "its own reason", queue="cpu"),
    ]
    stack.wait_until_started(*jobs)
    stack.database.stop(signal.SIGINT)
    gate.touch()
    time.sleep(11)
    stack.database.start()
    rows = stack.wait_until_final(*jobs)
    assert [row["state"] for row in rows] == ["succeeded", "failed"], rows
    assert rows[1]["error"] == "ValueError: its own reason"
    assert ran_once(stack, jobs)
