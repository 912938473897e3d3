"""Shows a supervisor that a worker or Beat is alive."""

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


def touch_liveness_file(**kwargs):
    """Touch LIVENESS_FILE, if it is set: an old timestamp means that this process hangs."""
    if file := os.environ.get("LIVENESS_FILE"):
        try:
            Path(file).touch()
        except OSError as error:
            logger.warning("LIVENESS_FILE cannot be written: %s", error)
