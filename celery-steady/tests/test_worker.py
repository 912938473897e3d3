"""Real workers on Redis: what the README promises, for each pool."""

import signal
import subprocess
import time

import pytest
from servers import LIMIT, until

pytestmark = pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])


def test_a_task_runs_with_the_classes_of_the_package(pool, start, steady, send, settled):
    worker = start(steady, pool=pool)
    assert worker.parts == {
        "consumer": "celery_steady.consumer:Consumer",
        "transport": "celery_steady.redis.transport:Transport",
        "backend": "celery_steady.redis.results:RedisBackend",
    }
    assert send("add", 2, 3).get() == 5
    settled()


def test_a_backend_that_was_used_as_the_app_was_imported_is_replaced(pool, start, steady, send):
    worker = start(steady, pool=pool, BACKEND_USED="1")
    assert send("backend").get() == worker.parts["backend"]
    assert worker.parts["backend"].startswith("celery_steady.")


def test_a_task_longer_than_the_visibility_timeout_starts_once(
    pool, start, steady, send, calls, settled, redis
):
    """It looks for messages to deliver again each second, and finds none."""
    start(steady, pool=pool)
    result = send("ask", "long")
    task = calls.next("long")
    [(tag, delivered)] = redis.client.zrange("unacked_index", 0, -1, withscores=True)
    timeout = steady["broker_transport_options"]["visibility_timeout"]

    def is_renewed():
        return redis.client.zscore("unacked_index", tag) > delivered + 2 * timeout

    until(is_renewed, "the message is renewed")
    assert "long" not in calls.names()
    task.answer()
    assert result.get() == "long"
    settled()
    assert "long" not in calls.names()


def test_a_task_that_blocks_the_event_loop_starts_once(
    pool, start, steady, send, calls, redis, tmp_path
):
    """gevent: no timer of the worker runs meanwhile, so a thread renews."""
    start(steady, pool=pool)
    result = send("block", "long")
    calls.next("long")
    [(tag, delivered)] = redis.client.zrange("unacked_leases", 0, -1, withscores=True)
    timeout = steady["broker_transport_options"]["visibility_timeout"]
    start(steady, pool=pool)

    def is_renewed():
        return (redis.client.zscore("unacked_leases", tag) or 0) > delivered + 2 * timeout

    until(is_renewed, "the message is renewed")
    (tmp_path / "unblock").touch()
    assert result.get() == "long"
    assert "long" not in calls.names()


def test_another_worker_runs_the_tasks_of_a_killed_one(pool, start, steady, send, calls, settled):
    worker = start(steady, pool=pool)
    results = [send("ask", name) for name in ("one", "two")]
    for name in "one", "two":
        calls.next(name)
    worker.kill()
    start(steady, pool=pool)
    for name in "one", "two":
        calls.next(name).answer()
    assert [result.get() for result in results] == ["one", "two"]
    settled()


def test_sigterm_ends_the_worker_when_its_tasks_have_ended(pool, start, steady, send, calls, redis):
    conf = {**steady, "worker_soft_shutdown_timeout": 100 * LIMIT}
    # Its timer asks the pool for its processes, also when the pool has stopped.
    options = ["--autoscale", "2,1"] if pool == "prefork" else []
    worker = start(conf, pool=pool, options=options, AUTOSCALE_KEEPALIVE="0.1")
    result = send("ask", "running")
    task = calls.next("running")
    worker.stop(signal.SIGTERM)
    new = send("ask", "new")  # it may be just in time
    task.answer()
    while worker.is_running():
        if "new" in calls.names():
            calls.next("new").answer()
    assert worker.wait() == 0
    assert result.get() == "running"
    assert redis.client.llen("celery") == (new.state == "PENDING")
    assert not redis.client.hlen("unacked")
    assert "Traceback" not in worker.text()


def test_sigterm_waits_no_longer_than_its_timeout_and_releases_the_task(
    pool, start, steady, send, calls, redis
):
    steady["broker_transport_options"]["visibility_timeout"] = 100 * LIMIT
    worker = start({**steady, "worker_soft_shutdown_timeout": 1}, pool=pool)
    send("ask", "endless")
    calls.next("endless")
    worker.stop(signal.SIGTERM)
    assert worker.wait() == 0
    assert redis.client.llen("celery") == 1  # at once, not after the visibility timeout


def test_without_a_timeout_sigterm_waits_as_celery_does(pool, start, steady, send, calls, redis):
    worker = start(steady, pool=pool)
    result = send("ask", "running")
    task = calls.next("running")
    worker.stop(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(1)
    task.answer()
    assert worker.wait() == 0
    assert result.get() == "running"
    assert not redis.client.llen("celery") and not redis.client.hlen("unacked")


def test_a_worker_that_waits_after_sigterm_renews_its_messages(
    pool, start, steady, send, calls, redis
):
    def ends():
        [(_, ends)] = redis.client.zrange("unacked_leases", 0, -1, withscores=True)
        return ends

    worker = start(steady, pool=pool)
    send("ask", "running")
    task = calls.next("running")
    worker.stop(signal.SIGTERM)
    until(lambda: "Warm shutdown" in worker.text(), "the worker stops")
    before = ends()
    until(lambda: ends() > before + 1, "the message is renewed more than once")
    task.answer()
    assert worker.wait() == 0


def test_a_task_that_runs_through_a_restart_of_redis_starts_once(
    pool, start, steady, send, calls, settled, redis
):
    start(steady, pool=pool)
    result = send("ask", "long")
    task = calls.next("long")
    [tag] = redis.client.zrange("unacked_index", 0, -1)
    redis.kill()
    redis.start()
    other = send("ask", "other")
    calls.next("other").answer()  # the worker goes on
    assert other.get() == "other"
    due = redis.client.time()[0] + steady["broker_transport_options"]["visibility_timeout"]
    until(lambda: redis.client.zscore("unacked_index", tag) > due, "the message is renewed")
    task.answer()
    assert result.get() == "long"
    settled()
    assert not calls.names()


def test_a_task_that_ends_while_redis_is_down_is_not_run_again(
    pool, start, steady, send, calls, settled, redis
):
    start(steady, pool=pool)
    result = send("ask", "long")
    task = calls.next("long")
    redis.kill()
    task.answer()
    time.sleep(steady["broker_transport_options"]["visibility_timeout"] + 1)
    redis.start()
    assert result.get() == "long"
    settled()
    assert not calls.names()


@pytest.mark.parametrize("sender", ["steady", "stock"])
def test_a_worker_without_a_free_slot_takes_no_task(
    pool, sender, start, steady, stock, client, calls, settled, redis
):
    """A countdown took the last slot. The next task is for whoever is free first."""
    start(steady, pool=pool)
    app = client({"steady": steady, "stock": stock}[sender])
    app.send_task("worker_app.ask", ["long"])
    running = [calls.next("long")]
    app.send_task("worker_app.ask", ["later"], countdown=1)
    running.append(calls.next("later"))
    app.send_task("worker_app.ask", ["next"])
    time.sleep(2)  # a worker that waits for messages would have taken it
    assert redis.client.llen("celery") == 1
    for call in running:
        call.answer()
    calls.next("next").answer()
    settled()
    assert not calls.names()
