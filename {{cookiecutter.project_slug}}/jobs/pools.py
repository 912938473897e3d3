"""The differences between Celery's worker pools. Most other modules use only `pool`.

The workers of one project may have different pools:

    celery -A config worker                   # the project's own
    celery -A config worker --pool threads
    celery -A config worker --pool prefork    # child processes
    celery -A config worker --pool gevent     # only in a project that was made for gevent
"""

import mmap
import re
import sys
import threading
import time
from importlib import import_module

from asgiref import sync
from billiard import get_start_method
from billiard.common import terminate_handler_fired
from celery import concurrency, platforms
from celery.exceptions import SoftTimeLimitExceeded, WorkerShutdown

# Celery imports gevent for `--pool gevent`, and patches Python before it imports anything else.
gevent = sys.modules.get("gevent")
monkey = sys.modules.get("gevent.monkey")
TIME_LIMITED = {"prefork", "gevent"}  # pools in which Celery ends a body that takes too long
IS_GEVENT = bool(monkey and monkey.is_module_patched("socket"))
SIGTERM_SECONDS = 5  # if all processes get SIGTERM, the main process has handled it by then

# Its only byte says whether this worker is shutting down. Forked children share this memory.
shutting_down = mmap.mmap(-1, 1)


class Threads:
    """Python's own threads: in a prefork child, a worker with threads, the web server, Beat and tests."""

    time_limit_errors = (SoftTimeLimitExceeded,)  # raised in a body at its time limit
    Lock = threading.Lock

    def start_thread(self, function):
        threading.Thread(target=function, daemon=True).start()

    def query(self, function, *args, **kwargs):
        """Call a function that queries the database. Do not use this inside a transaction of the body.

        With greenlets, the function runs in another thread, so it uses another connection.
        """
        return function(*args, **kwargs)

    def is_terminated(self, error):
        """Return whether this exception ends more than a body: a prefork child, or a greenlet."""
        return isinstance(error, SystemExit) and terminate_handler_fired()

    def is_shutdown(self):
        """Return whether the body was terminated because its worker is shutting down.

        A prefork child that alone gets SIGTERM, for example from its own body, has crashed.
        """
        until = time.monotonic() + SIGTERM_SECONDS
        while not shutting_down[0] and time.monotonic() < until:
            time.sleep(0.05)
        # On macOS children are not forked, so they cannot know.
        return shutting_down[0] or get_start_method() != "fork"

    def end_idle_worker(self):
        """Do nothing: with threads, Celery ends an idle worker at once."""


class Greenlets:
    """Greenlets. A body may block all of them, so leases use a native thread and lock."""

    def __init__(self):
        self.time_limit_errors = (SoftTimeLimitExceeded, gevent.Timeout)
        self.Lock = monkey.get_original("_thread", "allocate_lock")
        threadpool = import_module("gevent.threadpool")
        # Threads for queries. Those of gevent's own pool end after five idle seconds, and each would leave
        # its connection open until Python's garbage collector runs.
        self.threads = threadpool.ThreadPool(10)

        class Executor(threadpool.ThreadPoolExecutor):
            """For the event loop of each coroutine: one thread, that of all greenlets, runs only one."""

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                # gevent's own executor keeps its thread, with two descriptors, for ever.
                self._threadpool = threadpool.ThreadPool(self._max_workers, idle_task_timeout=0.1)

        sync.ThreadPoolExecutor = Executor

    def start_thread(self, function):
        monkey.get_original("_thread", "start_new_thread")(function, ())

    def query(self, function, *args, **kwargs):
        # Use one of ten threads. Otherwise each greenlet would open its own connection.
        return self.threads.apply(function, args, kwargs)

    def is_terminated(self, error):
        return isinstance(error, gevent.GreenletExit)

    def is_shutdown(self):
        return True

    def end_idle_worker(self):
        # Otherwise Celery may take five seconds to notice that it should stop.
        gevent.kill(gevent.get_hub().parent, WorkerShutdown(0))


pool = Greenlets() if IS_GEVENT else Threads()  # of this process


def pool_name(default):
    """Return the name of this worker's pool: from the command line, or else the project's default.

    The settings need it before Celery has read its options. Raises SystemExit for gevent in a project
    with another default, because settings of the whole project depend on gevent.
    """
    option = re.search(r"\bworker\b.*? (?:-P ?|--pool[ =])(\w+)", " ".join(sys.argv[1:]))
    # Celery has the alias "processes" for prefork.
    name = option[1].replace("processes", "prefork") if option else default
    if name == "gevent" and default != "gevent":
        raise SystemExit("This project was not made for gevent. Use --pool threads or prefork.")
    return name


def has_children(worker):
    """Return whether the bodies of this worker run in child processes.

    Raises SystemExit for gevent if Python is not patched, because each body would block all others.
    """
    module = concurrency.get_implementation(worker.pool_cls).__module__
    if module.endswith(".gevent") and not IS_GEVENT:
        raise SystemExit("Python is not patched for gevent. Type the option in full: --pool gevent")
    return module.endswith(".prefork")


def remap_sigterm():
    """Make SIGTERM do what SIGQUIT does: start Celery's soft shutdown, which works only with prefork.

    Celery's own environment variable for this, REMAP_SIGTERM, must be set before its command starts.
    """
    handlers = platforms.signals
    handlers["SIGTERM"] = lambda *args: handlers["SIGQUIT"](*args)
