"""Beside other jobs and in odd conditions no job is lost, run twice or blamed for another's crash.

Real processes, as in test_faults.py, with the same property `seconds`.
"""

import json
import os
import re
import signal
import time
from collections import Counter

import psutil
import pytest

from harness.faults import (
    ONE,
    POOLS,
    errors,
    on_each_broker,
    on_each_pool,
    on_one,
    on_prefork,
    ran_once,
    stacks,
    succeeded,
    without_resends,
)
from harness.mails import Mails
from harness.pages import blocks
from harness.project import children_of, wait_for
from harness.stack import LEASE

on_rabbitmq = stacks(brokers=["rabbitmq"], pools=POOLS[:1])
where_jobs_share_a_process = stacks(ONE["brokers"], [pool for pool in POOLS if pool != "prefork"])


# Beside other jobs


@on_each_broker
def test_a_lost_message_is_noticed_in_a_queue_that_is_never_empty(stack, gate, since):
    """It always holds messages of plain tasks."""
    stack.ask("for _ in range(30): circle.delay(gate, 0.2)", gate=str(gate))
    start = time.monotonic()
    with pytest.raises(OSError):
        stack.post("quick", key="lost", die=True)
    code = 'result = [job.pk for job in Job.objects.filter(idempotency_key="lost")]'
    [job] = stack.ask(code)
    try:
        rows = stack.wait_until_final(job)
        since(start)
        assert stack.messages_in("celery") > 5
    finally:
        gate.touch()
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, [job])
    wait_for(lambda: stack.messages_in("celery") == 0)  # so that the next test does not wait


@on_each_broker
def test_a_queue_that_the_broker_refuses_stops_no_other(stack, gate, since):
    """Other queues still get new jobs, jobs with a countdown, and retries."""
    refuse = "from config.celery import app\nwith app.connection_for_write() as broker:\n"
    stack.ask(f"{refuse}    channel = broker.default_channel\n    {stack.broker.refuse}")
    refused = [stack.enqueue("quick", queue="refused") for _ in range(5)]
    time.sleep(1)  # some rounds of the sweep
    gate.touch()
    start = time.monotonic()
    jobs = [stack.enqueue("quick", queue="cpu", countdown=1) for _ in range(5)]
    jobs += [stack.enqueue("quick", queue="io"), stack.enqueue("hold_then_retry", gate, queue="io")]
    rows = stack.wait_until_final(*jobs)
    since(start)
    assert succeeded(rows, crashes=0), rows
    assert [row["state"] for row in stack.rows(*refused)] == ["queued"] * 5
    stack.ask("Job.objects.filter(pk__in=jobs).delete()", jobs=refused)


@on_each_broker
def test_a_worker_whose_slots_were_full_fetches_the_next_jobs_without_a_pause(stack, since):
    """250 short jobs on 4 slots. By default Kombu's SQS pauses for a second after every eight."""
    start = time.monotonic()
    jobs = stack.ask(
        "result = [j.pk for j in Job.objects.enqueue_many(quick, [[]] * 250, queue='cpu')]"
    )
    rows = stack.wait_until_final(*jobs)
    since(start)
    assert succeeded(rows, crashes=0), rows
    code = """
starts = sorted(Job.objects.filter(pk__in=jobs).values_list("started_at", flat=True))
result = [(later - at).total_seconds() for at, later in zip(starts, starts[1:])]
"""
    pauses = [seconds for seconds in stack.ask(code, jobs=jobs) if seconds > 0.9]
    assert len(pauses) < 15, pauses  # it would be 31


@without_resends
def test_jobs_with_outdated_arguments_fail_and_delay_no_other(stack, since):
    """They were stored before their task's signature changed."""
    code = """
jobs = [job.pk for job in Job.objects.enqueue_many(quick, [[]] * 40, countdown=2)]
for position, args in enumerate(jobs[:30]):
    args, kwargs = ([], {"gone": 1}) if position % 2 else (["one too many"], {})
    Job.objects.filter(pk=jobs[position]).update(args=args, kwargs=kwargs)
result = jobs
"""
    start = time.monotonic()
    jobs = stack.ask(code)
    rows = stack.wait_until_final(*jobs[30:])
    assert succeeded(rows, crashes=0), rows
    rows = stack.wait_until_final(*jobs[:30])
    since(start)
    assert {(row["state"], row["crashes"]) for row in rows} == {("failed", 0)}, rows
    assert all("argument" in row["error"] for row in rows), rows
    assert all("gone" in row["error"] for row in rows[1::2]), rows


