"""The table in docs/reliability.md of what a fault does to plain tasks: see record_fault()."""

import pytest

from .bake import CHOICES

BROKERS, POOLS = CHOICES["broker"], CHOICES["worker_pool"]
NAMES = {"redis": "Redis", "rabbitmq": "RabbitMQ", "sqs": "SQS"}


@pytest.fixture
def record_fault(request, record_property):
    """A function that adds a row to the table.

    `seconds` were measured, with short timings. `after` says what they are in production, if they
    depend on these timings.
    """

    def record(fault, what, seconds=None, after=""):
        place = request.node.callspec.params["running"]
        record_property("fault", [fault, place["broker"], place["pool"], what, seconds, after])

    return record


def pytest_terminal_summary(terminalreporter):
    rows = []
    for report in terminalreporter.stats.get("passed", []):
        rows += [value for key, value in report.user_properties if key == "fault"]
    if rows:
        terminalreporter.section("what can be lost")
        terminalreporter.write(markdown(rows))


def took(seconds):
    """Return "1 to 4 s" for [1, 4]."""
    seconds = sorted(round(each) for each in seconds if each is not None)
    if not seconds:
        return "–"
    low, high = seconds[0], seconds[-1]
    if high <= 1:
        return "≤ 1 s"
    return f"{low} s" if low == high else f"{low} to {high} s"


def markdown(rows):
    """Return the table, with one row for all brokers and pools where the same happened."""
    merged = {}
    for fault, broker, pool, what, seconds, after in rows:
        places, found = merged.setdefault((fault, what, after), ({}, []))
        places.setdefault(broker, []).append(pool)
        found.append(seconds)
    faults = {fault: number for number, (fault, *_) in enumerate(merged)}
    lines = ["| fault | broker and pool | what happens | after |", "| --- | --- | --- | --- |"]
    for key, (places, found) in sorted(
        merged.items(), key=lambda row: (faults[row[0][0]], str(row))
    ):
        fault, what, after = key
        lines.append(f"| {fault} | {describe(places)} | {what} | {after or took(found)} |")
    return "\n".join(lines) + "\n"


def describe(places):
    """Return "Redis, RabbitMQ: prefork; SQS" for {broker: pools}."""
    by_pools = {}
    for broker in filter(places.get, BROKERS):
        pools = tuple(pool for pool in POOLS if pool in places[broker])
        by_pools.setdefault(pools, []).append(NAMES.get(broker, broker))
    parts = []
    for pools, brokers in by_pools.items():
        brokers = "all" if len(brokers) == len(BROKERS) else ", ".join(brokers)
        parts.append(brokers if len(pools) == len(POOLS) else f"{brokers}: {', '.join(pools)}")
    return "; ".join(parts)
