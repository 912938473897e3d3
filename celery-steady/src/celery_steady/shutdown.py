"""How a worker stops on SIGTERM: it takes no more tasks, and waits for the running ones, but not forever.

By default, SIGTERM waits for all tasks without a limit. Celery's own soft shutdown, which SIGQUIT starts,
always takes worker_soft_shutdown_timeout (celery issue 9505), renews no messages meanwhile, and can't
end threads (celery issue 10490).
"""

import _thread
import os
import signal
import time
from contextlib import suppress
from logging import getLogger

from celery import signals
from celery.bootsteps import StartStopStep
from celery.worker import state
from celery.worker.consumer.tasks import Tasks

from celery_steady import defaults

logger = getLogger(__name__)

# Seconds until a child that won't end is killed, and then until the worker's process exits regardless.
# Supervisors wait ten seconds or more after the timeout.
KILL_SECONDS, EXIT_SECONDS = 5, 3


class SoftStop(StartStopStep):
    """Prefork: SIGTERM waits until no task runs, at most worker_soft_shutdown_timeout seconds.

    Then the children that still have a task end, and those are killed that don't, such as in C code. A
    second SIGTERM ends the wait.
    """

    requires = (Tasks,)
    deadline = timer = None

    def include_if(self, consumer):
        return consumer.hub and consumer.is_prefork and consumer.is_limited(consumer.app)

    def start(self, consumer):
        if not consumer.is_main:
            return
        handler = signal.SIGTERM, lambda *args: self.begin(consumer)
        signal.signal(*handler)
        # Once more when all steps have started: one of the project's own may handle SIGTERM, too.
        consumer.timer.call_after(0, signal.signal, handler)
        if self.deadline:  # it has lost its connection while it was stopping
            self.stop_consuming(consumer)

    def begin(self, consumer):
        if not consumer.connection:  # the event loop doesn't run
            signal.raise_signal(signal.SIGQUIT)
        elif self.deadline:
            self.deadline = time.monotonic()
        else:
            consumer.announce_shutdown("SIGTERM")
            timeout = consumer.app.conf.worker_soft_shutdown_timeout
            self.deadline = time.monotonic() + timeout
            # From the event loop, between two events. In the middle of one, the worker might be
            # reading a child's result, and never finish.
            consumer.timer.call_after(0, self.stop_consuming, (consumer,))

    def stop_consuming(self, consumer):
        consumer.task_consumer.cancel()
        consumer.controller.semaphore.clear()  # forget tasks that wait for a free child
        seconds = max(self.deadline - time.monotonic(), 0)
        logger.warning("Soft shutdown: %d tasks have %d s to end", len(self.running()), seconds)
        self.timer = consumer.timer.call_repeatedly(0.1, self.check, (consumer,))

    def running(self):
        return [request for request in tuple(state.reserved_requests) if request._apply_result]

    def check(self, consumer):
        if not self.running() or time.monotonic() >= self.deadline:
            self.timer.cancel()
            defaults.override(consumer.app.conf, "worker_soft_shutdown_timeout", 0)  # it has waited
            signal.raise_signal(signal.SIGQUIT)
            state.maybe_shutdown()  # before the next timer: the pool has stopped


def limit_children(consumer, seconds, exitcode):
    """Prefork: in so many seconds and KILL_SECONDS, kill the children that haven't ended by then.

    If this process then waits for something else, such as the rest of a dead child's result, it ends, too.
    May be called in a signal handler.
    """
    # Celery 5.5's own cancels what has succeeded, too: there, messages come back after their timeout.
    cancel = getattr(consumer, "cancel_active_requests", bool)
    pool = consumer.pool._pool
    children = tuple(pool._pool) if pool else ()  # of now: the pool forgets them when it has ended

    def kill():
        time.sleep(seconds + KILL_SECONDS)
        try:
            cancel()  # gives them back; after an error, Celery only waits
        finally:
            for child in children:
                if child.exitcode is None:
                    logger.warning("Killing the child process %d, which doesn't end", child.pid)
                    with suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGKILL)

    _thread.start_new_thread(kill, ())
    limit(consumer, seconds + KILL_SECONDS + EXIT_SECONDS, exitcode)


def limit(consumer, seconds, exitcode):
    """End this process in so many seconds, unless it has ended by then.

    May be called in a signal handler.
    """

    def end():
        time.sleep(seconds)
        try:
            close(consumer)
            signals.worker_shutdown.send(consumer.controller)
        except Exception:
            logger.exception("Error at the end of the worker")
        finally:
            os._exit(exitcode)

    # Not threading.Thread, whose lock may be taken in a signal handler.
    _thread.start_new_thread(end, ())


def close(consumer):
    try:
        if consumer.hub:
            consumer.hub.close()  # acknowledges tasks that have ended
    finally:
        consumer.shutdown()  # closes the connection, which gives the other messages back
