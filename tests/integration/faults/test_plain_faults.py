"""What a fault does to plain tasks, on each broker, and with each pool on the first one.

test_services.py lets each service fail under load; here are the cases that it can't see.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest

from harness import faults
from harness.outputs import ORDER
from harness.project import wait_for
from harness.proxy import Proxy
from harness.servers import REDELIVERY

stacks = partial(faults.stacks, plain="plain-faults-")
on_each = stacks()
on_prefork = stacks(pools=["prefork"])
on_redis = stacks(["redis"], ["prefork"])
on_rabbitmq = stacks(["rabbitmq"], ["prefork"])


# The worker


@on_each
def test_sigterm_stops_a_worker_with_a_long_task(stack, gate):
    """Within SOFT_SHUTDOWN_SECONDS, and the next worker starts the task."""
    task = stack.send("wait", gate)
    stack.wait_until_started(task)
    assert stack.worker.stop() == 0
    stack.worker.start()
    ready = time.time()
    stack.wait_until_started(task, times=2)
    assert stack.times("start", task)[1] - ready < REDELIVERY / 2


@on_each
def test_a_busy_worker_ends_with_its_tasks(stack, gate):
    """SOFT_SHUTDOWN_SECONDS is an hour here. A task that waited for a slot runs elsewhere."""
    worker = stack.replace_worker("--concurrency 2", SOFT_SHUTDOWN_SECONDS=3600)
    tasks = [stack.send("wait", gate) for _ in range(2)]
    stack.wait_until_started(*tasks)
    waiting = [stack.send("quick") for _ in range(5)]
    time.sleep(1)  # time to fetch some
    os.kill(worker.pid, signal.SIGTERM)
    time.sleep(1)
    assert worker.is_running()
    gate.touch()
    assert worker.wait() == 0
    stack.worker.start()
    stack.wait_until_started(*waiting)
    time.sleep(REDELIVERY + 1)
    for task in tasks:
        assert stack.starts(task) == len(stack.notes("end", task)) == 1
    assert [stack.starts(task) for task in waiting] == [1] * 5


@on_each
def test_a_second_sigterm_hurries_a_worker(stack, gate):
    worker = stack.replace_worker(SOFT_SHUTDOWN_SECONDS=3600)
    task = stack.send("wait", gate)
    stack.wait_until_started(task)
    for _ in range(2):
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(1)
    assert worker.wait() == 0
    stack.worker.start()
    stack.wait_until_started(task, times=2)


@on_redis
def test_a_stopped_worker_ends_a_task_that_has_just_started(stack, gate):
    worker = stack.replace_worker("--concurrency 1")
    faults.stop_before_it_knows(stack, worker, partial(stack.send, "wait", gate))
    assert worker.wait() == 0


@on_prefork
def test_a_task_that_kills_its_child_every_time_ends(stack):
    task = stack.send("kill_child")
    wait_for(lambda: stack.ask(f"result = AsyncResult({task!r}).state") == "FAILURE")
    assert stack.starts(task) == 4
    time.sleep(3)  # time for one more
    assert stack.starts(task) == 4


@stacks(pools=["prefork"])
def test_a_time_limit_during_a_query_fails_only_its_own_task(stack):
    """Its child's connection is still waiting for the answer of the query."""
    stack.replace_worker("--concurrency 1")
    task = stack.send("query_for_long")
    wait_for(lambda: stack.ask(f"result = AsyncResult({task!r}).state") == "FAILURE")
    code = "result = [find_connection.delay().get(timeout=300) for _ in range(3)]"
    assert len(set(stack.ask(code))) == 1  # which they reuse


@stacks(pools=["gevent"])
def test_a_task_waits_for_a_database_that_hangs(stack):
    """A greenlet connects for each task. A request would give up after five seconds."""
    stack.database.pause()
    try:
        task = stack.send("find_connection")
        time.sleep(7)
    finally:
        stack.database.resume()
    assert stack.ask(f"result = AsyncResult({task!r}).get(timeout=60)")


