"""Real workers on Redis, and the tasks of poisons.py: each ends or runs again, and others run."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from servers import until

# What ends without harm, on each pool
ENDS = {
    "SUCCESS": """
        nothing close_python_streams fork_returns fork_raises fork_exits fork_exits_at_once
        own_command own_command_stays own_threads own_loop thread_raises
        thread_stays daemon_thread_stays big_result surrogate_result unprintable_result
        short_c_code sigpipe
    """,
    "FAILURE": """
        system_exit system_exit_0 system_exit_text keyboard_interrupt generator_exit base_group
        group panic memory_error cancelled stop_iteration worker_shutdown worker_terminate
        worker_lost hard_limit soft_limit connection_lost unpicklable unprintable needs_more
        recurse cause_itself big_error own_loop_exits deep_result cyclic_result
        object_result generator_result huge_number
    """,
}
# With gevent, a copy that waits runs the other greenlets, too.
COPIES = {"SUCCESS": "fork_waits fork_stays"}
# What harms or kills its process, which is a child with prefork only
PREFORK = {
    "SUCCESS": """
        close_all_descriptors close_standard_streams own_session billiard
        sigint return_at_limit
    """,
    "FAILURE": """
        segfault abort alarm sigkill sigterm sigbus sighup sigusr1 exit_0 exit_1 exit_in_thread
        fork_dies big_error_dies big_error_hangs multiprocessing forever swallow_limit
        swallow_each_limit fail_at_limit exit_at_limit endless_c_code
    """,
}
LIMITED = "forever", "swallow_", "at_limit", "endless", "hangs"
# What a stopped task does at last. Others, and those that don't end, run again.
RETURNS = """
    nothing close_standard_streams ignore_sigterm own_session fork_returns fork_raises fork_exits
    fork_waits own_command_stays own_threads thread_stays big_result unprintable_result
"""
FAILS = """
    segfault abort sigkill sigterm exit_0 exit_1 exit_in_thread fork_dies big_error
    big_error_hangs system_exit keyboard_interrupt generator_exit base_group group panic
    memory_error cancelled stop_iteration worker_shutdown worker_terminate worker_lost soft_limit
    unpicklable unprintable recurse forever swallow_each_limit fail_at_limit endless_c_code
    close_all_descriptors multiprocessing
"""

# Threads, gevent: with these, a task never ends. With the others, its copy comes back and waits, too.
ENDLESS = "forever", "swallow_each_limit"
COME_BACK = "fork_returns"


def expected(pool):
    tables = {"gevent": [ENDS], "threads": [ENDS, COPIES], "prefork": [ENDS, COPIES, PREFORK]}
    states = [pair for table in tables[pool] for pair in table.items()]
    return {name: state for state, names in states for name in names.split()}


def of_processes(worker, name):
    """Return {process id: content of this file in /proc} of the worker's processes."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.getpgid(int(folder.name)) == worker.pid:
                found[int(folder.name)] = (folder / name).read_bytes()
    return found


def has_processes(worker):
    """Return whether a process of this worker runs Celery's code: one that a task started doesn't."""
    return any(b"worker_app" in command for command in of_processes(worker, "cmdline").values())


def stopped_processes(worker):
    """Return the ids of this worker's processes that a signal has stopped."""
    states = {
        each: stat.rpartition(b") ")[2][:1] for each, stat in of_processes(worker, "stat").items()
    }
    return [each for each, state in states.items() if state == b"T"]


def ids_in(redis):
    """Return the ids of the tasks that wait in Redis, where nothing else is left."""
    assert not redis.client.hlen("unacked") and not redis.client.exists("celery\x06\x16delayed")
    messages = redis.client.lrange("celery", 0, -1)
    return sorted(json.loads(message)["headers"]["id"] for message in messages)


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_each_poison_ends_and_other_tasks_run(pool, start, steady, send, settled, tmp_path):
    steady["worker_soft_shutdown_timeout"] = 1
    worker = start(steady, pool=pool, options=["-c", "8"])
    sent = {}
    for name in expected(pool):
        limits = {"soft_time_limit": 1, "time_limit": 2}
        is_limited = any(part in name for part in LIMITED)
        sent[name] = send("poison", name, "now", **(limits if is_limited else {}))
    others = [send("add", 2, 3) for _ in range(20)]
    assert [other.get() for other in others] == [5] * 20
    assert {name: result.wait() for name, result in sent.items()} == expected(pool)
    settled()
    assert set((tmp_path / "runs").read_text().split()) == set(sent)
    worker.stop(signal.SIGTERM)
    assert worker.wait() == 0
    until(lambda: not has_processes(worker), "no copy of the worker runs")


