"""Each service of a project fails in each way that it can, while tasks of all kinds are sent.

Afterwards, nothing that was accepted is lost, tasks ran once, and fresh tasks succeed: nobody has
to lend a hand. The end of the run prints the table of docs/reliability.md. EVERY=1 tests all
combinations. TIMES=10 lets each fault of Redis or RabbitMQ happen ten times, with 40 tasks a
second, which is more than moto manages.
"""

import os
import time
from contextlib import suppress

import pytest

from harness.bake import CHOICES
from harness.load import FRESH, Load
from harness.project import wait_for
from harness.services import VISIBILITY, each_cell

# Where a running task may run again: (service, fault, broker). Everywhere else, each run of a task
# starts once. A stopped worker releases a long task; RabbitMQ does for a lost connection.
RUNS_AGAIN = {
    *(("worker", fault, broker) for fault in ("kill", "restart") for broker in CHOICES["broker"]),
    *(("broker", fault, "rabbitmq") for fault in ("restart", "kill", "cut", "forget")),
    # It doesn't confirm what is sent meanwhile, so that is sent again.
    ("broker", "read_only", "rabbitmq"),
}
# Where a task may arrive, but no answer, so it is sent again. A task that ran already runs once.
SENT_AGAIN = {
    *(("broker", each, name) for each in ("stall", "cut", "forget") for name in CHOICES["broker"]),
    # An orderly end of Redis has stored tasks that it never answers: 15 of 15 did.
    ("broker", "restart", "redis"),
}
# Where an order is stored, and its task may be missing: the hourly task finds it.
FORGETS_ORDERS = "broker", "web", "database"
# A worker must renew the messages of tasks that run longer than the visibility timeout, also then.
RENEWS = "broker", "results", "worker"
AFTER = 4  # seconds of load after the fault
TIMES = int(os.environ.get("TIMES", 1))


@pytest.mark.promise("It survives failing services")
@each_cell()
def test_nothing_accepted_is_lost_when_a_service_fails(
    stack_of_services, service, fault, request, record_property
):
    stack = stack_of_services
    broker = stack.project.answers["broker"]
    place = service, fault, broker
    target = stack.services[service]
    others = [process for process in stack.processes if process is not target.process]
    pids = {process: process.pid for process in others}
    load = Load(stack)
    long = ["longest" if service in RENEWS else "long", "job-long" if load.has_jobs else "long"]
    with stack.supervised(*others):
        times = TIMES if service == "broker" and broker != "sqs" else 1
        with load.running(*long, rate=40 if times > 1 else 4):
            start = time.time()
            for _ in range(times):
                getattr(target, fault)()
                over = time.time()
                seconds = load.wait_until_success() - over
                time.sleep(AFTER)
        fresh = load.send_fresh()
        load.wait_until_ended()
        if service in ("broker", "worker") and broker != "rabbitmq":
            # A task that was not acknowledged is delivered again after this time.
            time.sleep(max(0, over + VISIBILITY + 3 - time.time()))
            load.wait_until_ended()
        forgotten = load.find_forgotten_orders()
        ticks = load.count_ended("trials.tasks.tick")
        wait_for(lambda: load.count_ended("trials.tasks.tick") > ticks + 2)
        if stack.flower in stack.processes:
            wait_for_flower(stack, load)
        exited = [each.log.stem for each in others if each.pid != pids[each]]
    found = {
        "answers other than 503": [
            # Without its database, a Django project answers 500.
            each
            for each in load.failures
            if not (service == "database" and each.endswith(": 500"))
        ],
        "failed": load.failed(),
        "of them fresh": load.describe(set(load.tasks(fresh)) - load.succeeded()),
        "ran again": load.repeated(),
        "of them started before": load.repeated(before=start),
        "without a result": load.without_result(),
        "orders that the hourly task found": forgotten,
        "exited": exited,
        "refused": dict(load.refused),
        "seconds of the slowest request": round(load.slowest, 1),
        "seconds until a task succeeded": round(seconds, 1),
    }
    accepted = {kind: len(ids) for kind, ids in load.accepted.items()}
    print(*(f"{key}: {value}" for key, value in {"accepted": accepted, **found}.items()), sep="\n")
    name = request.node.callspec.id.removesuffix(f"-{service}-{fault}")
    record_property("cell", {"service": service, "fault": fault, "stack": name, **found})
    wrong = {
        key: found[key]
        for key in ("answers other than 503", "of them fresh", "without a result")
        if found[key]
    }
    # A task fails that needs the database while that is away. Nothing else does.
    if not all(
        service == "database" and name.startswith(("orders.", "job:")) for name in found["failed"]
    ):
        wrong["failed"] = found["failed"]
    again = "of them started before" if place in SENT_AGAIN else "ran again"
    if place not in RUNS_AGAIN and found[again]:
        wrong[again] = found[again]
    if forgotten and service not in FORGETS_ORDERS:
        wrong["orders that the hourly task found"] = forgotten
    if broker == "redis" and set(exited) & {worker.log.stem for worker in stack.workers}:
        wrong["exited"] = exited
    if service != "web" and load.slowest > 30:
        wrong["web"] = f"a request took {load.slowest:.0f} s"
    assert not wrong
    assert all(len(fresh[kind]) >= FRESH[kind] for kind in load.kinds if "rest" not in kind)


def wait_for_flower(stack, load):
    """Wait until Flower shows a task that was sent after the fault."""

    def shows():
        [task] = load.send("short")
        time.sleep(0.5)
        with suppress(OSError):
            return stack.in_flower(task) == "SUCCESS"

    wait_for(shows)