@on_redis
def test_a_query_fails_if_a_firewall_forgets_its_connection(stack, tmp_path):
    """PostgreSQL has received the query. Its answer never comes."""
    proxy = Proxy(stack.database.port)
    code = f"""
from pathlib import Path
from django.db import OperationalError, connection
with connection.cursor() as cursor:
    Path({str(tmp_path / "connected")!r}).touch()
    try:
        cursor.execute("SELECT pg_sleep(3)")
    except OperationalError:
        print("lost")
"""
    with ThreadPoolExecutor() as thread:
        query = thread.submit(stack.project.shell, code, **proxy.redirect(stack.variables))
        wait_for((tmp_path / "connected").exists)
        time.sleep(1)
        proxy.forget()
        try:
            assert "lost" in query.result(timeout=60)  # seconds on a busy machine; it takes 10
        finally:
            proxy.clean_up()


@on_redis
def test_a_result_is_read_again_if_a_firewall_forgets_the_connection(stack, tmp_path):
    task = stack.send("quick")
    stack.wait_until_started(task)
    code = f"""
import time
from pathlib import Path
from celery.result import AsyncResult
AsyncResult({task!r}).state
Path({str(tmp_path / "connected")!r}).touch()
while not Path({str(tmp_path / "forgotten")!r}).exists():
    time.sleep(0.1)
print(AsyncResult({task!r}).state)
"""
    proxy = Proxy(stack.broker.port)
    with ThreadPoolExecutor() as thread:
        state = thread.submit(stack.project.shell, code, **proxy.redirect(stack.variables))
        wait_for((tmp_path / "connected").exists)
        proxy.forget()
        (tmp_path / "forgotten").touch()
        try:
            assert "SUCCESS" in state.result()
        finally:
            proxy.clean_up()


@on_redis
def test_a_task_for_a_queue_that_nobody_consumes_is_an_error(stack):
    code = """
from celery.exceptions import QueueNotFound
try:
    result = quick.apply_async(queue="nobody").id
except QueueNotFound:
    result = None
"""
    assert stack.ask(code) is None


# The broker


@pytest.mark.parametrize("how", ["is down", "hangs"])
@on_each
def test_a_broker_that_does_not_answer_delays_no_request(stack, how):
    """An order is accepted, and found later. A report, which is only a task, is refused."""
    answers, seconds = [], []
    stack.broker.kill() if how == "is down" else stack.broker.pause()
    try:
        for path, data in [("/api/orders/", ORDER), ("/api/orders/report/", None)] * 3:
            start = time.time()
            answers.append(stack.request(path, data, method="POST")[0])
            seconds.append(time.time() - start)
    finally:
        if how == "hangs":
            stack.broker.resume()
    print("seconds of orders and reports:", [round(each, 2) for each in seconds])
    assert answers == [201, 503] * 3
    # A promise: three timeouts of a second, and the request's own time. A machine may delay one.
    *most, slowest = sorted(seconds)
    assert max(most) < 3.5 and slowest < 8
    with stack.supervised():
        if how == "is down":
            stack.broker.start()
        start = time.time()
        _, _, order = stack.request("/api/orders/", ORDER)
        url = f"/api/orders/{order['id']}/"
        wait_for(lambda: stack.request(url)[2]["confirmed_at"])
        print("seconds until the next order was confirmed:", round(time.time() - start, 2))


@pytest.mark.promise("It survives failing services")
@stacks(["redis", "sqs"], ["prefork"], defaults=True)
def test_the_default_settings_keep_their_promise(stack, gate, tmp_path):
    """Two minutes, and what takes longer runs once, also if the broker restarts with its data."""
    stack.replace_worker("--queues celery")
    doomed = stack.make_worker("doomed", "--queues io").start()
    killed = [stack.send("wait", tmp_path / "killed", queue="io") for _ in range(4)]
    stack.wait_until_started(*killed)
    long, later = stack.send("wait", gate), stack.send("quick", countdown=200)
    stack.wait_until_started(long)
    stack.make_worker("second").start()
    doomed.kill()
    at = time.time()
    time.sleep(30)
    if stack.project.answers["broker"] == "redis":  # moto keeps nothing
        stack.broker.kill()
        time.sleep(3)
        stack.broker.start()
    stack.wait_until_started(*killed, times=2)
    seconds = [round(stack.times("start", task)[1] - at) for task in killed]
    print("seconds until the tasks of a killed worker ran again:", seconds)
    assert max(seconds) < 150
    (tmp_path / "killed").touch()
    stack.wait_until_started(later)
    time.sleep(max(0, at + 200 - time.time()))
    gate.touch()
    wait_for(lambda: stack.notes("end", long))
    time.sleep(5)
    assert [stack.starts(task) for task in [*killed, long, later]] == [2] * 4 + [1, 1]


