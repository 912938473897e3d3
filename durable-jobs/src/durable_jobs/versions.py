"""Which extensions of Celery and kombu are on: they make jobs faster, or fix a transport. Jobs are safe without them."""

import logging
from importlib.metadata import version

logger = logging.getLogger(__name__)

NEWEST = (5, 7)  # of Celery and kombu: the tests have seen no later ones
SINCE = {
    # Older dispatchers lose events while others are sent.
    "batched task events": ("celery", (5, 7)),
    "repairs for RabbitMQ": ("celery", (5, 5)),
    "fast recovery of child processes": ("celery", (5, 5)),
    "soft shutdown on SIGTERM": ("celery", (5, 5)),
    "batched confirms from RabbitMQ": ("kombu", (5, 7)),
    "Redis without copies": ("kombu", (5, 5)),
    # Older ones have another HTTP client.
    "repairs for SQS": ("kombu", (5, 6)),
}


def fits(extension):
    """Return whether this extension is known to fit the installed version."""
    package, oldest = SINCE[extension]
    return oldest <= minor(package) <= NEWEST


def minor(package):
    """Return the installed minor version of a package, such as (5, 7)."""
    return tuple(map(int, version(package).split(".")[:2]))


def log_what_is_off():
    if off := [extension for extension in SINCE if not fits(extension)]:
        text = "With Celery %s and kombu %s, durable-jobs works without: %s"
        logger.warning(text, version("celery"), version("kombu"), ", ".join(off))