@where_jobs_share_a_process
def test_a_job_that_kills_its_process_fails_alone(stack, since):
    """Each time 15 others run in the same process, and they still succeed."""
    start = time.monotonic()
    innocents = [stack.enqueue("rest", 2, queue="cpu") for _ in range(15)]
    killer = stack.enqueue("die", 1, queue="cpu")
    with stack.supervised():
        [row] = stack.wait_until_final(killer)
        rows = stack.wait_until_final(*innocents)
    since(start)
    assert (row["state"], row["error"]) == ("failed", "Its worker died 3 times")
    assert {row["state"] for row in rows} == {"succeeded"}, rows


@on_one
def test_jobs_of_delay_and_apply_async_outlive_their_workers(stack, gate, since):
    """They are jobs like any other, and AsyncResult reads how they ended."""
    jobs = [stack.ask("result = hold.delay(gate).id", gate=str(gate))]
    code = "result = hold.apply_async([gate], queue='cpu', countdown=1).id"
    jobs.append(stack.ask(code, gate=str(gate)))
    stack.wait_until_started(*jobs)
    for worker in stack.workers:
        worker.kill()
    start = time.monotonic()
    gate.touch()
    for worker in stack.workers:
        worker.start()
    assert succeeded(stack.wait_until_final(*jobs), crashes=1)
    since(start)
    assert stack.ask("result = hold.AsyncResult(job).state", job=jobs[0]) == "SUCCESS"


@on_each_pool
def test_a_retry_in_a_transaction_is_not_rolled_back(stack, since):
    start = time.monotonic()
    job = stack.enqueue("retry_in_a_transaction")
    [row] = stack.wait_until_final(job)
    since(start)
    assert succeeded([row], crashes=0)
    assert len(stack.notes("start", job)) == 2


@on_each_pool
def test_each_run_that_failed_says_why(stack, since):
    """Also each run that was retried."""
    start = time.monotonic()
    jobs = [stack.enqueue(task) for task in ["fail_twice", "fail_and_continue"]]
    rows = stack.wait_until_final(*jobs)
    since(start)
    assert [row["state"] for row in rows] == ["failed", "succeeded"]
    assert [errors(row) for row in rows] == [["OSError: away"] * 2, ["OSError: away"]]
    failures = [failure for row in rows for failure in row["failures"]]
    assert all('raise OSError("away")' in failure["traceback"] for failure in failures), failures


def control(stack, *words):
    stack.project.call(".venv/bin/celery", "-A", "config", "control", *words, **stack.variables)


@on_one
def test_celery_control_terminate_cancels(stack, gate, since):
    job = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(job)
    start = time.monotonic()
    control(stack, "terminate", "SIGTERM", job)
    [row] = stack.wait_until_final(job)
    since(start)
    assert row["state"] == "cancelled"


@on_each_pool
def test_a_revoke_during_a_database_outage_cancels(stack, gate, since):
    waits = stack.enqueue("hold", gate, queue="cpu", countdown=3600)
    runs = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(runs)
    stack.database.kill()
    control(stack, "revoke", waits, runs)
    wait_for(lambda: all("flagged as revoked" in worker.printed for worker in stack.workers))
    stack.database.start()
    start = time.monotonic()
    rows = stack.wait_until_final(waits, runs)
    since(start)
    assert [row["state"] for row in rows] == ["cancelled", "cancelled"]


# Resumed jobs, and long transactions


