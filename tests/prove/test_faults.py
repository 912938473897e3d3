"""Accepted work is not lost: real processes are killed, paused and restarted.

The property `seconds` of a test (see pytest's --junitxml) is the time from the fault, or from the
restart if one was needed, to the end of the last job.
"""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest

from harness.bake import CHOICES, chosen
from harness.faults import (
    ONE,
    POOLS,
    errors,
    everywhere,
    on_each,
    on_each_broker,
    on_each_pool,
    on_one,
    on_prefork,
    ran_once,
    stacks,
    succeeded,
    without_resends,
)
from harness.project import children_of, fetch, free_ports, wait_for
from harness.stack import LEASE, RESEND

# Workers die


def wait_for_early_acknowledgements(stack):
    """Run a later job. When it ends, every early acknowledgement has been sent."""
    stack.wait_until_final(stack.enqueue("quick", queue="cpu"))


@everywhere
def test_a_killed_worker_loses_nothing(stack, gate, since):
    """Jobs run again, and so do plain tasks, after the visibility timeout."""
    jobs = [stack.enqueue("hold", gate, queue="cpu") for _ in range(2)]
    task = stack.send("plain", gate, queue="cpu")
    stack.wait_until_started(*jobs, task)
    wait_for_early_acknowledgements(stack)

    stack.worker.kill()
    start = time.monotonic()
    gate.touch()
    stack.worker.start()

    rows = stack.wait_until_final(*jobs)
    since(start)
    assert succeeded(rows, crashes=1), rows
    assert [errors(row) for row in rows] == [["Its worker died"]] * 2
    wait_for(lambda: stack.notes("end", task))


@stacks(pools=["prefork"])
def test_a_killed_child_loses_nothing(stack, gate, since, record_property):
    """Its worker notices at once, so the job does not wait until its lease of 600 s lapses."""
    worker = stack.replace_worker(JOB_LEASE_SECONDS=600)
    job = stack.enqueue("hold", gate, queue="cpu")
    task = stack.send("plain", gate, queue="cpu")
    children = [stack.wait_until_started(job), stack.wait_until_started(task)]
    wait_for_early_acknowledgements(stack)

    start = time.monotonic()
    for child in children:
        os.kill(child, signal.SIGKILL)
    wait_for(lambda: stack.row(job)["state"] == "queued")
    record_property("queued", round(time.monotonic() - start, 1))
    gate.touch()

    rows = stack.wait_until_final(job)
    since(start)
    assert succeeded(rows, crashes=1), rows
    wait_for(lambda: stack.notes("end", task))
    assert worker.is_running()


@on_each
def test_a_job_that_kills_its_worker_every_time_fails(stack, since):
    start = time.monotonic()
    job = stack.enqueue("die", queue="cpu")
    with stack.supervised():
        [row] = stack.wait_until_final(job)
    since(start)
    assert (row["state"], row["error"]) == ("failed", "Its worker died 3 times")
    assert len(stack.notes("start", job)) == 3


@stacks(pools=["prefork"])
def test_a_plain_task_that_kills_its_child_every_time_ends(stack, since):
    start = time.monotonic()
    task = stack.send("die_plainly", queue="cpu")
    wait_for(lambda: len(stack.notes("start", task)) == 3)
    since(start)
    stack.wait_until_final(*[stack.enqueue("quick", queue="cpu") for _ in range(20)])
    time.sleep(2)  # time for a fourth start
    assert len(stack.notes("start", task)) == 3
    assert not stack.messages_in("cpu")


@everywhere
def test_a_stopped_worker_loses_nothing(stack, gate, tmp_path, since):
    """A job that ends in time succeeds, the rest is handed back, and no crash is counted."""
    nearly_done = tmp_path / "nearly-done"
    ends = stack.enqueue("hold", nearly_done, queue="cpu")
    job = stack.enqueue("hold", gate, queue="cpu")
    task = stack.send("plain", gate, queue="cpu")
    stack.wait_until_started(ends, job, task)
    # After the end of a later job, the worker's main process knows that these have started. If
    # SIGTERM came before, Celery would wait for one of them, and the worker would exit with 1.
    stack.wait_until_final(stack.enqueue("hold", tmp_path, queue="cpu"))

    start = time.monotonic()
    os.kill(stack.worker.pid, signal.SIGTERM)
    wait_for(lambda: "hutdown" in stack.worker.printed)
    nearly_done.touch()
    [row] = stack.wait_until_final(ends)
    assert succeeded([row], crashes=0), row
    assert ran_once(stack, [ends])
    assert stack.worker.wait() == 0
    assert stack.row(job)["state"] == "queued"  # before any lease has lapsed
    gate.touch()
    stack.worker.start()

    rows = stack.wait_until_final(job)
    since(start)
    assert succeeded(rows, crashes=0), rows
    assert errors(rows[0]) == []
    wait_for(lambda: stack.notes("end", task))


