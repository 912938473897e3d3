"""Fixtures for tests with real processes: a running stack for each broker and pool."""

import time

import pytest

from .bake import CHOICES, WITH_JOBS, baked, chosen
from .project import fetch, free_ports
from .servers import PostgreSQL, broker_class
from .stack import TIMINGS, Stack, pairs, prepare

POOLS = CHOICES["worker_pool"]
STACKS = {}


def stacks(brokers=CHOICES["broker"], pools=POOLS, *, every_pair=False, **options):
    """Return a mark: run the test on pairs() of these. test_run.py has every pair."""
    params = []
    for broker, pool in pairs(brokers, pools, every_pair):
        name = "-".join([broker, pool, *options])
        # The same object for the same stack: pytest compares parameters by identity.
        param = STACKS.setdefault(name, {"broker": broker, "pool": pool, **options})
        params.append(pytest.param(param, id=name, marks=pytest.mark.xdist_group(name)))
    return pytest.mark.parametrize("running", params, indirect=True)


ONE = {"brokers": CHOICES["broker"][:1], "pools": POOLS[:1]}
on_each = stacks()
on_each_broker = stacks(pools=POOLS[:1])  # if the pool does not matter
on_each_pool = stacks(brokers=ONE["brokers"])
# If children matter, but greenlets are threads to what is tested.
on_prefork_and_threads = stacks(brokers=ONE["brokers"], pools=["prefork", "threads"])
on_one = stacks(**ONE, apart=True)  # another stack, because tests that share one run in turn
on_prefork = stacks(brokers=ONE["brokers"], pools=["prefork"])
on_gevent = stacks(brokers=ONE["brokers"], pools=["gevent"])
where_jobs_share_a_process = stacks(ONE["brokers"], [pool for pool in POOLS if pool != "prefork"])
on_rabbitmq = stacks(brokers=["rabbitmq"], pools=POOLS[:1])
on_sqs = stacks(brokers=["sqs"], pools=POOLS[:1])
with_flower = [name for name in CHOICES["broker"] if chosen(broker=name).has_flower]
# No message is sent again while a test waits; the other timings are the project's defaults.
DEFAULTS = {"timings": {"JOB_RESEND_SECONDS": 600}}
without_resends = stacks(**ONE, **DEFAULTS)
on_each_pool_with_default_timings = stacks(brokers=ONE["brokers"], **DEFAULTS)


@pytest.fixture(scope="session")
def database():
    database = PostgreSQL("fsync=off")
    database.start()
    yield database
    database.remove()


@pytest.fixture(scope="session")
def running(request, cookies_session, tmp_path_factory):
    """A stack that consecutive tests with the same parameters share."""
    options = {"timings": TIMINGS, "sqlite": False, **request.param}
    broker = broker_class(options["broker"])
    folder = tmp_path_factory.mktemp("stack")
    project = baked(
        cookies_session, {**WITH_JOBS, **broker.answers, "worker_pool": options["pool"]}
    )
    database = None if options["sqlite"] else request.getfixturevalue("database")
    variables = {
        **options["timings"],
        # More for threads and greenlets, which share a process.
        "WORKER_CONCURRENCY": 4 if options["pool"] == "prefork" else 16,
    }
    stack = prepare(project, broker, folder, database, **variables)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """End a stack after its last test: pytest would keep it until a test needs another one."""
    params = [
        each.callspec.params if hasattr(each, "callspec") else {} for each in (item, nextitem)
    ]
    stack, following = [each.get("running") for each in params]
    if stack and stack is not following:
        item.funcargs["running"].stop()


@pytest.fixture
def stack(running):
    """The stack, with all processes running."""
    try:
        running.recover()
    except AssertionError:
        print(running.printed())
        running.kill(*running.processes)  # the next test starts them again
        raise
    running.mark_logs()
    return running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Add to the report of a test that failed what the processes of its stack have printed."""
    report = yield
    stack = item.funcargs.get("stack") or item.funcargs.get("plain")
    if report.failed and isinstance(stack, Stack):
        report.sections.append(("logs of the stack", stack.printed()))
    return report


@pytest.fixture
def gate(tmp_path_factory):
    """A file for which bodies wait. It is created at the end of the test at the latest."""
    gate = tmp_path_factory.mktemp("gate") / "gate"
    yield gate
    gate.touch()


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


@pytest.fixture
def since(record_property):
    """A function, since(start): record the seconds since then, and return them."""

    def since(start):
        seconds = round(time.monotonic() - start, 1)
        record_property("seconds", seconds)
        return seconds

    return since


def errors(row):
    """Return the errors of a job's failed runs, in order."""
    return [failure["error"] for failure in row["failures"]]


def ran_once(stack, jobs):
    return [len(stack.notes("start", job)) for job in jobs] == [1] * len(jobs)


def succeeded(rows, crashes):
    return all((row["state"], row["crashes"]) == ("succeeded", crashes) for row in rows)