@on_each_pool
def test_a_newsletter_continues_where_its_worker_was_killed(stack, since, record_property):
    """Everybody gets it, and at most one chunk of 100 gets it twice."""
    count = int(os.environ.get("MAILS", "1000"))
    code = """
from orders.models import Newsletter, Recipient
from orders.tasks import send_newsletter
newsletter = Newsletter.objects.create(subject="News", body="All is well.")
emails = [f"{number}@example.com" for number in range(count)]
Recipient.objects.bulk_create(Recipient(newsletter=newsletter, email=email) for email in emails)
result = Job.objects.enqueue(send_newsletter, [newsletter.pk], queue="news").pk
"""
    with Mails(count // 2 + 50) as mails:  # in the middle of a chunk
        worker = stack.make_worker("news", "news", EMAIL_URL=mails.url)
        worker.start()
        job = stack.ask(code, count=count)
        wait_for(lambda: len(mails.received) == mails.count)
        worker.kill()
        start = time.monotonic()
        mails.proceed.set()
        worker.start()
        rows = stack.wait_until_final(job)
        since(start)
    record_property("mails", f"killed after {mails.count}, {len(mails.received)} in all")
    assert succeeded(rows, crashes=1), rows
    assert len(Counter(mails.received)) == count == rows[0]["result"]["sent"]
    assert len(mails.received) - count <= 100


@on_each_pool
def test_a_job_is_not_taken_over_during_a_transaction_longer_than_its_lease(stack, since):
    """The transaction locks the row: nothing can renew the lease, but no sweep may take the job."""
    start = time.monotonic()
    seconds = [LEASE + 1.5 + more / 4 for more in range(4)]
    jobs = [stack.enqueue("commit_slowly", 3, each, queue="cpu") for each in seconds]
    rows = stack.wait_until_final(*jobs)
    since(start)
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, jobs)


# Locked or paused for longer than a lease


@on_each_pool
def test_a_job_with_a_locked_row_runs_once_and_stops_no_other(stack, gate, since):
    """One row is locked by another connection, one by its own body."""
    jobs = [stack.enqueue("hold", gate, queue="cpu") for _ in range(3)]
    jobs.append(stack.enqueue("hold_its_row", gate, queue="cpu"))
    stack.wait_until_started(*jobs)
    with stack.locked(f"SELECT FROM jobs_job WHERE id = '{jobs[0]}' FOR UPDATE"):
        time.sleep(LEASE + 1)
        start = time.monotonic()
        [other] = stack.wait_until_final(stack.enqueue("quick", queue="io", countdown=1))
        since(start)
    time.sleep(1)  # some rounds of the sweep
    gate.touch()
    rows = stack.wait_until_final(*jobs)
    assert succeeded([other, *rows], crashes=0), rows
    assert ran_once(stack, jobs)


@where_jobs_share_a_process
def test_a_body_that_locks_its_row_does_not_delay_a_stop(stack, gate, since):
    """The others are handed back before their leases lapse."""
    holder = stack.enqueue("hold_its_row", gate, queue="cpu")
    jobs = [stack.enqueue("hold", gate, queue="cpu") for _ in range(10)]
    stack.wait_until_started(holder, *jobs)
    start = time.monotonic()
    assert stack.worker.stop() == 0
    since(start)
    assert {row["state"] for row in stack.rows(*jobs)} == {"queued"}
    gate.touch()
    stack.worker.start()
    rows = stack.wait_until_final(holder, *jobs)
    assert {row["state"] for row in rows} == {"succeeded"}, rows
    assert [row["crashes"] for row in rows] == [1, *[0] * 10]


@stacks(brokers=ONE["brokers"], pools=["gevent"])
def test_outcomes_that_wait_for_a_lock_stop_no_other_job(stack, gate, since):
    """Ten wait: as many as there are threads that store outcomes."""
    jobs = [stack.enqueue("hold", gate, queue="cpu") for _ in range(10)]
    stack.wait_until_started(*jobs)
    with stack.locked(f"SELECT FROM jobs_job WHERE id IN {tuple(jobs)} FOR UPDATE"):
        gate.touch()
        wait_for(lambda: all(stack.notes("end", job) for job in jobs))
        start = time.monotonic()
        others = [stack.enqueue("quick", queue="cpu") for _ in range(20)]
        rows = stack.wait_until_final(*others)
        since(start)
    rows += stack.wait_until_final(*jobs)
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, [*jobs, *others])


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
    rows = stack.wait_until_final(*jobs)
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, jobs)