@on_each_pool
def test_a_worker_whose_children_are_stopped_too_loses_nothing(stack, gate, since):
    """systemd and honcho send SIGTERM to the whole process group."""
    job = stack.enqueue("hold", gate, queue="cpu")
    task = stack.send("plain", gate, queue="cpu")
    stack.wait_until_started(job, task)

    start = time.monotonic()
    os.killpg(stack.worker.pid, signal.SIGTERM)
    stack.worker.wait()
    assert stack.row(job)["state"] == "queued"  # before any lease has lapsed
    gate.touch()
    stack.worker.start()

    [row] = stack.wait_until_final(job)
    since(start)
    assert succeeded([row], crashes=0), row
    assert errors(row) == []
    wait_for(lambda: stack.notes("end", task))


@on_each_pool
def test_a_stopped_worker_hands_back_jobs_at_their_next_cursor(stack, gate, since):
    """No chunk is repeated, and nothing waits for SOFT_SHUTDOWN_SECONDS, an hour here."""
    worker = stack.replace_worker(SOFT_SHUTDOWN_SECONDS=3600)
    jobs = [
        stack.enqueue("write_chunks", gate, queue="cpu"),
        stack.enqueue("write_chunks", gate, "in a block", queue="cpu"),
        stack.enqueue("write_chunks_in_a_coroutine", gate, queue="cpu"),
    ]
    written = """
with connection.cursor() as cursor:
    cursor.execute("SELECT chunk FROM chunks WHERE job = %s ORDER BY chunk", [job])
    result = [chunk for [chunk] in cursor]
"""
    for job in jobs:
        wait_for(lambda job=job: len(stack.ask(written, job=job)) > 5)
    start = time.monotonic()
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.wait() == 0
    since(start)
    assert [row["state"] for row in stack.rows(*jobs)] == ["queued"] * 3
    stopped = [len(stack.ask(written, job=job)) for job in jobs]
    stack.worker.start()
    for job, count in zip(jobs, stopped, strict=True):
        wait_for(lambda job=job, count=count: len(stack.ask(written, job=job)) > count)
    gate.touch()
    rows = stack.wait_until_final(*jobs)
    assert succeeded(rows, crashes=0), rows
    assert [errors(row) for row in rows] == [[]] * 3
    for job, row in zip(jobs, rows, strict=True):
        assert stack.ask(written, job=job) == list(range(row["result"]))


@on_prefork
def test_a_body_whose_child_gets_sigterm_every_time_fails(stack, since):
    """The main process is not stopping, so each time counts as a crash."""
    start = time.monotonic()
    job = stack.enqueue("terminate", queue="cpu")
    [row] = stack.wait_until_final(job)
    since(start)
    assert (row["state"], row["error"]) == ("failed", "Its worker died 3 times")
    assert len(stack.notes("start", job)) == 3


@on_each_pool
def test_a_job_never_runs_twice_at_a_time_if_the_database_loses_its_claim(stack, gate, since):
    """PostgreSQL crashes before its log is on disk. Only the job of the dead worker runs again."""
    code = """
with transaction.atomic():
    connection.cursor().execute("SET LOCAL synchronous_commit = on")
    calls = [(gate, "cpu"), (other_gate, "cpu"), (gate, "io")]
    jobs = [Job.objects.enqueue(hold, [gate], queue=queue) for gate, queue in calls]
result = [job.pk for job in jobs]
"""
    other_gate = gate.with_name("other")
    stack.beat.stop()
    with unwritten_log(stack):
        jobs = stack.ask(code, gate=str(gate), other_gate=str(other_gate))
        stack.wait_until_started(*jobs)
        stack.worker.pause()
        stack.other.kill()
        start = time.monotonic()
        stack.database.kill()
        stack.database.start()
        assert [row["state"] for row in stack.rows(*jobs)] == ["queued"] * 3
        other_gate.touch()
        stack.worker.resume()
        for process in (stack.beat, stack.other):
            process.start()
        stack.wait_until_started(jobs[2], times=2)
        time.sleep(2 * LEASE)  # time for the other two to start again
        gate.touch()
        rows = stack.wait_until_final(*jobs)
        since(start)
    assert succeeded(rows, crashes=0), rows
    assert [len(stack.notes("start", job)) for job in jobs] == [1, 1, 2]


