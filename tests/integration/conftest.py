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
        # moto takes as much time as all else: in .ci/run, only one pool has it.
        if {*words} & {"sqs", "dynamodb"} and {*words} & {*OTHER_POOLS}:
            item.add_marker("nightly")
