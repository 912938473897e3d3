"""What this process runs, and how it may end."""

import time

from billiard import get_start_method
from billiard.common import terminate_handler_fired

from durable_jobs.pools import pool, shutting_down

SIGTERM_SECONDS = 5  # if all processes get SIGTERM, the main process has handled it by then


class Process:
    """The runs of this process."""

    def __init__(self):
        self.runs = {}  # {token: Run} of those whose functions run
        self.suspect = None  # the Run whose job fails at its next crash: see Run.become_suspect()
        self.lock = pool.Lock()
        self.renews_leases = False  # whether its thread has started
        self.is_prefork = False  # whether this worker has child processes

    def has_run_of(self, task):
        return any(run.task is task for run in tuple(self.runs.values()))


process = Process()


def child_has_crashed():
    """Return whether this child alone got SIGTERM, for example from its own function. May take 5 s."""
    # Greenlets have no child. On macOS children are not forked, so they cannot know.
    if not terminate_handler_fired() or get_start_method() != "fork":
        return False
    until = time.monotonic() + SIGTERM_SECONDS
    while not shutting_down.value and time.monotonic() < until:
        time.sleep(0.05)
    return not shutting_down.value