@pytest.mark.parametrize("mode", ["ACCESS EXCLUSIVE", "SHARE"])
@on_each_pool
def test_a_locked_table_lets_no_job_run_twice(stack, gate, since, mode):
    """A migration takes such a lock. CREATE INDEX takes SHARE, so that the sweep can read rows."""
    jobs = hold_eight(stack, gate)
    with stack.locked(f"LOCK TABLE jobs_job IN {mode} MODE"):
        time.sleep(LEASE + 2)
    start = time.monotonic()
    check_eight(stack, gate, jobs)
    since(start)


@on_one
def test_a_router_with_a_replica_stops_no_job(stack, since):
    """All reads go to a connection that cannot write. Beat, too, has a part in this job."""
    variables = {"DJANGO_SETTINGS_MODULE": "faults.replica"}
    stack.replace_worker(**variables)
    stack.replace_beat(**variables)
    code = """
from faults.tasks import *
job = Job.objects.enqueue(fail_twice, queue="cpu", countdown=1)
job.refresh_from_db()
print(job.pk)
"""
    start = time.monotonic()
    [row] = stack.wait_until_final(stack.project.shell(code, **stack.variables, **variables))
    since(start)
    assert errors(row) == ["OSError: away"] * 2


@on_each_pool
def test_a_paused_database_lets_no_job_run_twice(stack, gate, since):
    jobs = hold_eight(stack, gate)
    stack.database.pause()
    time.sleep(LEASE + 2)
    stack.database.resume()
    start = time.monotonic()
    check_eight(stack, gate, jobs)
    since(start)


@on_each_pool
def test_a_paused_machine_lets_no_job_run_twice(stack, gate, since):
    """Any process may be the first to continue; after the database, here it is Beat."""
    jobs = hold_eight(stack, gate)
    processes = [stack.database, stack.beat, *stack.workers]
    for process in reversed(processes):
        process.pause()
    time.sleep(LEASE + 2)
    start = time.monotonic()
    for process in processes:
        process.resume()
        time.sleep(0.2)
    check_eight(stack, gate, jobs)
    since(start)


@on_prefork
def test_a_body_that_holds_the_gil_keeps_its_job(stack, since):
    start = time.monotonic()
    job = stack.enqueue("hold_the_interpreter", LEASE + 4, queue="cpu")
    rows = stack.wait_until_final(job)
    since(start)
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, [job])


@on_prefork
def test_an_outage_after_a_body_counts_towards_no_time_limit(stack, gate, since):
    """The outage takes 11 s, and the soft time limit is 10 s."""
    jobs = [
        stack.enqueue("hold_softly", gate, queue="cpu"),
        stack.enqueue("hold_softly", gate, "its own reason", queue="cpu"),
    ]
    stack.wait_until_started(*jobs)
    stack.database.kill()
    gate.touch()
    time.sleep(11)
    stack.database.start()
    start = time.monotonic()
    rows = stack.wait_until_final(*jobs)
    since(start)
    assert [row["state"] for row in rows] == ["succeeded", "failed"], rows
    assert rows[1]["error"] == "ValueError: its own reason"
    assert ran_once(stack, jobs)


@on_prefork
def test_a_broker_lost_while_a_child_reads_a_large_message_blocks_nothing(stack, since):
    """The worker ends, the child waits for the rest, and Celery alone would wait for it forever."""
    children = children_of(stack.worker.pid)
    for child in children:
        os.kill(child, signal.SIGSTOP)  # so that the message is not written at once
    code = "result = Job.objects.enqueue(read, ['x' * 2_000_000], queue='cpu').pk"
    jobs = [stack.ask(code)]
    wait_for(lambda: stack.messages_in("cpu") == 0)
    time.sleep(1)  # the first part is written
    stack.broker.kill()
    stack.broker.start()
    start = time.monotonic()
    for child in children:
        os.kill(child, signal.SIGCONT)
    jobs.append(stack.enqueue("quick", queue="cpu"))
    with stack.supervised(stack.workers):
        rows = stack.wait_until_final(*jobs)
    since(start)
    assert succeeded(rows, crashes=0), rows
    assert ran_once(stack, jobs)


@on_prefork
def test_an_idle_worker_opens_no_connections_to_the_database(stack):
    """Meanwhile the main process of each worker checks eight times for leases to renew."""
    code = """
with connection.cursor() as cursor:
    cursor.execute("SELECT sessions FROM pg_stat_database WHERE datname = current_database()")
    [result] = cursor.fetchone()
"""
    time.sleep(2)  # PostgreSQL updates its counters with a delay
    before = stack.ask(code)
    time.sleep(8 * LEASE / 3)
    assert stack.ask(code) - before < 8  # others may reconnect after CONN_MAX_AGE