@contextmanager
def unwritten_log(stack):
    """Keep commits in memory: none waits for the disk, and the background writers are paused."""

    def alter(setting):
        stack.ask("connection.cursor().execute(f'ALTER SYSTEM {setting}')", setting=setting)
        stack.ask("connection.cursor().execute('SELECT pg_reload_conf()')")

    code = """
with connection.cursor() as cursor:
    cursor.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = ANY(%s)", [writers])
    result = [pid for [pid] in cursor]
"""
    writers = ["walwriter", "background writer", "checkpointer"]
    alter("SET synchronous_commit = off")
    stack.wait_until_final(stack.enqueue("quick"))  # now the workers' sessions use it
    for pid in stack.ask(code, writers=writers):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        alter("RESET synchronous_commit")


@on_prefork
def test_a_worker_ends_although_a_child_has_half_of_a_message(stack, since):
    """Celery waits for that child, and the child waits for the other half."""
    children = children_of(stack.worker.pid)
    for child in children:
        os.kill(child, signal.SIGSTOP)
    job = stack.enqueue("read", "x" * 1_000_000, queue="cpu")  # more than a pipe holds
    wait_for(lambda: not stack.messages_in("cpu"))
    time.sleep(1)  # the worker writes to a child

    start = time.monotonic()
    os.kill(stack.worker.pid, signal.SIGTERM)
    wait_for(lambda: "terminate all running tasks" in stack.worker.printed)
    for child in children:
        os.kill(child, signal.SIGCONT)
    stack.worker.wait()
    since(start)
    assert "a child does not end" in stack.worker.printed
    stack.worker.start()
    assert succeeded(stack.wait_until_final(job), crashes=0)


@on_each_pool
def test_a_worker_that_ran_only_plain_tasks_stops_in_time(stack, gate, since):
    """SOFT_SHUTDOWN_SECONDS applies to them too; an interrupted one is delivered again."""
    stack.worker.stop()
    stack.worker.start()
    task = stack.send("plain", gate, queue="cpu")
    stack.wait_until_started(task)
    # Run a later task, for the reason in test_a_stopped_worker_loses_nothing().
    later = stack.send("plain", ".", queue="cpu")
    wait_for(lambda: stack.notes("end", later))

    start = time.monotonic()
    assert stack.worker.stop() == 0
    since(start)
    gate.touch()
    stack.worker.start()
    wait_for(lambda: stack.notes("end", task))


@stacks(brokers=["redis"], pools=[pool for pool in POOLS if pool != "prefork"])
def test_a_worker_that_fails_waits_for_no_body(stack, gate):
    """Its exit code is 1, so a supervisor starts it again, and its jobs run at once."""
    worker = stack.make_worker("test", "failing", app="faults.failing")
    worker.start()
    job = stack.enqueue("hold", gate, queue="test")
    stack.wait_until_started(job)
    stack.broker.kill()
    assert worker.wait() == 1, worker.printed
    stack.broker.start()
    stack.make_worker("test", "next").start()
    stack.wait_until_started(job, times=2)
    gate.touch()
    assert succeeded(stack.wait_until_final(job), crashes=0)


@on_each
def test_a_frozen_worker_is_fenced(stack, gate, since):
    """Its job runs in another worker; when it continues, the outcome of its body is dropped."""
    job = stack.enqueue("hold", gate)
    first = stack.wait_until_started(job)
    [frozen] = [worker for worker in stack.workers if worker.pid == os.getpgid(first)]

    start = time.monotonic()
    frozen.pause()
    second = stack.wait_until_started(job, times=2)
    gate.with_name(f"gate-{first}").touch()
    frozen.resume()
    wait_for(lambda: first in stack.notes("end", job))
    time.sleep(1)  # time to store an outcome
    assert stack.row(job)["state"] == "running"  # in the other worker
    gate.touch()
    rows = stack.wait_until_final(job)
    since(start)

    assert second != first
    assert rows[0]["result"] == second
    assert succeeded(rows, crashes=1), rows


