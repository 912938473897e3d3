"""Which parts are on. A version of Celery or kombu that the tests haven't seen runs as it is."""

from importlib.metadata import version
from logging import getLogger

logger = getLogger(__name__)

NEWEST = (5, 7)  # of Celery and kombu: the tests have seen no later ones
SINCE = {  # part: the first version that it fits
    "defaults": ("celery", (5, 5)),
    "worker": ("celery", (5, 5)),
    "Beat": ("celery", (5, 5)),
    "results": ("celery", (5, 5)),
    "Redis": ("kombu", (5, 5)),
    "RabbitMQ": ("celery", (5, 5)),
    "Amazon SQS": ("kombu", (5, 6)),  # older ones have another HTTP client
    "batched events": ("celery", (5, 7)),  # older dispatchers lose events while others are sent
}


def minor(package):
    """Return the installed minor version of a package, such as (5, 7)."""
    return tuple(map(int, version(package).split(".")[:2]))


def fits(part, since=SINCE):
    """Return whether this part is known to fit the installed versions of Celery and kombu."""
    package, oldest = since[part]
    return minor(package) >= oldest and max(minor("celery"), minor("kombu")) <= NEWEST


def choose(part, replacement, stock):
    """Return `replacement` if this part fits the installed versions, otherwise Celery's or kombu's `stock`."""
    return replacement if fits(part) else stock


def log_what_is_off(name="celery-steady", since=SINCE):
    """Log, in one line, which parts of the package `name` don't fit the installed versions."""
    if off := [part for part in since if not fits(part, since)]:
        text = "%s knows Celery and kombu up to %s. With Celery %s and kombu %s, it is off for: %s"
        newest = ".".join(map(str, NEWEST))
        logger.warning(text, name, newest, version("celery"), version("kombu"), ", ".join(off))