@stacks(brokers=ONE["brokers"], pools=["gevent"])
def test_the_queries_of_a_gevent_worker_share_ten_connections(stack):
    """Although gevent ends idle threads: here after 0.1 s, by default after 5 s."""
    worker = stack.replace_worker(GEVENT_THREADPOOL_IDLE_TASK_TIMEOUT=0.1)
    for _ in range(5):
        jobs = [stack.enqueue("rest", 1, queue="cpu") for _ in range(12)]
        assert succeeded(stack.wait_until_final(*jobs), crashes=0)
    opened = psutil.Process(worker.pid).net_connections()
    remote = [connection.raddr for connection in opened if connection.raddr]
    assert [address.port for address in remote].count(stack.database.port) <= 12


# The pools differ


@on_prefork
def test_a_time_limit_ends_a_plain_task_that_computes(stack):
    task = stack.send("compute", queue="cpu", time_limit=2, soft_time_limit=1)
    child = stack.wait_until_started(task)
    wait_for(lambda: not psutil.pid_exists(child))
    stack.wait_until_final(*[stack.enqueue("quick", queue="cpu") for _ in range(20)])
    assert stack.worker.is_running()
    assert stack.notes("start", task) == [child]


@on_prefork
def test_a_soft_time_limit_ends_a_body_that_waits_for_a_query(stack, since):
    """After one run, and without a crash, also in the body's own transaction."""
    start = time.monotonic()
    jobs = [stack.enqueue("query_too_long", *block, queue="cpu") for block in [(), ("in a block",)]]
    rows = stack.wait_until_final(*jobs)
    since(start)
    outcome = ("failed", "Over its time limit", 0)
    assert [(row["state"], row["error"], row["crashes"]) for row in rows] == [outcome] * 2
    assert ran_once(stack, jobs)


@on_prefork
def test_a_child_that_uses_too_much_memory_is_replaced_after_its_task(stack, gate):
    gate.touch()
    stack.replace_worker(WORKER_MAX_KILOBYTES=1, WORKER_CONCURRENCY=1)
    rows = stack.wait_until_final(*[stack.enqueue("hold", gate, queue="cpu") for _ in range(3)])
    assert len({row["result"] for row in rows}) == 3, rows  # ids of processes


@stacks(brokers=ONE["brokers"], pools=["threads"])
def test_a_thread_over_its_time_limit_continues(stack, gate):
    """A plain task to its end, a job to its next report."""
    task = stack.send("plain", gate, queue="cpu", time_limit=2, soft_time_limit=1)
    job = stack.enqueue("report_too_long", queue="cpu")
    stack.wait_until_started(job, task)
    [row] = stack.wait_until_final(job)
    assert (row["state"], row["error"]) == ("failed", "Over its time limit")
    wait_for(lambda: stack.notes("end", job))
    gate.touch()
    wait_for(lambda: stack.notes("end", task))
    assert len(stack.notes("start", task)) == 1


@stacks(brokers=ONE["brokers"], pools=["gevent"])
def test_a_greenlet_has_no_soft_time_limit(stack):
    """This one is 1 s. The hard one works: see test_a_job_over_its_time_limit_fails()."""
    rows = stack.wait_until_final(stack.enqueue("rest_softly", 3, queue="cpu"))
    assert succeeded(rows, crashes=0), rows


@stacks(brokers=ONE["brokers"], pools=["gevent"])
def test_a_greenlet_that_blocks_makes_all_others_wait(stack):
    blocks = stack.enqueue("block", 3, queue="cpu")
    stack.wait_until_started(blocks)
    other = stack.enqueue("quick", queue="cpu")
    stack.wait_until_final(blocks, other)
    noted = [line.split()[:2] for line in stack.notes_file.read_text().splitlines()]
    assert noted.index(["end", blocks]) < noted.index(["start", other])


# Odd outcomes