def test_each_poison_that_is_stopped_ends_or_is_given_back(start, steady, send, calls, redis):
    steady["broker_transport_options"]["visibility_timeout"] = 1000
    returning, failing = RETURNS.split(), FAILS.split()
    names = returning + failing
    worker = start({**steady, "worker_soft_shutdown_timeout": 1}, options=["-c", str(len(names))])
    sent = {name: send("poison", name, "at the end") for name in names}
    for name in names:
        calls.next(name)
    worker.stop(signal.SIGTERM)
    stopped = time.monotonic()
    assert worker.wait() == 0
    assert time.monotonic() - stopped < 30
    assert ids_in(redis) == sorted(sent[name].id for name in failing)
    assert {sent[name].state for name in returning} == {"SUCCESS"}
    until(lambda: not has_processes(worker), "no copy of the worker runs")


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_each_poison_of_a_worker_that_stops_ends(
    pool, start, steady, send, calls, settled, tmp_path
):
    states = expected(pool)
    del states["thread_stays"], states["own_loop_exits"]
    steady["worker_soft_shutdown_timeout"] = 50
    worker = start(steady, pool=pool, options=["-c", str(len(states))])
    sent = {name: send("poison", name, "after") for name in states}
    waiting = [calls.next(name) for name in states]
    worker.stop(signal.SIGTERM)
    for call in waiting:
        call.answer()
    assert worker.wait() == 0
    assert {name: result.state for name, result in sent.items()} == states
    settled()
    until(lambda: not has_processes(worker), "no copy of the worker runs")


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_each_poison_that_does_not_end_in_time_is_given_back(
    pool, start, steady, send, calls, redis
):
    steady["broker_transport_options"]["visibility_timeout"] = 1000
    names = [name for name in ENDS["SUCCESS"].split() if name not in COME_BACK]
    steady["worker_soft_shutdown_timeout"] = 1
    worker = start(steady, pool=pool, options=["-c", str(len(names) + len(ENDLESS))])
    sent = [send("poison", name, "before") for name in names]
    sent += [send("poison", name, "after") for name in ENDLESS]
    waiting = {name: calls.next(name) for name in [*names, *ENDLESS]}
    for name in ENDLESS:
        waiting[name].answer()
    worker.stop(signal.SIGTERM)
    stopped = time.monotonic()
    assert worker.wait() == 0
    assert time.monotonic() - stopped < 30
    assert ids_in(redis) == sorted(result.id for result in sent)
    until(lambda: not has_processes(worker), "no copy of the worker runs")


def test_a_worker_ends_although_a_thread_of_its_main_process_does_not(start, steady):
    worker = start({**steady, "worker_soft_shutdown_timeout": 1}, THREAD="1")
    worker.stop(signal.SIGTERM)
    assert worker.wait() == 0


def test_a_worker_that_fails_ends_although_its_tasks_do_not(start, steady, send, calls, redis):
    steady["broker_transport_options"]["visibility_timeout"] = 1000
    worker = start({**steady, "worker_soft_shutdown_timeout": 1})
    send("ask", "endless")
    calls.next("endless")
    send("poison", "garbage", "before")
    assert worker.wait() == 1
    assert redis.client.llen("celery") == 2


def test_an_error_that_is_half_read_when_the_connection_is_lost_arrives(
    start, steady, send, settled, redis, tmp_path
):
    worker = start(steady)
    result = send("poison", "big_error_pauses", "now")
    until(lambda: set(stopped_processes(worker)) - {worker.pid}, "the child has stopped")
    until(lambda: worker.pid not in stopped_processes(worker), "its worker goes on")
    [child] = stopped_processes(worker)
    for lost in 1, 2:
        until(lambda: "b" in [each["flags"] for each in redis.client.client_list()], "it waits")
        redis.client.client_kill_filter(_type="normal", skipme=True)
        until(lambda n=lost: worker.text().count("Connected to") == n + 1, "it connects again")
    os.kill(child, signal.SIGCONT)
    assert result.wait() == "FAILURE"
    settled()
    assert (tmp_path / "runs").read_text().split() == ["big_error_pauses"]
