"""Plain outputs run: each broker with each result backend and pool, on real servers."""

import time
from functools import partial

import pytest

from harness.outputs import CHECKS, combinations, mails, one_for_each_broker, outputs
from harness.project import started, wait_for
from harness.stack import prepare_plain

pytestmark = pytest.mark.each_broker
COMBINATIONS = [{**answers, "durable_jobs": "no"} for answers in combinations()]


def some(*options, where=lambda answers: True):
    """Return one combination for each choice of these options.

    `where` says which combinations are in question. The choices of other options vary.
    """
    groups = {}
    for answers in filter(where, COMBINATIONS):
        groups.setdefault(tuple(answers[option] for option in options), []).append(answers)
    return [
        group[(number + number // len(group)) % len(group)]
        for number, group in enumerate(groups.values())
    ]


def each(*options, **where):
    """Return a mark: run the test with some() combinations."""
    return outputs(*some(*options, **where))


def has_results(answers):
    return answers["result_backend"] != "none"


def has_flower(answers):
    return answers["broker"] != "sqs"


everywhere = outputs(*COMBINATIONS)
with_results = outputs(*filter(has_results, COMBINATIONS))
# Of what a test needs, only these options matter to it.
each_broker_and_pool = each("broker", "worker_pool")
with_cancel = each("broker", "worker_pool", where=lambda a: has_results(a) and has_flower(a))
with_flower = each("broker", "worker_pool", where=has_flower)
with_example = each("broker", "result_backend", where=lambda a: a["include_example"] == "yes")


@outputs(*some("broker", "result_backend"), *one_for_each_broker())  # these have durable jobs
def test_it_passes_its_checks(project):
    """Those of `make check`, and production's, in one process."""
    extra = {"FLOWER_BASIC_AUTH": "admin:password", "DEBUG": "False", "MEDIA_ROOT": "/srv/media"}
    project.manage("shell", "-v0", "-c", CHECKS, **project.production(), **extra)


# From here on, with all processes. The app `trials` is part of the project.


@pytest.fixture(scope="module")
def running_stack(project, database, tmp_path_factory):
    stack = prepare_plain(project, tmp_path_factory.mktemp("stack"), database)
    try:
        with started(stack):
            yield stack
    except AssertionError:
        print(stack.printed())
        raise


@pytest.fixture
def stack(running_stack):
    running_stack.mark_logs()
    return running_stack


def start(stack, task, *args):
    """Start a task through a view of the app `trials`."""
    return stack.request("/api/trials/", {"task": task, "args": [str(arg) for arg in args]})


def follow(stack, url, until):
    """Return all states of the task at `url` that were seen until it had this one."""
    seen = []

    def reached():
        status, _, task = stack.request(url)
        assert status == 200
        if task not in seen:
            seen.append(task)
        return task["state"] == until

    wait_for(reached)
    return seen


@pytest.mark.promise("Every combination works")
@everywhere
def test_a_worker_runs_a_task(stack):
    stack.wait_until_started(stack.send("quick"))


@each("broker", "periodic_tasks")
def test_beat_starts_tasks_also_after_its_broker_was_down_or_hung(stack):
    """django-celery-beat's scheduler copies the entry of the settings into its table."""
    stack.beat.start()
    wait_for_ticks(stack)
    broker = stack.broker
    with stack.supervised(stack.worker):
        for fail, recover in (broker.kill, broker.start), (broker.pause, broker.resume):
            fail()
            time.sleep(5)  # Beat tries to send a task each second
            recover()
            wait_for_ticks(stack)
    assert stack.beat.is_running()
    if stack.project.answers["periodic_tasks"] == "admin":
        code = """
from django_celery_beat.models import PeriodicTask
result = PeriodicTask.objects.filter(name="tick").exists()
"""
        assert stack.ask(code)


def wait_for_ticks(stack):
    """Wait for more runs of the periodic task than the broker may still have had messages."""
    for _ in range(5):
        (stack.folder / "ticked").unlink(missing_ok=True)
        wait_for((stack.folder / "ticked").exists)


@each_broker_and_pool
def test_a_countdown_is_waited_for(stack):
    sent = time.time()
    task = stack.send("quick", countdown=2)
    stack.wait_until_started(task)
    [started] = stack.times("start", task)
    assert started - sent > 1.9  # not 2: gevent counts from the start of its loop's round


@with_results
def test_the_caller_gets_the_result(stack):
    """From the backend of the project: a variable of the tests could name another one."""
    code = "result = [add.delay(1, 2).get(timeout=300), type(app.backend).__module__]"
    value, module = stack.ask(code)
    assert value == 3
    backend = stack.project.answers["result_backend"]
    assert {"database": "django_celery_results"}.get(backend, backend) in module


@each("broker", "result_backend", where=has_results)
def test_the_caller_gets_the_result_of_a_canvas(stack):
    code = """
header = [add.s(n, n) for n in range(3)]
result = [
    chain(add.s(1, 2), add.s(3))().get(timeout=300),
    group(header)().get(timeout=300),
    chord(header)(total.s()).get(timeout=300),
    # The first one ignores its result. Not at the same time: moto's counter is not atomic.
    chord([add_quietly.s(1, 2), add.s(1, 1).set(countdown=1)])(total.s()).get(timeout=300),
]
"""
    assert stack.ask(code) == [6, [0, 2, 4], 6, 5]


@each("result_backend", where=has_results)
def test_a_retry_that_ends_before_its_state_is_stored_keeps_its_result(stack, gate):
    expected = {stack.send("retry_slowly", gate, ends): ends for ends in ("SUCCESS", "FAILURE")}
    code = "result = {id: AsyncResult(id).state for id in ids}"
    states = partial(stack.ask, code, ids=[*expected])
    wait_for(lambda: states() == expected)
    gate.touch()
    wait_for(lambda: stack.worker.printed.count("task_retrying") == 2)
    assert states() == expected


@pytest.mark.promise("Privacy")
@with_results
def test_a_client_sees_progress_and_result_of_its_own_task(stack, gate):
    status, headers, answer = start(stack, "work", gate)
    assert (status, answer["state"]) == (202, "PENDING")
    seen = follow(stack, headers["Location"], "PROGRESS")
    assert seen[-1]["progress"]["done"] >= 1
    gate.touch()
    assert follow(stack, headers["Location"], "SUCCESS")[-1]["result"] == "done"
    other = {"Authorization": f"Token {stack.add_user('other')}"}
    assert stack.request(headers["Location"], **other)[0] == 404
    assert stack.request("/api/tasks/invented/")[0] == 404


@with_cancel
def test_a_client_cancels_its_task(stack, gate):
    """A waiting one: the worker's slots are taken. A running one: not on threads."""
    blockers = [stack.send("wait", gate) for _ in range(stack.variables["WORKER_CONCURRENCY"])]
    stack.wait_until_started(*blockers)
    other = gate.with_name("other")
    _, headers, waiting = start(stack, "work", other)
    assert stack.request(headers["Location"], method="DELETE")[0] == 204
    revoked = "result = app.control.inspect().revoked()"
    wait_for(lambda: waiting["id"] in str(stack.ask(revoked)))
    gate.touch()
    if stack.project.answers["worker_pool"] == "gevent":
        # Celery kills its greenlet when that next waits. It may have stored STARTED by then.
        wait_for(lambda: all(stack.notes("end", blocker) for blocker in blockers))
    else:
        follow(stack, headers["Location"], "REVOKED")
        assert not stack.starts(waiting["id"])

    _, headers, running = start(stack, "work", other)
    stack.wait_until_started(running["id"])
    follow(stack, headers["Location"], "PROGRESS")
    assert stack.request(headers["Location"], method="DELETE")[0] == 204
    if stack.project.answers["worker_pool"] == "threads":
        other.touch()
        follow(stack, headers["Location"], "SUCCESS")
    else:
        follow(stack, headers["Location"], "REVOKED")
        other.touch()
        time.sleep(0.5)
        assert not stack.notes("end", running["id"])
    assert not stack.notes("end", waiting["id"])


@outputs(next(a for a in COMBINATIONS if has_results(a) and not has_flower(a)))
def test_without_remote_control_nothing_pretends_to_cancel(stack, gate):
    _, headers, _ = start(stack, "work", gate)
    assert stack.request(headers["Location"], method="DELETE")[0] == 405


@with_flower
def test_flower_shows_tasks_and_ends_one(stack, gate):
    def listens():  # some time after Flower's port is open
        seen = stack.send("quick")
        time.sleep(1)
        return stack.in_flower(seen)

    stack.flower.start()
    wait_for(listens)
    task = stack.send("wait", gate)
    stack.wait_until_started(task)
    wait_for(lambda: stack.in_flower(task) == "STARTED")
    assert stack.ask_flower(f"/api/task/revoke/{task}?terminate=1", {})[0] == 200
    if stack.project.answers["worker_pool"] == "threads":
        gate.touch()
        wait_for(lambda: stack.in_flower(task) == "SUCCESS")
    else:
        # On gevent, Celery may send the event of a success after that of the revoke.
        ended = ["REVOKED"] + ["SUCCESS"] * (stack.project.answers["worker_pool"] == "gevent")
        wait_for(lambda: stack.in_flower(task) in ended)
        gate.touch()
        time.sleep(0.5)
        assert not stack.notes("end", task)
    after = stack.send("quick")
    stack.wait_until_started(after)
    wait_for(lambda: stack.in_flower(after) == "SUCCESS")


@with_example
def test_a_report_shows_progress_or_arrives_by_email(stack):
    assert stack.request("/api/orders/report.json", method="POST")[0] == 404  # not 500
    status, headers, _ = stack.request("/api/orders/report/", method="POST")
    assert status == 202
    if has_results(stack.project.answers):
        seen = follow(stack, headers["Location"], "PROGRESS")
        assert seen[-1]["progress"]["total"] == 30
    else:
        assert "Location" not in headers
        assert stack.request("/api/tasks/x/")[0] == 404
        wait_for(lambda: "Subject: Your orders" in mails(stack.project))
