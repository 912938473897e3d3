"""What the tests, `make demo`, `make chaos` and bench/ share."""

import os
from unittest import SkipTest


def missing(reason):
    """Skip the test for lack of something on this machine, or fail it where all was promised."""
    raise AssertionError(reason) if os.environ.get("DEMAND_ALL") else SkipTest(reason)
