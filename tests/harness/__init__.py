"""Code that the tests, `make demo`, `make chaos` and bench/ share."""

import os
import sys
from glob import glob
from pathlib import Path

sys.path += [str(Path(__file__).parents[2] / "celery-steady" / each) for each in ("bench", "tests")]
import results  # noqa: E402
from servers import missing, need  # noqa: E402

# Debian's PostgreSQL is not in PATH. Servers of other versions still come first: see servers.py.
POSTGRESQL = sorted(glob("/usr/lib/postgresql/*/bin"))[-1:]
FOLDERS = os.environ.get("SERVERS"), *POSTGRESQL, os.environ["PATH"]
os.environ["PATH"] = os.pathsep.join(filter(None, FOLDERS))
__all__ = ["missing", "need", "results"]