ODD = {  # task: the allowed states, and words of the error
    "raise_mute": ({"failed"}, "Mute"),
    "raise_retry": ({"failed"}, "etry"),
    "retry_with_an_object": ({"failed"}, "not JSON"),
    "retry_in_a_queue_with_a_long_name": ({"failed"}, "too long"),
    "return_nested": ({"failed"}, "result"),
    "return_what_no_database_takes": ({"failed"}, "result"),
    "leave_a_transaction": ({"succeeded", "failed"}, "transaction"),
    "leave_an_aborted_transaction": ({"succeeded", "failed"}, "transaction"),
}


@on_each_pool
def test_odd_outcomes_end_a_job(stack, since):
    """After one run, with the true reason."""
    start = time.monotonic()
    jobs = [stack.enqueue(task, queue="cpu") for task in ODD]
    rows = stack.wait_until_final(*jobs)
    since(start)
    for (states, words), row in zip(ODD.values(), rows, strict=True):
        assert row["state"] in states, rows
        assert row["state"] == "succeeded" or words in row["error"], rows
    assert ran_once(stack, jobs)
    [row] = stack.wait_until_final(stack.enqueue("quick", queue="cpu"))
    assert succeeded([row], crashes=0), row


@on_one
def test_a_retry_in_the_far_future_does_not_break_the_lists_of_jobs(stack):
    """Python cannot read a time after the year 9999."""
    with pytest.raises(AssertionError, match="ValueError"):
        stack.enqueue("quick", countdown=1.7e12)  # milliseconds, by mistake
    job = stack.post("retry_after", "1e12")
    stack.wait_until_started(job)
    wait_for(lambda: stack.row(job)["state"] == "queued")
    code = """
from django.test import Client
from users.models import User
admin = Client(raise_request_exception=False, HTTP_HOST="127.0.0.1")
admin.force_login(User.objects.create_superuser("superuser"))
result = admin.get("/admin/jobs/job/").status_code
"""
    assert (stack.send_raw("jobs/", None)[0], stack.ask(code)) == (200, 200)


@on_prefork
def test_a_database_setting_of_a_body_stops_no_other(stack):
    """The jobs run in the same child, one after the other."""
    stack.make_worker("alone", "alone", WORKER_CONCURRENCY=1).start()
    odd, others = [], []
    for setting in ["search_path=''", "default_transaction_read_only=on"]:
        odd.append(stack.enqueue("set_session", setting, queue="alone"))
        others += [stack.enqueue("quick", queue="alone") for _ in range(3)]
    stack.wait_until_final(*odd, *others)
    assert succeeded(stack.rows(*others), crashes=0)
    assert ran_once(stack, odd + others)


@on_each_pool
def test_a_report_in_a_thread_of_a_body_is_refused(stack):
    """It would silently store nothing, and a cancel would not end it."""
    [row] = stack.wait_until_final(stack.enqueue("report_in_a_thread", queue="cpu"))
    assert all("RuntimeError" in error for error in row["result"]), row


@on_one
def test_a_long_error_is_cut(stack):
    job = stack.post("raise_at_length", 20_000_000)
    [row] = stack.wait_until_final(job)
    assert row["error"].startswith("ValueError: xxx")
    assert len(row["error"]) <= 10_000
    assert len(stack.send_raw("jobs/", None)[1]) < 1_000_000


@on_one
def test_long_results_are_not_in_the_list(stack):
    """The details have them. The page polls the list every 1.5 s."""
    jobs = [stack.post("return_at_length", 5_000_000) for _ in range(20)]
    code = "result = Job.objects.filter(pk__in=jobs, state='succeeded').count()"
    wait_for(lambda: stack.ask(code, jobs=jobs) == 20)
    status, shown = stack.send_raw("jobs/", None)
    assert (status, len(json.loads(shown)["results"])) == (200, 20)
    assert len(shown) < 1_000_000
    detail = json.loads(stack.send_raw(f"jobs/{jobs[0]}/", None)[1])
    assert len(detail["result"]) == 5_000_000


# Workers with several pools