@on_each
def test_a_job_over_its_time_limit_fails(stack, gate, since):
    start = time.monotonic()
    job = stack.enqueue("hold_too_long", gate, queue="cpu")
    [row] = stack.wait_until_final(job)
    since(start)
    assert (row["state"], row["error"]) == ("failed", "Over its time limit")
    assert errors(row) == ["Over its time limit"]
    assert ran_once(stack, [job])
    gate.touch()  # in a thread the body still runs
    [row] = stack.wait_until_final(stack.enqueue("quick", queue="cpu"))
    assert succeeded([row], crashes=0), row


@pytest.fixture
def flower(stack):
    """Start Flower; return a function that calls its API."""
    [port] = free_ports(1)
    url, basic = f"http://127.0.0.1:{port}/api", {"Authorization": "Basic YWRtaW46c2VjcmV0"}

    def answers():
        try:
            return fetch(f"{url}/workers", None, basic)[0] == 200
        except OSError:
            return False

    command = f"celery -A config flower --address=127.0.0.1 --port={port} --basic-auth=admin:secret"
    flower = stack.process(command, name="flower", is_ready=answers)
    flower.start()

    def call(path, data):
        status, _, answer = fetch(f"{url}/task/{path}", data, basic)
        assert status == 200
        return answer

    return call


@pytest.fixture
def revoke(flower):
    """A function that revokes a task in Flower."""
    return lambda task, query="": flower(f"revoke/{task}{query}", {})


with_flower = [name for name in CHOICES["broker"] if chosen(broker=name).broker.flower]


@stacks(brokers=with_flower)
def test_a_revoke_from_flower_cancels(stack, gate, revoke, since):
    waits = stack.enqueue("hold", gate, queue="cpu", countdown=3600)
    runs = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(runs)
    start = time.monotonic()
    revoke(waits)
    revoke(runs)
    rows = stack.wait_until_final(waits, runs)
    since(start)
    assert [row["state"] for row in rows] == ["cancelled", "cancelled"]
    gate.touch()
    wait_for(lambda: stack.notes("end", runs))
    time.sleep(1)
    assert stack.row(runs)["state"] == "cancelled"
    assert stack.finals(waits, runs) == 2
    assert not stack.notes("start", waits)


@stacks(brokers=with_flower, pools=["prefork"])
def test_a_revoke_with_terminate_ends_only_this_task(stack, gate, revoke):
    revoked, task = stack.send("plain", gate, queue="cpu"), stack.send("plain", gate, queue="cpu")
    child, other = stack.wait_until_started(revoked), stack.wait_until_started(task)
    revoke(revoked, "?terminate=1")
    wait_for(lambda: not psutil.pid_exists(child))
    os.kill(other, signal.SIGKILL)
    gate.touch()
    wait_for(lambda: stack.notes("end", task))
    assert stack.notes("start", revoked) == [child]


@stacks(brokers=with_flower, pools=["prefork"])
def test_a_job_that_holds_its_own_row_can_be_terminated(stack, gate, revoke):
    """If its worker's loop waited for the lock, nothing would end the body."""
    job = stack.enqueue("hold_its_row", gate, queue="cpu")
    stack.wait_until_started(job)
    revoke(job, "?terminate=1")
    [row] = stack.wait_until_final(job)
    assert row["state"] == "cancelled"


# Other programs send tasks by name


@on_each
def test_a_task_that_another_app_sends_is_a_job(stack, gate, since):
    send = """
from celery import Celery
from config.celery import app
result = Celery.send_task(app, "faults.tasks.hold", [gate], queue="cpu").id
"""
    start = time.monotonic()
    job = stack.ask(send, gate=str(gate))
    stack.wait_until_started(job)
    assert stack.row(job)["state"] == "running"
    gate.touch()
    rows = stack.wait_until_final(job)
    since(start)
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, [job])


