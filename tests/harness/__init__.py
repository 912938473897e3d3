"""What the tests, `make demo`, `make chaos` and bench/ share."""

import os

import pytest


def missing(reason):
    """Skip the test for lack of something on this machine, or fail it where all was promised."""
    if os.environ.get("DEMAND_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)