# What delays others


@on_each
def test_a_burst_of_countdowns_starves_no_other_task(stack):
    count = 50 if stack.project.answers["broker"] == "sqs" else 1000
    code = "result = [quick.apply_async(countdown=90).id for _ in range(count)]"
    later = stack.ask(code, count=count)
    stack.wait_until_started(stack.send("quick"))
    early = [each for each in later[:20] if stack.starts(each)]
    assert not early  # so the task did not wait for them
    stack.worker.kill()
    stack.empty("celery")


# RabbitMQ


@stacks(brokers=["rabbitmq"], pools=["prefork", "gevent"], every_pair=True)
def test_a_worker_replaces_one_of_the_same_name_that_vanished(stack):
    """It is frozen, so RabbitMQ still has its connection. Remote control works."""
    stack.worker.pause()
    second = stack.make_worker("first")
    second.launch()
    start = time.time()
    wait_for(lambda: second.is_ready() or not second.is_running())
    print("ready after", round(time.time() - start, 1))
    assert second.is_running() and time.time() - start < 60
    # RabbitMQ gives some tasks and remote commands to the first one until that connection ends.
    tasks = stack.ask("result = [quick.delay().id for _ in range(50)]")
    wait_for(lambda: any(stack.starts(task) for task in tasks))
    ping = "result = list(app.control.inspect(timeout=5, limit=1).ping() or {})"
    wait_for(lambda: [name.split("@")[0] for name in stack.ask(ping)] == ["first"])


@on_rabbitmq
def test_a_countdown_before_the_first_worker_is_kept(stack):
    """Workers declare the exchanges of countdowns. RabbitMQ would answer "not found"."""
    stack.worker.stop()
    stack.ask("""
with app.connection_for_write() as broker:
    for level in range(28):
        broker.default_channel.exchange_delete(f"celery_delayed_{level}")
result = None
""")
    task = stack.send("quick", countdown=2)
    stack.worker.start()
    stack.wait_until_started(task)


@on_rabbitmq
def test_countdowns_work_on_a_worker_of_some_queues(stack):
    """Also if no worker has yet declared the others, which DelayedDelivery binds."""
    stack.worker.stop()
    for queue in "cpu", "io":
        stack.broker.control("delete_queue", queue)
    worker = stack.make_worker("some", "--queues celery").start()
    start = time.time()
    task = stack.send("quick", countdown=2)
    stack.wait_until_started(task)
    assert time.time() - start < 30, worker.printed
    assert "delayed delivery" not in worker.printed, worker.printed
    task = stack.send("quick", countdown=2, queue="cpu")
    time.sleep(5)
    stack.make_worker("late", "--queues cpu").start()
    stack.wait_until_started(task)


# SQS


@stacks(["sqs"], ["prefork", "gevent"], every_pair=True)  # which poll in ways of their own
def test_a_worker_polls_again_after_a_poll_without_an_answer(stack):
    """kombu's own channel would wait forever, and not poll again."""
    pid = stack.worker.pid
    stack.broker.pause()
    if stack.project.answers["worker_pool"] == "gevent":
        time.sleep(6)  # a poll fails after 1.5 s
    else:
        wait_for(lambda: "poll of the SQS queue celery failed" in stack.worker.printed)
    stack.broker.resume()
    stack.wait_until_started(stack.send("quick"))
    assert psutil.pid_exists(pid) and stack.worker.pid == pid
