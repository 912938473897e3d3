"""Marks each slow test with its broker, and with `nightly` what `.ci/run` leaves out."""

import re

import pytest

from harness.bake import CHOICES

FIRST, *OTHERS = CHOICES["broker"]
OTHER_POOLS = CHOICES["worker_pool"][1:]


def pytest_configure(config):
    for broker in CHOICES["broker"]:
        config.addinivalue_line("markers", f"{broker}: the first broker that the test's name has")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    for item in items:
        words = re.split(r"[\W_]+", item.name)
        named = [word for word in words if word in CHOICES["broker"]]
        item.add_marker(named[0] if named else FIRST)
        if {*named} & {*OTHERS} and not item.get_closest_marker("each_broker"):
            item.add_marker("nightly")
        folder = item.path.parent.name
        other_pool = {*words} & {*OTHER_POOLS}
        if (
            # moto takes as much time as all else.
            ((other_pool or folder == "services") and {*words} & {"sqs", "dynamodb"})
            # The services and the runs have each pool, too.
            or (other_pool and folder == "faults")
            # The faults are about durable jobs, too.
            or ("jobs" in words and folder == "services")
        ):
            item.add_marker("nightly")