@on_each_pool
def test_workers_with_different_pools_run_side_by_side(stack, gate, since, request):
    """Prefork, threads and the project's own. If one is killed or stops, another runs its jobs."""
    own = request.node.callspec.params["running"]["pool"]
    pools = sorted({"prefork", "threads", own})

    def start(pool, queue):
        worker = stack.make_worker(queue, f"{pool}-{queue}", pool)
        worker.start()
        assert re.search(r"concurrency: \d+ \((\w+)\)", worker.printed)[1] in pool
        return worker

    first = [start(pool, queue=pool) for pool in pools]
    jobs = [stack.enqueue("hold", gate, queue=pool) for pool in pools for _ in range(3)]
    stack.wait_until_started(*jobs)
    for worker in first:
        worker.kill()
    began = time.monotonic()
    second = [start(pools[place - 1], queue) for place, queue in enumerate(pools)]
    stack.wait_until_started(*jobs, times=2)
    since(began)
    for worker in second:
        os.kill(worker.pid, signal.SIGTERM)
    for worker in second:
        assert worker.wait() == 0, worker.printed
    assert {row["state"] for row in stack.rows(*jobs)} == {"queued"}  # handed back, no lease lapsed
    third = [start(pool, queue=pool) for pool in pools]
    stack.wait_until_started(*jobs, times=3)
    gate.touch()
    assert succeeded(stack.wait_until_final(*jobs), crashes=1)
    for worker in third:
        worker.stop()


# Periodic tasks


@on_one
def test_two_beats_start_a_job_once(stack):
    """The second one starts half a second later; both schedule the job every second."""
    started = "Job.objects.filter(task='faults.tasks.tick')"
    stack.ask(f"{started}.delete()")
    beats = []
    for name in ["first", "second"]:
        command = f"celery -A faults.every_second beat -s {stack.folder}/{name}"
        beats.append(stack.process(command, name))
        beats[-1].launch()
        wait_for(lambda: " is starting." in beats[-1].printed)
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


@on_one
def test_a_beat_that_hangs_touches_no_liveness_file(stack, tmp_path):
    """The sweep, another thread, continues, so Sweep.ended_at does not show that Beat hangs."""
    file = tmp_path / "alive"
    beat = stack.replace_beat("faults.hanging_beat", LIVENESS_FILE=file)
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


# Plain tasks that kill their worker each time, and dead letters


@stacks(brokers=["redis"], pools=POOLS[:1])
def test_a_plain_task_that_kills_its_worker_is_delivered_without_end(stack, gate):
    """More often than a job, which fails after three crashes, and than its max_retries, three."""
    task = stack.send("kill_worker", gate, queue="cpu")
    with stack.supervised(stack.workers):
        stack.wait_until_started(task, times=4)
        gate.touch()
        stack.wait_until_started(task, times=5)


@stacks(brokers=["redis"], pools=POOLS[:1])
def test_a_worker_killed_while_it_looks_for_lost_tasks_delays_no_other(stack, gate):
    """It leaves kombu's lock behind, which only one worker can hold."""
    code = """
from config.celery import app
channel = app.connection_for_write().default_channel
lock = channel.client.lock(channel.unacked_mutex_key, timeout=channel.unacked_mutex_expire)
while not lock.acquire(blocking=False):
    pass
result = lock.timeout
"""
    task = stack.send("kill_worker", gate, queue="cpu")
    with stack.supervised(stack.workers):
        stack.wait_until_started(task)
        gate.touch()
        assert stack.ask(code) < 60  # the minute of reliability.md
        stack.wait_until_started(task, times=2)


@stacks(brokers=["sqs"], pools=POOLS[:1])
def test_ten_deliveries_make_a_dead_letter(stack):
    """No worker reads the queue `test`. Here the visibility timeout of a delivery is 0."""
    task = stack.send("plain", ".", queue="test")
    code = """
import boto3
from django.conf import settings
sqs, messages = boto3.client("sqs"), []
queue = settings.SQS_ADDRESS + "-test"
while found := sqs.receive_message(QueueUrl=queue, VisibilityTimeout=0).get("Messages"):
    messages += found
dead = sqs.receive_message(QueueUrl=settings.SQS_ADDRESS + "-dead").get("Messages", [])
result = [len(messages), [message["Body"] == messages[0]["Body"] for message in dead]]
"""
    assert task and stack.ask(code) == [10, [True]]


@stacks(brokers=["sqs"], pools=POOLS[:1])
def test_a_queue_must_be_created_before_it_is_used(stack):
    with pytest.raises(AssertionError, match="UndefinedQueueException"):
        stack.send("plain", ".", queue="new")


