"""Jobs kill their workers, exceed limits, are cancelled or end in odd ways."""

import json
import signal

import pytest

from harness.faults import (
    ONE,
    errors,
    on_each,
    on_each_pool,
    on_one,
    on_prefork,
    on_prefork_and_threads,
    ran_once,
    stacks,
    with_flower,
)
from harness.project import wait_for
from harness.stack import LEASE

# A job kills its worker every time


@pytest.mark.promise("No endless crashes")
@on_each_pool
def test_a_job_that_kills_its_worker_every_time_fails_alone(stack):
    """With threads or greenlets, others run in the same process each time. They still succeed."""
    innocents = [stack.enqueue("rest", 2, queue="cpu") for _ in range(15)]
    killer = stack.enqueue("die", 1, queue="cpu")
    with stack.supervised():
        row, *rows = stack.wait_until_final(killer, *innocents)
    assert (row["state"], row["error"]) == ("failed", "Its worker died 3 times")
    assert stack.starts(killer) == 3
    assert {row["state"] for row in rows} == {"succeeded"}, rows


# A C extension holds Python's GIL for longer than the lease


@on_prefork
def test_a_task_function_that_holds_the_gil_keeps_its_job(stack):
    job = stack.enqueue("hold_the_interpreter", LEASE + 4, queue="cpu")
    stack.wait_until_succeeded(job, crashes=0)
    assert ran_once(stack, [job])


# A job exceeds its time limit


@on_each
def test_a_job_over_its_time_limit_fails(stack, gate):
    job = stack.enqueue("hold_too_long", gate, queue="cpu")
    [row] = stack.wait_until_final(job)
    assert (row["state"], row["error"]) == ("failed", "Exceeded its time limit")
    assert errors(row) == ["Exceeded its time limit"]
    assert ran_once(stack, [job])
    gate.touch()  # in a thread the function still runs
    stack.wait_until_succeeded(stack.enqueue("quick", queue="cpu"), crashes=0)


@on_prefork
def test_a_soft_time_limit_ends_a_task_function_that_waits_for_a_query(stack):
    """After one run, and without a crash, also in the function's own transaction."""
    jobs = [stack.enqueue("query", 600, block, queue="cpu") for block in ["", "in a block"]]
    rows = stack.wait_until_final(*jobs)
    outcome = ("failed", "Exceeded its time limit", 0)
    assert [(row["state"], row["error"], row["crashes"]) for row in rows] == [outcome] * 2
    assert ran_once(stack, jobs)


@stacks(brokers=ONE["brokers"], pools=["threads"])
def test_a_thread_over_its_time_limit_continues(stack, gate):
    """A plain task to its end, a job to its next report."""
    task = stack.send("plain.wait", gate, queue="cpu", time_limit=2, soft_time_limit=1)
    job = stack.enqueue("hold_too_long", gate, "reports", queue="cpu")
    stack.wait_until_started(job, task)
    [row] = stack.wait_until_final(job)
    assert (row["state"], row["error"]) == ("failed", "Exceeded its time limit")
    wait_for(lambda: stack.notes("end", job))
    gate.touch()
    wait_for(lambda: stack.notes("end", task))
    assert stack.starts(task) == 1


# A job is cancelled in the API or revoked in Flower


@stacks(brokers=with_flower, pools=["prefork"])
def test_a_job_that_holds_its_own_row_can_be_terminated(stack, gate, revoke):
    """If its worker's loop waited for the lock, nothing would end the function."""
    job = stack.enqueue("hold_its_row", gate, queue="cpu")
    stack.wait_until_started(job)
    revoke(job, "?terminate=1")
    [row] = stack.wait_until_final(job)
    assert row["state"] == "cancelled"


def control(stack, *words):
    command = ".venv/bin/celery", "-A", "config", "control", "--timeout", "5", *words
    stack.project.call(*command, **stack.variables)


@on_prefork_and_threads
def test_a_revoke_during_a_database_outage_cancels(stack, gate):
    waits = stack.enqueue("hold", gate, queue="cpu", countdown=3600)
    runs = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(runs)
    stack.database.stop(signal.SIGINT)
    control(stack, "revoke", waits, runs)
    wait_for(lambda: all("flagged as revoked" in worker.printed for worker in stack.workers))
    stack.database.start()
    rows = stack.wait_until_final(waits, runs)
    assert [row["state"] for row in rows] == ["cancelled", "cancelled"]


# Retries and errors


@on_prefork_and_threads
def test_a_retry_in_a_transaction_is_not_rolled_back(stack):
    code = """
if not self.request.retries:
    with transaction.atomic():
        raise self.retry(countdown=0.1)
"""
    job = stack.enqueue("run", code)
    stack.wait_until_succeeded(job, crashes=0)
    assert stack.starts(job) == 2


@on_one
def test_a_long_error_is_cut(stack):
    job = stack.post("run", "raise ValueError('x' * 20_000_000)")
    [row] = stack.wait_until_final(job)
    assert row["error"].startswith("ValueError: xxx")
    assert len(row["error"]) <= 10_000
    assert len(json.dumps(stack.request("/api/jobs/")[2])) < 1_000_000
