"""Code that the tests, `make demo`, `make chaos` and bench/ share."""

import os
from unittest import SkipTest


def missing(reason):
    """Skip the test because this machine lacks something. With DEMAND_ALL set, fail it."""
    raise AssertionError(reason) if os.environ.get("DEMAND_ALL") else SkipTest(reason)
