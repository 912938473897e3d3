"""How the pools differ, and what their processes, threads and greenlets share."""

import os
import re
import signal
import time

import psutil

from harness.faults import POOLS, on_gevent, on_prefork
from harness.stack import LEASE


@on_gevent
def test_workers_with_different_pools_run_side_by_side(stack, gate):
    """Prefork, threads and gevent. If one is killed or stops, another runs its jobs."""
    pools = sorted(POOLS)

    def start(pool, queue):
        worker = stack.make_worker(f"{pool}-{queue}", f"--queues {queue}", pool=pool).start()
        assert re.search(r"concurrency: \d+ \((\w+)\)", worker.printed)[1] in pool
        return worker

    first = [start(pool, queue=pool) for pool in pools]
    jobs = [stack.enqueue("hold", gate, queue=pool) for pool in pools for _ in range(3)]
    stack.wait_until_started(*jobs)
    for worker in first:
        worker.kill()
    second = [start(pools[index - 1], queue) for index, queue in enumerate(pools)]
    stack.wait_until_started(*jobs, times=2)
    for worker in second:
        os.kill(worker.pid, signal.SIGTERM)
    for worker in second:
        assert worker.wait() == 0, worker.printed
    assert {row["state"] for row in stack.rows(*jobs)} == {"queued"}  # handed back, no lease lapsed
    third = [start(pool, queue=pool) for pool in pools]
    stack.wait_until_started(*jobs, times=3)
    gate.touch()
    stack.wait_until_succeeded(*jobs, crashes=1)
    for worker in third:
        worker.stop()


# Connections to the database


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


@on_gevent
def test_the_queries_of_a_gevent_worker_share_ten_connections(stack):
    """Although gevent ends idle threads: here after 0.1 s, by default after 5 s."""
    worker = stack.replace_worker(GEVENT_THREADPOOL_IDLE_TASK_TIMEOUT=0.1)
    for _ in range(5):
        jobs = [stack.enqueue("rest", 1, queue="cpu") for _ in range(12)]
        stack.wait_until_succeeded(*jobs, crashes=0)
    opened = psutil.Process(worker.pid).net_connections()
    remote = [connection.raddr for connection in opened if connection.raddr]
    assert [address.port for address in remote].count(stack.database.port) <= 12
