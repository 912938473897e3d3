"""Shows a supervisor that a worker is alive."""

import os
from logging import getLogger
from pathlib import Path

logger = getLogger(__name__)


def touch_liveness_file(**kwargs):
    """Touch the file that LIVENESS_FILE names, if any: an old timestamp means that this process hangs."""
    if file := os.environ.get("LIVENESS_FILE"):
        try:
            Path(file).touch()
        except OSError as error:
            logger.warning("LIVENESS_FILE cannot be written: %s", error)
