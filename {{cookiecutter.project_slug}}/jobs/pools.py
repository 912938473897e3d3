"""What differs between Celery's worker pools. No other module asks which one it is.

The workers of one project may have different pools:

    celery -A config worker                   # the project's own
    celery -A config worker --pool threads
    celery -A config worker --pool prefork    # child processes
    celery -A config worker --pool gevent     # only in a project that was made for gevent
"""

import re
import sys
import threading
from importlib import import_module

from asgiref import sync
from billiard.common import terminate_handler_fired
from celery import concurrency, platforms
from celery.exceptions import SoftTimeLimitExceeded, WorkerShutdown

# Celery imports gevent for `--pool gevent`, and patches Python before it imports anything else.
gevent = sys.modules.get("gevent")
monkey = sys.modules.get("gevent.monkey")
TIME_LIMITED = {"prefork", "gevent"}  # pools in which Celery ends a body that takes too long
IS_GEVENT = bool(monkey and monkey.is_module_patched("socket"))


class Threads:
    """Python's own threads: in a prefork child, a worker of threads, the web, Beat and tests."""

    time_limit_errors = (SoftTimeLimitExceeded,)  # what a body gets when it exceeds its time limit
    Lock = threading.Lock

    def start_thread(self, function):
        threading.Thread(target=function, daemon=True).start()

    def query(self, function, *args, **kwargs):
        """Call a function that queries the database, but never inside a transaction of the body.

        With greenlets it runs in another thread, and so on another connection.
        """
        return function(*args, **kwargs)

    def is_shutdown(self, error):
        """Return whether a body got this exception because its worker shuts down."""
        return isinstance(error, SystemExit) and terminate_handler_fired()  # of a prefork child

    def end_idle_worker(self):
        """End an idle worker at once. With threads Celery does so by itself."""


class Greenlets:
    """Greenlets. A body may block all of them, so the leases have a native thread and lock."""

    def __init__(self):
        self.time_limit_errors = (SoftTimeLimitExceeded, gevent.Timeout)
        self.Lock = monkey.get_original("_thread", "allocate_lock")
        # A native thread for the event loop of each body that is a coroutine: one thread cannot run
        # two of them, and all greenlets share one.
        sync.ThreadPoolExecutor = import_module("gevent.threadpool").ThreadPoolExecutor

    def start_thread(self, function):
        monkey.get_original("_thread", "start_new_thread")(function, ())

    def query(self, function, *args, **kwargs):
        # In a thread, of which there are ten: each greenlet would open a connection of its own.
        return gevent.get_hub().threadpool.apply(function, args, kwargs)

    def is_shutdown(self, error):
        return isinstance(error, gevent.GreenletExit)

    def end_idle_worker(self):
        # Otherwise Celery may take five seconds to notice that it should stop.
        gevent.kill(gevent.get_hub().parent, WorkerShutdown(0))


pool = Greenlets() if IS_GEVENT else Threads()  # of this process


def pool_name(default):
    """Return the name of this worker's pool: from the command line, else the project's default.

    The settings need it before Celery has read its options. Raises SystemExit for greenlets in a
    project with another default, because settings of the whole project depend on them.
    """
    option = re.search(r"\bworker\b.*? (?:-P ?|--pool[ =])(\w+)", " ".join(sys.argv[1:]))
    name = option[1].replace("processes", "prefork") if option else default  # the same pool
    if name == "gevent" and default != "gevent":
        raise SystemExit("This project was not made for gevent. Use --pool threads or prefork.")
    return name


def has_children(worker):
    """Return whether the bodies of this worker run in child processes.

    Raises SystemExit for greenlets if Python is not patched, for then each body would block all.
    """
    module = concurrency.get_implementation(worker.pool_cls).__module__
    if module.endswith(".gevent") and not IS_GEVENT:
        raise SystemExit("Greenlets need a patched Python. Type the option in full: --pool gevent")
    return module.endswith(".prefork")


def remap_sigterm():
    """Make SIGTERM do what SIGQUIT does: a soft shutdown, which Celery has for prefork alone.

    Celery's own variable for this, REMAP_SIGTERM, would have to be set before its command starts.
    """
    handlers = platforms.signals
    handlers["SIGTERM"] = lambda *args: handlers["SIGQUIT"](*args)
