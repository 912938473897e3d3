"""Fixtures for tests with real processes: a running stack for each broker and pool."""

import itertools
import os
import signal
import time

import pytest

from .bake import CHOICES, WITH_JOBS, baked, chosen
from .project import children_of, started
from .servers import PostgreSQL, broker_class
from .stack import TIMINGS, Stack, prepare, prepare_plain

BROKERS, POOLS = CHOICES["broker"], CHOICES["worker_pool"]
STACKS = {}
RESULTS = {"redis": "redis", "rabbitmq": "database", "sqs": "dynamodb"}  # of plain projects


def stacks(brokers=BROKERS, pools=POOLS, *, plain="", every_pair=False, **options):
    """Return a mark: run the test on the first broker with each pool, the others with the first.

    That finds what depends on either. With `every_pair`, it runs on all, for what depends on both;
    test_run.py and test_plain_run.py do. `plain` names a group of tests of plain projects.
    """
    params = []
    for broker, pool in itertools.product(brokers, pools):
        if every_pair or broker == BROKERS[0] or pool == POOLS[0]:
            name = "-".join([broker, pool, *options])
            group = f"{plain}{name}"
            # The same object for the same stack: pytest compares parameters by identity.
            param = {"broker": broker, "pool": pool, "plain": plain, **options}
            param = STACKS.setdefault(group, param)
            params.append(pytest.param(param, id=name, marks=pytest.mark.xdist_group(group)))
    assert params, "pytest would skip the test"
    return pytest.mark.parametrize("running", params, indirect=True)


def either(*marks):
    """Return a mark: run the test on the stacks of all these marks."""
    params = [param for mark in marks for param in mark.args[1]]
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
on_rabbitmq = stacks(brokers=["rabbitmq"], pools=POOLS[:1])
on_sqs = stacks(brokers=["sqs"], pools=POOLS[:1])
with_flower = [name for name in CHOICES["broker"] if chosen(broker=name).has_flower]
# No message is sent again while a test waits; the other timings are the project's defaults.
DEFAULTS = {"timings": {"JOB_RESEND_SECONDS": 600}}
without_resends = stacks(**ONE, **DEFAULTS)
on_each_with_default_timings = stacks(**DEFAULTS)


@pytest.fixture(scope="session")
def database():
    # The delay: a commit that does not wait for the disk would be lost in a crash of PostgreSQL.
    with started(PostgreSQL("fsync=off", "wal_writer_delay=10s")) as [database]:
        yield database


@pytest.fixture(scope="session")
def running(request, cookies_session, tmp_path_factory):
    """A stack that consecutive tests with the same parameters share."""
    options = {"timings": TIMINGS, "sqlite": False, "tracing": False, **request.param}
    broker, pool = broker_class(options["broker"]), {"worker_pool": options["pool"]}
    folder = tmp_path_factory.mktemp("stack")
    database = None if options["sqlite"] else request.getfixturevalue("database")
    plain = {"durable_jobs": "no", "result_backend": RESULTS.get(options["broker"])}
    own = plain if options["plain"] else WITH_JOBS
    project = baked(cookies_session, {**broker.answers, **own, **pool})
    variables = request.getfixturevalue("tracing")(project) if options["tracing"] else {}
    if options["plain"]:
        project.install()
        quick = None if options.get("defaults") else broker.settings
        stack = prepare_plain(project, folder, database, quick, **variables)
    else:
        # More for threads and greenlets, which share a process.
        variables["WORKER_CONCURRENCY"] = 4 if options["pool"] == "prefork" else 16
        variables |= options["timings"]
        stack = prepare(project, broker, folder, database, **variables)
    with started(stack):
        yield stack


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """End a stack after its last test: pytest would keep it until a test needs another one."""
    params = [
        each.callspec.params if hasattr(each, "callspec") else {} for each in (item, nextitem)
    ]
    stack, following = [each.get("running") for each in params]
    if stack and stack is not following:
        item.funcargs["running"].end()


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
    stack = item.funcargs.get("stack")
    if report.failed and isinstance(stack, Stack):
        report.sections.append(("logs of the stack", stack.printed()))
    return report


@pytest.fixture
def gate(tmp_path_factory):
    """A file for which task functions wait. It is created at the end of the test at the latest."""
    gate = tmp_path_factory.mktemp("gate") / "gate"
    yield gate
    gate.touch()


def ran_once(stack, jobs):
    return [stack.starts(job) for job in jobs] == [1] * len(jobs)


def stop_before_it_knows(stack, worker, send):
    """Stop a worker whose child starts a task that its main process has not read of. Return it.

    `send` sends the task. The main process is busy, as with many messages; it has one child.
    """
    [child] = children_of(worker.pid)
    os.kill(child, signal.SIGSTOP)
    task = send()
    time.sleep(2)  # time to pass it to the child
    freeze = "app.control.broadcast('freeze', arguments={'seconds': 4})"
    stack.ask(f"from config.celery import app\n{freeze}")
    time.sleep(1)  # time to begin
    os.kill(child, signal.SIGCONT)
    stack.wait_until_started(task)
    os.kill(worker.pid, signal.SIGTERM)
    return task
