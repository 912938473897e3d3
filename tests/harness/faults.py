"""Fixtures for tests with real processes: a running stack on the brokers and pools they name."""

import itertools
import time

import pytest

from .bake import CHOICES, baked
from .servers import PostgreSQL, broker_class
from .stack import TIMINGS, prepare

POOLS = CHOICES["worker_pool"]
STACKS = {}


def stacks(brokers=CHOICES["broker"], pools=POOLS, only=lambda *pair: True, **options):
    """Run the test on each of these brokers with each of these pools, and with these options."""
    params = []
    for broker, pool in itertools.product(brokers, pools):
        name = "-".join([broker, pool, *options])
        # One object for one stack: pytest asks whether it is the same one.
        param = STACKS.setdefault(name, {"broker": broker, "pool": pool, **options})
        if only(broker, pool):
            params.append(pytest.param(param, id=name, marks=pytest.mark.xdist_group(name)))
    return pytest.mark.parametrize("running", params, indirect=True)


ONE = {"brokers": CHOICES["broker"][:1], "pools": POOLS[:1]}
everywhere = stacks()
# What broker and pool change, but not together: the first of one with each of the other.
on_each = stacks(only=lambda broker, pool: [broker] == ONE["brokers"] or [pool] == ONE["pools"])
on_each_broker = stacks(pools=POOLS[:1])  # what no pool changes
on_each_pool = stacks(brokers=ONE["brokers"])
on_one = stacks(**ONE)
on_prefork = stacks(brokers=ONE["brokers"], pools=["prefork"])
# No message is sent a second time while a test waits; the other timings are those of a project.
without_resends = stacks(**ONE, timings={"JOB_RESEND_SECONDS": 600})


@pytest.fixture(scope="session")
def database():
    database = PostgreSQL("fsync=off")
    database.start()
    yield database
    database.remove()


@pytest.fixture(scope="session")
def running(request, cookies_session, tmp_path_factory):
    """A stack, for all tests with the same answers one after the other."""
    options = {"timings": TIMINGS, "sqlite": False, **request.param}
    broker = broker_class(options["broker"])
    folder = tmp_path_factory.mktemp("stack")
    project = baked(cookies_session, {**broker.answers, "worker_pool": options["pool"]})
    database = None if options["sqlite"] else request.getfixturevalue("database")
    variables = {
        **options["timings"],
        "WORKER_CONCURRENCY": 4 if options["pool"] == "prefork" else 16,  # jobs share a process
    }
    stack = prepare(project, broker, folder, database, **variables)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """End a stack after its last test: pytest would keep it until a test asks for another one."""
    params = [
        each.callspec.params if hasattr(each, "callspec") else {} for each in (item, nextitem)
    ]
    stack, following = [each.get("running") for each in params]
    if stack and stack is not following:
        item.funcargs["running"].stop()


@pytest.fixture
def stack(running):
    """The stack, with everything in it running. What it logs, pytest shows if the test fails."""
    running.recover()
    sizes = {log: log.stat().st_size for log in running.logs}
    yield running
    running.print_logs(sizes)


@pytest.fixture
def gate(tmp_path_factory):
    """Bodies run until this file exists: at the end of the test at the latest."""
    gate = tmp_path_factory.mktemp("gate") / "gate"
    yield gate
    gate.touch()


@pytest.fixture
def since(record_property):
    """Return a function that records the seconds since `start`."""

    def since(start):
        record_property("seconds", round(time.monotonic() - start, 1))

    return since


def errors(row):
    """Why runs of a job have failed, in order."""
    return [attempt["error"] for attempt in row["attempts"]]


def ran_once(stack, jobs):
    return [len(stack.notes("start", job)) for job in jobs] == [1] * len(jobs)


def succeeded(rows, crashes):
    return all((row["state"], row["crashes"]) == ("succeeded", crashes) for row in rows)