@on_one
def test_a_task_is_a_job_in_a_process_that_uses_no_view(stack):
    """A web process that has just started has not imported the tasks for a view yet."""
    send = """
from config.celery import app
print(app.send_task("faults.tasks.quick", countdown=60).id)
"""
    job = stack.project.shell(send, **{key: str(each) for key, each in stack.variables.items()})
    assert stack.row(job)["state"] == "queued"


@on_one
def test_a_task_that_flower_sends_is_a_job(stack, flower):
    job = flower("send-task/faults.tasks.quick", {"args": []})["task-id"]
    wait_for(lambda: stack.ask("result = Job.objects.filter(pk=job).exists()", job=job))
    rows = stack.wait_until_final(job)
    assert succeeded(rows, crashes=0), rows


# The broker


def check_tries(stack, start):
    """Each of the four web processes tries to send once and then pauses for ten seconds."""
    tries = stack.web.printed.count("stored but not sent")
    assert 0 < tries <= 4 * (1 + (time.monotonic() - start) // 10), stack.web.printed


@everywhere
def test_jobs_outlive_their_broker(stack, gate, tmp_path, since):
    """Bodies continue; retried and new jobs run as soon as the broker is back."""
    later = tmp_path / "later"
    sizes = {worker.log: worker.log.stat().st_size for worker in stack.workers}
    ends_without = stack.enqueue("hold", gate, queue="cpu")
    retries_without = stack.enqueue("hold_then_retry", gate, queue="io")
    ends_after = stack.enqueue("hold", later, queue="io")
    stack.wait_until_started(ends_without, retries_without, ends_after)
    stack.renew_web()
    with stack.supervised(stack.workers):
        stack.broker.kill()
        start = time.monotonic()
        posted = stack.post_many(50, "quick")  # raises if one gets no answer
        check_tries(stack, start)
        gate.touch()
        stack.wait_until_final(ends_without)
        stack.broker.start()
        start = time.monotonic()
        later.touch()
        ids = [job for job, _ in posted]
        jobs = [ends_without, retries_without, ends_after, *ids]
        rows = stack.wait_until_final(*jobs)
        since(start)
    assert succeeded(rows, crashes=0), rows
    starts = [len(stack.notes("start", job)) for job in jobs]
    # On gevent, a worker ends if queues are missing for a moment, as they are after a restart of
    # moto. It hands back the job of a body that has not ended soon after.
    has_ended = any(b"Unrecoverable error" in log.read_bytes()[sizes[log] :] for log in sizes)
    assert starts in ([1, 2, 1, *[1] * 50], [1, 2, 1 + has_ended, *[1] * 50])


# Not with gevent: its worker ends, and must be restarted, if queues are missing for a moment, as
# they are after a restart of moto.
@stacks(pools=[pool for pool in POOLS if pool != "gevent"])
def test_idle_workers_outlive_their_broker(stack, since):
    processes = [worker.pid for worker in stack.workers]
    stack.broker.kill()
    time.sleep(4)  # several polls
    stack.broker.start()
    start = time.monotonic()
    rows = stack.wait_until_final(*[stack.enqueue("quick", queue=name) for name in ["cpu", "io"]])
    since(start)
    assert succeeded(rows, crashes=0), rows
    assert [worker.pid for worker in stack.workers if worker.is_running()] == processes


@on_each_broker
def test_a_broker_that_hangs_delays_no_request(stack, record_property, since):
    """All requests are answered while it is paused."""
    stack.renew_web()
    stack.broker.pause()
    start = time.monotonic()
    posted = stack.post_many(50, "quick")
    record_property("slowest post", round(max(seconds for _, seconds in posted), 1))
    check_tries(stack, start)

    stack.broker.resume()
    start = time.monotonic()
    jobs = [job for job, _ in posted]
    with stack.supervised(stack.workers):
        rows = stack.wait_until_final(*jobs)
    since(start)
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, jobs)


@contextmanager
def posting(stack):
    """Post jobs until the block ends; yield the list of all that post_many() has returned."""
    posted, done = [], threading.Event()

    def post():
        while not done.is_set():
            posted.extend(stack.post_many(2, "quick"))

    with ThreadPoolExecutor(1) as thread:
        ending = thread.submit(post)
        try:
            yield posted
        finally:
            done.set()
        ending.result()


