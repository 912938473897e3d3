"""Says what a process waits for: immediately, then once a minute."""

import time

SECONDS = 60  # between two lines about the same
logged = {}  # {what: when it was last logged, by monotonic()}


def log_waiting(logger, what, error):
    """Log that this process can't do `what` and tries again, with the server's own words."""
    now = time.monotonic()
    if now - logged.get(what, -SECONDS) >= SECONDS:
        if len(logged) > 100:
            logged.clear()
        logged[what] = now
        kind = type(error).__name__
        logger.warning("Can't %s, and will try again: %s: %s", what, kind, error)
