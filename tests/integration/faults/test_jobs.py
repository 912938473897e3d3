"""Jobs kill their workers, exceed limits, are cancelled, or come from other or older code."""

import signal

import pytest

from harness.faults import (
    ONE,
    on_each,
    on_each_pool,
    on_prefork,
    on_prefork_and_threads,
    ran_once,
    stacks,
    with_flower,
    without_resends,
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
    assert [failure["error"] for failure in row["failures"]] == ["Exceeded its time limit"]
    assert ran_once(stack, [job])
    gate.touch()  # in a thread the function still runs
    stack.wait_until_succeeded(stack.enqueue("quick", queue="cpu"), crashes=0)


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
def test_a_job_that_holds_its_own_row_can_be_terminated(stack, gate):
    """If its worker's loop waited for the lock, nothing would end the function."""
    stack.flower.start()
    job = stack.enqueue("hold_its_row", gate, queue="cpu")
    stack.wait_until_started(job)
    stack.ask_flower(f"/api/task/revoke/{job}?terminate=1", {})
    [row] = stack.wait_until_final(job)
    assert row["state"] == "cancelled"


@on_prefork_and_threads
def test_a_revoke_during_a_database_outage_cancels(stack, gate):
    waits = stack.enqueue("hold", gate, queue="cpu", countdown=3600)
    runs = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(runs)
    stack.database.stop(signal.SIGINT)
    command = ".venv/bin/celery", "-A", "config", "control", "--timeout", "5", "revoke"
    stack.project.call(*command, waits, runs, **stack.variables)
    wait_for(lambda: all("flagged as revoked" in worker.printed for worker in stack.workers))
    stack.database.start()
    rows = stack.wait_until_final(waits, runs)
    assert [row["state"] for row in rows] == ["cancelled", "cancelled"]


# Coroutines


@on_each_pool
def test_a_cancelled_coroutine_ends(stack, gate):
    """A job, whose report() ends it: a function of Django's Tasks has none."""
    job = stack.enqueue("report_in_a_coroutine", gate, queue="cpu")
    stack.wait_until_started(job)
    stack.ask("cancel(Job.objects.filter(pk=job))", job=job)
    wait_for(lambda: stack.notes("end", job))


@on_each_pool
def test_a_coroutine_over_its_time_limit_is_cancelled_except_in_a_thread(stack, gate, request):
    job = stack.enqueue("wait_too_long", gate, queue="cpu")
    [row] = stack.wait_until_final(job)
    assert (row["state"], row["error"]) == ("failed", "Exceeded its time limit")
    in_thread = request.node.callspec.params["running"]["pool"] == "threads"
    if in_thread:
        gate.touch()
    wait_for(lambda: stack.notes("end", job) or stack.notes("cancelled", job))
    assert bool(stack.notes("end", job)) == in_thread


# Retries


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


# Deploys


@without_resends
def test_jobs_with_outdated_arguments_fail_and_delay_no_other(stack):
    """They were stored before their task's signature changed."""
    code = """
jobs = [job.pk for job in enqueue_many([quick.using(countdown=2).s()] * 40)]
for position, args in enumerate(jobs[:30]):
    args, kwargs = ([], {"gone": 1}) if position % 2 else (["one too many"], {})
    Job.objects.filter(pk=jobs[position]).update(args=args, kwargs=kwargs)
result = jobs
"""
    jobs = stack.ask(code)
    stack.wait_until_succeeded(*jobs[30:], crashes=0)
    rows = stack.wait_until_final(*jobs[:30])
    assert {(row["state"], row["crashes"]) for row in rows} == {("failed", 0)}, rows
    assert all("argument" in row["error"] for row in rows), rows
    assert all("gone" in row["error"] for row in rows[1::2]), rows


# Celery's own calls


@on_each
def test_a_task_that_another_app_sends_is_a_job(stack, gate):
    send = """
from celery import Celery
from config.celery import app
result = Celery.send_task(app, "faults.tasks.hold", [gate], queue="cpu").id
"""
    job = stack.ask(send, gate=str(gate))
    stack.wait_until_started(job)
    assert stack.row(job)["state"] == "running"
    gate.touch()
    stack.wait_until_succeeded(job, crashes=0)
    assert ran_once(stack, [job])
