"""Code that the tests, `make demo`, `make chaos` and bench/ share."""

import os
import shutil
import sys
from glob import glob
from pathlib import Path
from unittest import SkipTest

# Servers of other versions, made by .ci/servers, come first. Debian's commands for RabbitMQ change
# the user: before them come the scripts themselves. Its PostgreSQL is not in PATH.
POSTGRESQL = sorted(glob("/usr/lib/postgresql/*/bin"))[-1:]
FOLDERS = os.environ.get("SERVERS"), "/usr/lib/rabbitmq/bin", *POSTGRESQL, os.environ["PATH"]
os.environ["PATH"] = os.pathsep.join(filter(None, FOLDERS))

sys.path.append(str(Path(__file__).parents[2] / "celery-steady/bench"))  # for its results.py


def missing(reason):
    """Skip the test because this machine lacks something. With DEMAND_ALL set, fail it."""
    raise AssertionError(reason) if os.environ.get("DEMAND_ALL") else SkipTest(reason)


def need(program, package=None):
    """Call missing() unless this program is installed. `package` is Debian's."""
    if not shutil.which(program):
        missing(f"{program} is not installed: sudo apt install {package or program}")
