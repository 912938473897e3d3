"""Code that the tests, `make demo`, `make chaos` and bench/ share."""

import os
import shutil
from unittest import SkipTest


def missing(reason):
    """Skip the test because this machine lacks something. With DEMAND_ALL set, fail it."""
    raise AssertionError(reason) if os.environ.get("DEMAND_ALL") else SkipTest(reason)


def need(program, package=None, path=None):
    """Call missing() unless this program is installed. `package` is Debian's."""
    if not shutil.which(program, path=path):
        missing(f"{program} is not installed: sudo apt install {package or program}")
