"""The differences between Celery's worker pools. Most other modules use only `pool`.

The workers of one project may have different pools:

    celery -A config worker                   # the project's own
    celery -A config worker --pool threads
    celery -A config worker --pool prefork    # child processes
    celery -A config worker --pool gevent     # only in a project that was made for gevent
"""

import _thread
import mmap
import sys
import threading
import time
from ctypes import c_bool

from asgiref import sync
from billiard.common import terminate_handler_fired
from celery import concurrency
from celery.exceptions import SoftTimeLimitExceeded

TIME_LIMITED = {"prefork", "gevent"}  # pools in which Celery ends a task that takes too long
# Whether this worker is shutting down. Forked children share this memory.
shutting_down = c_bool.from_buffer(mmap.mmap(-1, 1))

# For `--pool gevent`, Celery patches Python before it imports anything else.
monkey = sys.modules.get("gevent.monkey")
IS_GEVENT = bool(monkey and monkey.is_module_patched("socket"))
if IS_GEVENT:
    import gevent
    from gevent import threadpool


class Threads:
    """Python's own threads: in a prefork child, a worker with threads, the web server, Beat and tests."""

    time_limit_errors = (SoftTimeLimitExceeded,)  # raised in a task at its time limit
    Lock = threading.Lock

    def start_thread(self, function):
        # threading.Thread takes a lock, which may not be free in a signal handler.
        _thread.start_new_thread(function, ())

    def sleep(self, seconds):
        """Wait in a thread of start_thread()."""
        time.sleep(seconds)

    def run_coroutine(self, function):
        """Run a coroutine function in an event loop that has a thread of its own. Returns the result."""
        return sync.async_to_sync(function)()

    def query(self, function, *args, **kwargs):
        """Call a function that queries the database. Do not use this inside a transaction of the task.

        With greenlets, the function runs in another thread, so it uses another connection.
        """
        return function(*args, **kwargs)

    def send(self, function, *args):
        """Call a function that uses a connection to the broker.

        With greenlets, only the main thread may use that connection, because it has opened it. In a thread of query(),
        this only plans the call, and does not wait for it.
        """
        function(*args)

    def is_terminated(self, error):
        """Return whether this exception ends more than a task: a prefork child, or a greenlet."""
        return terminate_handler_fired()


class Greenlets:
    """Greenlets. A task may block all of them, so leases use a native thread and lock."""

    def __init__(self):
        self.time_limit_errors = (SoftTimeLimitExceeded, gevent.Timeout)
        self.Lock = monkey.get_original("_thread", "allocate_lock")
        # Threads for queries. Those of gevent's own pool end after five idle seconds, and each would leave
        # its connection open until Python's garbage collector runs.
        self.threads = threadpool.ThreadPool(10)
        self.hub = gevent.get_hub()
        # gevent's sleep() waits in a greenlet of the thread: a process that ends meanwhile crashes.
        self.sleep = monkey.get_original("time", "sleep")
        self.main_thread = threading.get_native_id()

    def start_thread(self, function):
        monkey.get_original("_thread", "start_new_thread")(function, ())

    def run_coroutine(self, function):
        executors = sync.AsyncToSync.context_to_thread_executor
        with sync.AsyncSingleThreadContext() as context:
            executors[context] = native_executor()
            try:
                return sync.async_to_sync(function)()
            finally:
                # Its end would wait for a coroutine that ignores its time limit.
                del executors[context]

    def query(self, function, *args, **kwargs):
        # Use one of ten threads. Otherwise each greenlet would open its own connection.
        return self.threads.apply(function, args, kwargs)

    def send(self, function, *args):
        # get_hub() would make a hub for each thread
        if threading.get_native_id() == self.main_thread:
            function(*args)
        else:
            self.hub.loop.run_callback_threadsafe(gevent.spawn, function, *args)

    def is_terminated(self, error):
        return isinstance(error, gevent.GreenletExit)


def native_executor():
    """Return an executor with a native thread: the thread of all greenlets can run only one event loop."""
    executor = threadpool.ThreadPoolExecutor(1)
    # gevent's own keeps its thread, with two descriptors, forever.
    executor._threadpool = threadpool.ThreadPool(1, idle_task_timeout=0.1)
    return executor


pool = Greenlets() if IS_GEVENT else Threads()  # of this process


def pool_name(pool):
    """Return Celery's own name of a pool, such as "threads". `pool` is its class or a name."""
    pool = concurrency.get_implementation(pool)
    path = f"{pool.__module__}:{pool.__qualname__}"
    return next((name for name, alias in concurrency.ALIASES.items() if alias == path), path)
