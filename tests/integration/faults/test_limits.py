"""Limits hold exactly, and no slot stays empty: real processes die, locks are the witness."""

import os
import signal
import time

import pytest

from harness.faults import ONE, either, on_prefork, on_prefork_and_threads, ran_once, stacks
from harness.project import children_of, wait_for


def exceeded(stack, jobs):
    """Return which of these jobs found all files of their key locked."""
    return [job for job in jobs if stack.notes("exceeded", job)]


def have_slots(stack, jobs):
    """Return whether some of these jobs occupy slots."""
    ask = "result = Job.objects.filter(states.HAS_SLOT, pk__in=jobs).exists()"
    return stack.ask(f"from durable_jobs import states\n{ask}", jobs=jobs)


def check(stack, jobs):
    """Wait until these jobs have succeeded. They have no slot, and no limit was exceeded."""
    rows = stack.wait_until_final(*jobs)
    assert {row["state"] for row in rows} == {"succeeded"}, rows
    assert not have_slots(stack, jobs)
    assert not exceeded(stack, jobs)


def occupy(stack, gate):
    """Let a job of the first worker take the only slot of a key. Return it and three others."""
    key = f"one:{gate.parent.name}"
    first = stack.enqueue("limited", key, gate, queue="cpu")
    stack.wait_until_started(first)
    waiting = [stack.enqueue("limited", key, "/", 0.05, queue="io") for _ in range(3)]
    return first, waiting


# A running job is cancelled


@on_prefork
def test_the_slot_of_a_cancelled_job_is_free_at_once_when_its_child_dies(stack, gate):
    """With a lease of 600 s. The second child is ended by a revoke, as in Flower."""
    worker = stack.replace_worker(JOB_LEASE_SECONDS=600)
    first, waiting = occupy(stack, gate)
    stack.ask("cancel(Job.objects.get(pk=job))", job=first)
    for child in children_of(worker.pid):
        os.kill(child, signal.SIGKILL)
    check(stack, waiting)

    first, waiting = occupy(stack, gate)
    revoke = "from config.celery import app\napp.control.revoke(job, terminate=True)"
    stack.ask(revoke, job=first)
    check(stack, waiting)
    assert stack.row(first)["state"] == "cancelled"


# All faults, and two Beats


CANCEL = """
running = Job.objects.filter(state="running", limit_key__isnull=False)[:2]
cancel(Job.objects.filter(pk__in=[job.pk for job in running]))
"""
ENQUEUE = """
result = []
for number in range(3):
    for key, seconds in [("one:storm", 0.2), ("two:storm", 0.3), ("two:storm", 0.1)]:
        queue = ["cpu", "io"][number % 2]
        result.append(enqueue(limited, [key, "/", seconds], queue=queue).pk)
"""


def restart(server):
    server.kill()
    server.start()


@pytest.mark.promise("Limits hold")
@either(on_prefork_and_threads, stacks(**ONE, sqlite=True))
def test_no_fault_exceeds_a_limit_or_leaves_a_slot_empty(stack):
    """Each fault comes while jobs of all keys run. Two Beats have a sweeper all the time."""
    faults = [
        stack.worker.kill,
        lambda: stack.ask(CANCEL),
        lambda: [os.kill(child, signal.SIGKILL) for child in children_of(stack.other.pid)[:2]],
        lambda: stack.empty("cpu"),
        lambda: restart(stack.broker),
        lambda: os.kill(stack.other.pid, signal.SIGTERM),
        stack.beat.kill,
        *([lambda: restart(stack.database)] if stack.database else []),
        stack.worker.kill,
    ]
    jobs = []
    with stack.supervised(*stack.workers, stack.beat, stack.make_beat("second-beat")):
        for fault in faults:
            new = stack.ask(ENQUEUE)
            jobs += new
            wait_for(lambda new=new: any(map(stack.starts, new)))
            time.sleep(0.3)
            fault()
            time.sleep(0.5)
        rows = stack.wait_until_final(*jobs)
        assert {row["state"] for row in rows} <= {"succeeded", "cancelled"}, rows
        wait_for(lambda: not have_slots(stack, jobs))
    assert not exceeded(stack, jobs)


# Rates


def most_starts(times, seconds):
    """Return how many of these times are within the same `seconds`, at most."""
    return max(sum(first <= time < first + seconds for time in times) for first in times)


def started_at(stack, jobs):
    """Return when these jobs started, as the database has stored it: functions start soon after."""
    ask = "result = [j.started_at.timestamp() for j in Job.objects.filter(pk__in=jobs)]"
    return sorted(stack.ask(ask, jobs=jobs))


@on_prefork
def test_an_api_with_5_calls_a_second_and_2_at_once_for_each_tenant(stack):
    """300 contacts, and a worker is killed in the middle. One summary comes at the end."""
    stack.replace_beat(JOB_SWEEP_SECONDS=5)  # the default
    batch, jobs = stack.ask("""
calls = [limited.s("tenant:7", "/", 0.1)] * 300
batch = batches.enqueue(calls, on_finish=quick.si())
result = [batch.pk, [job.pk for job in batch.jobs.order_by("created_at")]]
""")
    stack.wait_until_started(jobs[150])
    stack.worker.kill()
    stack.worker.start()
    done = "result = Batch.objects.filter(pk=batch, state='succeeded').exists()"
    wait_for(lambda: stack.ask(done, batch=batch))
    check(stack, jobs)
    assert most_starts(started_at(stack, jobs), 1) <= 5
    [last] = stack.ask("result = [j.pk for j in Job.objects.filter(follows=batch)]", batch=batch)
    stack.wait_until_final(last)
    assert ran_once(stack, [last])