with_sentinel = stacks(brokers=["redis-sentinel"], pools=POOLS[:1])


@with_sentinel
def test_jobs_and_results_outlive_a_failover(stack, gate, since):
    """With Sentinel, TLS and passwords; requests are answered while there is no master."""
    ask_for_a_result = "sent = plain.delay(gate)\nsent.get(timeout=20)\nresult = sent.state"
    assert stack.ask(ask_for_a_result, gate="/") == "SUCCESS"
    stack.renew_web()
    runs = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(runs)
    what_flower_shows = """
from config.celery import app
workers = app.control.inspect(timeout=5)
result = [workers.stats() or {}, workers.conf(with_defaults=True) or {}]
"""
    with stack.supervised(stack.workers):  # a worker that held a message may end
        with posting(stack) as posted:
            wait_for(lambda: len(posted) > 20)
            master, count = stack.broker.master, len(posted)
            stack.broker.set_failover_delay(600)  # seconds: no failover yet
            master.kill()
            wait_for(lambda: len(posted) > count + 20)
            stack.broker.set_failover_delay(2)
            start = time.monotonic()
            wait_for(lambda: stack.broker.master is not master)
            stack.wait_until_final(stack.enqueue("quick", queue="io"))
            since(start)
            gate.touch()
        jobs = [runs, *[job for job, _ in posted]]
        rows = stack.wait_until_final(*jobs)
        assert stack.ask(ask_for_a_result, gate=str(gate)) == "SUCCESS"
        wait_for(lambda: [len(each) for each in stack.ask(what_flower_shows)] == [2, 2])
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, jobs)
    shown = str(stack.ask(what_flower_shows))
    assert "of/" not in shown and "of%2F" not in shown  # the passwords


@with_sentinel
def test_sentinel_without_the_name_of_its_master_is_refused(running):
    variables = {**running.variables, "REDIS_SENTINEL_MASTER": ""}
    with pytest.raises(AssertionError, match="ImproperlyConfigured.* REDIS_SENTINEL_MASTER"):
        running.project.manage("check", **variables)


@on_each_broker
def test_an_emptied_broker_loses_no_job(stack, since):
    """While the broker has their messages, almost none is sent again."""
    stack.other.stop()
    start = time.monotonic()
    jobs = [stack.enqueue("quick", queue="io") for _ in range(20)]
    time.sleep(RESEND + 1)
    more = stack.messages_in("io") - 20
    # A message that is being sent may look missing. And every RESEND seconds one job is sent again,
    # because the messages in the queue may belong to plain tasks.
    assert 0 <= more < 5 + (time.monotonic() - start) // RESEND
    stack.beat.pause()
    stack.empty("io")
    assert stack.messages_in("io") == 0

    stack.beat.resume()
    start = time.monotonic()
    stack.other.start()
    rows = stack.wait_until_final(*jobs)
    since(start)
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, jobs)


@on_each_broker
def test_copies_of_a_message_run_one_body(stack, gate):
    """Two workers get five copies each at the same moment."""
    code = """
from jobs.messages import send
jobs = [Job.objects.enqueue(hold, [gate], countdown=3600) for _ in range(3)]
for copy in range(5):
    for job in jobs:
        for job.queue in ["cpu", "io"]:
            send([job])
result = [job.pk for job in jobs]
"""
    jobs = stack.ask(code, gate=str(gate))
    stack.wait_until_started(*jobs)
    wait_for(lambda: stack.messages_in("cpu") + stack.messages_in("io") == 0)
    gate.touch()
    rows = stack.wait_until_final(*jobs)
    marker = stack.enqueue("quick", queue="cpu")  # behind all copies
    stack.wait_until_final(marker)
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, jobs)


@on_one
def test_an_old_message_does_not_shorten_the_pause_after_a_crash(stack, gate):
    job = stack.enqueue("hold", gate, queue="cpu")
    os.kill(stack.wait_until_started(job), signal.SIGKILL)
    wait_for(lambda: stack.row(job)["crashes"] == 1)
    code = """
from jobs.messages import send
copy = Job.objects.get(pk=job)
copy.crashes = 0
send([copy])
"""
    stack.ask(code, job=job)
    gate.touch()
    rows = stack.wait_until_final(job)
    assert succeeded(rows, crashes=1), rows
    code = """
job = Job.objects.get(pk=job)
result = (job.started_at - job.failures.get().ended_at).total_seconds()
"""
    assert stack.ask(code, job=job) > 3.5  # the pause is 5 s, more or less a fifth


