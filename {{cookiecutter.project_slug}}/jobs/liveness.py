"""Shows a supervisor that a worker or Beat is alive."""

import os
from pathlib import Path


def touch_liveness_file(**kwargs):
    """Touch LIVENESS_FILE, if it is set: an old timestamp means that this process hangs."""
    if file := os.environ.get("LIVENESS_FILE"):
        Path(file).touch()