@stacks(brokers=["rabbitmq"], pools=POOLS[:1])
def test_the_queues_are_replicated(stack):
    """RabbitMQ replicates quorum queues. Those of remote control and events need no replica."""
    lines = stack.broker.control("--silent", "list_queues", "name", "type").splitlines()
    types = dict(line.split("\t") for line in lines)
    assert {types[queue] for queue in ("celery", "cpu", "io")} == {"quorum"}


@on_rabbitmq
def test_a_dead_letter_is_kept_and_can_be_sent_again(stack):
    """With rabbitmq.json, which names no queue of tasks, and with the code in docs/workers.md."""
    page = stack.project.read("docs/workers.md")
    [again] = [block.code for block in blocks("docs/workers.md", page) if "x-death" in block.code]
    stack.broker.control("import_definitions", stack.project / "rabbitmq.json")
    try:
        stack.send("circle", ".", 0, queue="reports")
        deliver = """
from config.celery import app
with app.connection_for_write() as broker:
    channel = broker.default_channel
    if message := channel.basic_get("reports"):
        channel.basic_reject(message.delivery_tag, requeue=True)
result = bool(message)
"""
        deliveries = sum(stack.ask(deliver) for _ in range(30))
        assert deliveries == 21
        wait_for(lambda: stack.messages_in("dead-letters") == 1)
        assert stack.messages_in("reports") == 0
        stack.ask(again)
        assert (stack.messages_in("dead-letters"), stack.messages_in("reports")) == (0, 1)
    finally:
        stack.broker.control("clear_policy", "dead-letters")


@on_rabbitmq
def test_the_policy_for_dead_letters_covers_the_queues_of_tasks_and_no_others(stack):
    """The others are Celery's, for countdowns, events and remote control, and the dead letters."""
    declare = """
from config.celery import app
with app.connection_for_write() as broker:
    app.amqp.queues["reports"](broker.default_channel).declare()
"""
    stack.ask(declare)
    stack.broker.control("import_definitions", stack.project / "rabbitmq.json")
    try:
        printed = stack.broker.control("list_queues", "--silent", "name", "policy")
    finally:
        stack.broker.control("clear_policy", "dead-letters")
    policies = dict(line.split("\t") for line in printed.splitlines())
    covered = {name for name, policy in policies.items() if policy == "dead-letters"}
    assert {"celery", "cpu", "io", "reports"} <= covered
    assert [name for name in covered if "celery" in name or "dead" in name] == ["celery"]
    for part in ["dead-letters", "celery_delayed_0", "celeryev.", ".celery.pidbox"]:
        assert any(part in name for name in policies), part


# Routing


@on_rabbitmq
def test_the_first_worker_makes_the_queues_of_all(stack):
    """A task with a countdown then waits in its queue, before the first worker of the queue starts.

    Without the queue, Celery logs CRITICAL, and RabbitMQ tries to forward the task every 3 minutes.
    """
    stack.broker.control("add_vhost", "fresh")
    stack.broker.control("set_permissions", "-p", "fresh", "guest", ".*", ".*", ".*")
    url = stack.variables["CELERY_BROKER_URL"].removesuffix("/") + "fresh"
    worker = stack.make_worker("io", "first", CELERY_BROKER_URL=url)
    worker.start()
    assert "delayed delivery" not in worker.printed
    send = """
from config.celery import app
with app.connection_for_write(url) as broker:
    circle.apply_async([".", 0], queue="cpu", countdown=1, connection=broker)
"""
    stack.ask(send, url=url)
    count = ["list_queues", "-p", "fresh", "--silent", "name", "messages"]
    wait_for(lambda: "cpu\t1\n" in stack.broker.control(*count))


@on_one
def test_a_job_goes_to_the_queue_of_its_task(stack):
    """Its decorator or CELERY_TASK_ROUTES names it, here `io`. enqueue(queue=…) overrides both."""
    for task in ["declared", "routed"]:
        said, overruled = stack.enqueue(task), stack.enqueue(task, queue="cpu")
        stack.wait_until_final(said, overruled)
        workers = [os.getpgid(stack.notes("start", job)[0]) for job in [said, overruled]]
        assert workers == [stack.other.pid, stack.worker.pid]