# Web, Beat and the database


@on_each_broker
def test_a_web_killed_between_commit_and_publish_loses_no_job(stack, since):
    start = time.monotonic()
    with pytest.raises(OSError):
        stack.post("quick", key="killed", die=True)
    [job] = stack.ask(
        'result = list(Job.objects.filter(idempotency_key="killed").values_list("pk", flat=True))'
    )
    rows = stack.wait_until_final(job)
    since(start)
    assert succeeded(rows, crashes=0), rows
    assert stack.post("quick", key="killed") == job


@on_each_broker
def test_without_beat_jobs_may_wait_but_none_is_lost(stack, gate, since):
    """New jobs run. A job whose worker died is recovered once Beat is back."""
    stack.beat.kill()
    lost = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(lost)
    stack.worker.kill()
    stack.worker.start()
    [row] = stack.wait_until_final(stack.enqueue("quick", queue="cpu"))
    assert succeeded([row], crashes=0), row
    gate.touch()
    time.sleep(LEASE + 1)
    assert stack.row(lost)["state"] == "running"

    start = time.monotonic()
    stack.beat.start()
    rows = stack.wait_until_final(lost)
    since(start)
    assert succeeded(rows, crashes=1), rows


@on_each
def test_a_restarted_database_loses_no_job(stack, gate, since):
    """An outcome is stored as soon as the database is back; no lease ends before."""
    jobs = [stack.enqueue("hold", gate, queue=queue) for queue in ["cpu", "io"]]
    jobs.append(stack.enqueue("count", gate, queue="cpu"))
    stack.wait_until_started(*jobs)
    stack.database.kill()
    gate.touch()
    time.sleep(LEASE + 1)
    stack.database.start()
    start = time.monotonic()
    rows = stack.wait_until_final(*jobs)
    since(start)
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, jobs)
    number, cursor = rows[2]["result"]
    assert number == cursor > 0


# Other settings


@without_resends
def test_a_killed_worker_loses_no_job_with_the_default_timings(stack, gate, since):
    kill_a_worker(stack, gate, since)


@without_resends
def test_a_worker_of_old_code_delays_no_new_task(stack, since):
    """In a rolling deploy it receives messages of a task that it does not know, and drops them."""
    stack.other.stop()
    old = stack.make_worker("io", "old", OLD_CODE=1)
    old.start()
    jobs = [stack.enqueue("new", queue="io") for _ in range(5)]
    wait_for(lambda: old.printed.count("unregistered task") == 5)
    old.stop()
    start = time.monotonic()
    stack.other.start()
    rows = stack.wait_until_final(*jobs)
    since(start)
    assert succeeded(rows, crashes=0), rows


@without_resends
def test_a_beat_of_old_code_sends_the_jobs_of_new_tasks(stack, since):
    """In a rolling deploy, Beat may be the last process that gets the new code."""
    stack.replace_beat(OLD_CODE=1)
    start = time.monotonic()
    jobs = [stack.enqueue("new", queue="io", countdown=1) for _ in range(5)]
    rows = stack.wait_until_final(*jobs)
    since(start)
    assert succeeded(rows, crashes=0), rows


@stacks(**ONE, sqlite=True)
def test_a_killed_worker_loses_no_job_on_sqlite(stack, gate, since):
    kill_a_worker(stack, gate, since)


def kill_a_worker(stack, gate, since):
    job = stack.enqueue("hold", gate)
    worker = os.getpgid(stack.wait_until_started(job))
    [killed] = [worker_ for worker_ in stack.workers if worker_.pid == worker]
    killed.kill()
    start = time.monotonic()
    gate.touch()
    rows = stack.wait_until_final(job)
    since(start)
    assert succeeded(rows, crashes=1), rows


# A read-only database, as in a failover


@on_each_pool
def test_a_read_only_database_loses_no_job(stack, gate, since):
    """Outcomes are stored as soon as writes work; no body runs twice, no crash is counted."""

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
    start = time.monotonic()
    rows = stack.wait_until_final(*jobs)
    since(start)
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, jobs)
