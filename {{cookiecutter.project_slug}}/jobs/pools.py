"""What differs between Celery's worker pools. No other module knows one of them.

The workers of one project may have different ones, beside each other:

    celery -A config worker                       # the project's own
    celery -A config worker --pool threads
    celery -A config worker --pool prefork        # child processes
    celery -A config worker --pool gevent         # where the package gevent is installed
"""

import os
import re
import sys
import threading
from pathlib import Path

from billiard.common import terminate_handler_fired
from celery import concurrency
from celery.exceptions import SoftTimeLimitExceeded, WorkerShutdown

# Celery imports gevent where it is asked for that pool, and patches Python before all else.
gevent = sys.modules.get("gevent")
monkey = sys.modules.get("gevent.monkey")
IS_GEVENT = bool(monkey and monkey.is_module_patched("socket"))


class ThreadPool:
    """Threads; also the one thread of a prefork child, and of what is no worker: web, Beat, tests."""

    time_limits = (SoftTimeLimitExceeded,)  # what a body gets that is over its time limit
    Lock = staticmethod(threading.Lock)

    def start_thread(self, function):
        threading.Thread(target=function, daemon=True).start()

    def query(self, function, *args, **kwargs):
        """Call what asks the database. Not for what belongs to a transaction of a body."""
        return function(*args, **kwargs)

    def is_shutdown(self, error):
        """Whether a body got this exception because its worker shuts down."""
        return isinstance(error, SystemExit) and terminate_handler_fired()  # of a prefork child

    def end_idle_worker(self):
        """Have a worker without tasks end at once: this one does."""


class GeventPool:
    """Greenlets. What must go on while a body blocks all of them has native threads and locks."""

    def __init__(self):
        self.time_limits = (SoftTimeLimitExceeded, gevent.Timeout)
        self.Lock = monkey.get_original("_thread", "allocate_lock")

    def start_thread(self, function):
        monkey.get_original("_thread", "start_new_thread")(function, ())

    def query(self, function, *args, **kwargs):
        """Not on the body's greenlet, which would open a database connection for each job."""
        return gevent.get_hub().threadpool.apply(function, args, kwargs)

    def is_shutdown(self, error):
        return isinstance(error, gevent.GreenletExit)

    def end_idle_worker(self):
        # It does not look for messages any more, for which Celery takes five seconds.
        gevent.kill(gevent.get_hub().parent, WorkerShutdown(0))


pool = GeventPool() if IS_GEVENT else ThreadPool()


def named(default):
    """Return the pool of this worker, before Celery has read its command line; "" of no worker."""
    is_celery = "celery" in Path(sys.argv[0]).parts[-2:]  # bin/celery, or python -m celery
    if not is_celery or "worker" not in sys.argv:
        return ""
    option = re.search(r" (?:-P ?|--pool[ =])(\w+)", " ".join(sys.argv))
    return option[1].replace("processes", "prefork") if option else default


def has_children(worker):
    """Whether this worker's bodies run in child processes. Refuses greenlets that would block."""
    module = concurrency.get_implementation(worker.pool_cls).__module__
    if module.endswith(".gevent") and not IS_GEVENT:  # Celery patches if it reads this very option
        raise SystemExit("Greenlets need a patched Python. Type the option in full: --pool gevent")
    return module.endswith(".prefork")


def remap_sigterm(name):
    """Have SIGTERM shut a prefork worker down softly: what is unfinished goes back to the broker.

    Other pools have no such shutdown, see worker.end_in_time(). Celery has already read the variable
    by now, so its command starts once more, as the same process.
    """
    remap = "SIGQUIT" if name == "prefork" else ""
    if name and os.environ.get("REMAP_SIGTERM", "") != remap:
        os.environ["REMAP_SIGTERM"] = remap
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
