"""Tasks whose errors would end their worker fail instead, like any other."""

import os
import sys
from asyncio import CancelledError
from datetime import UTC, datetime
from functools import cache, wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from math import isnan

from billiard.common import terminate_handler_fired
from celery.concurrency import thread
from celery.exceptions import InvalidTaskError, TaskPredicate, TaskRevokedError
from celery.utils.imports import symbol_by_name
from celery.worker.state import task_ready

from celery_steady import children, malformed

# The name that logs and Flower show. It isn't the built-in one, which Celery would raise again.
OutOfMemory = type("MemoryError", (Exception,), {})


def ends_its_message(method):
    """Let an error of this method of a request end that message only. Celery would only log it, or end."""

    @wraps(method)
    def call_or_drop(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            if not self.drop(error):
                raise

    return call_or_drop


def gives_to_pool(execute):
    @wraps(execute)
    def execute_or_drop(self, pool, **kwargs):
        try:
            result = execute(self, pool, **kwargs)
        except Exception as error:
            if not self.drop(error):
                raise
            task_ready(self)
            children.forget_unsent(pool)
            raise TaskRevokedError(self.id) from error  # so its slot is free
        # What a thread or greenlet raises besides its task's own error, nobody else would see.
        if isinstance(pool, thread.TaskPool):
            result.f.add_done_callback(self.drop_if_failed)
        elif hasattr(result, "link_exception"):  # not eventlet's
            result.link_exception(lambda greenlet: self.drop(greenlet.exception))
        return result

    return execute_or_drop


class SteadyRequest:
    """A task that raises a MemoryError fails. Celery would end the worker, or never acknowledge the
    task, which then comes again without end (celery issue 10462).

    What is wrong with its message is an error as it arrives. Celery would find some only when it's too late.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        (_, _, embed), limits = self._payload, self.time_limits
        dict(**embed or {})
        if not isinstance(self.id, str) or any(isnan(limit or 0) for limit in limits):
            raise InvalidTaskError(f"invalid id or time limits: {self.id!r} {limits!r}")
        # One that has passed: Celery would treat the task as a countdown, and prefetch one more message.
        if self._eta and self._eta <= datetime.now(UTC):
            self._eta = None

    def __init_subclass__(cls):
        """Celery makes a class for each task, with methods of its own."""
        own = vars(cls)
        if "execute_using_pool" in own:
            cls.execute_using_pool = gives_to_pool(own["execute_using_pool"])
            cls.on_success = ends_its_message(own["on_success"])

    def drop(self, error):
        """End this message, if it can be the cause of this error. Return whether it can."""
        if malformed.is_other(error, (TaskRevokedError, *self.connection_errors)):
            return False
        malformed.log(self.message, error)
        self.reject()  # unless it's acknowledged
        return True

    def drop_if_failed(self, future):
        if not future.cancelled() and (error := future.exception()):
            self.drop(error)

    @ends_its_message
    def on_failure(self, exc_info, *args, **kwargs):
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, MemoryError):
            exc_info.exception = OutOfMemory(*error.args)
        return super().on_failure(exc_info, *args, **kwargs)

    @ends_its_message
    def on_timeout(self, *args, **kwargs):
        return super().on_timeout(*args, **kwargs)


@cache
def failing(request):
    """Return this class of requests, or its name, with SteadyRequest."""
    request = symbol_by_name(request)
    if issubclass(request, SteadyRequest):
        return request
    return type(request.__name__, (SteadyRequest, request), {})


def let_fail(task):
    """Threads, gevent: let the function of this task raise exceptions only.

    Celery would never end a task that raises anything else (celery issue 10462).
    """
    gevent = sys.modules.get("gevent")
    ends = (gevent.GreenletExit, gevent.Timeout) if gevent else ()  # Celery's revoke and time limit

    def raised(error):
        if not isinstance(error, (Exception, *ends)):
            raise RuntimeError(f"The task raised {error!r}.") from error

    replace_errors(task, raised)


def let_end(task):
    """Prefork: let a task end that was stopped, whatever its clean-up raises, so that it runs again.

    Celery would take that error for the task's own: it fails (celery issue 10667).
    """

    def raised(error):
        if isinstance(error, Exception) and not isinstance(error, TaskPredicate):
            if terminate_handler_fired():
                raise SystemExit from error

    replace_errors(task, raised)


def end_copies(task):
    """Let no process that this task's function has forked return from it."""
    replace_errors(task, lambda error: None)


def replace_errors(task, raised):
    """Call raised(error), which may raise another one, with each error of this task's function.

    A process that the function has forked ends there. A task class of the project may run coroutines, and
    ask inspect whether the function returns one. It may iterate over a generator: that stays as it is.
    """
    run = task.run
    if hasattr(run, "_replaces_errors") or isgeneratorfunction(run) or isasyncgenfunction(run):
        return

    @wraps(run)
    def run_or_replace(*args, **kwargs):
        with Replacing(raised):
            return run(*args, **kwargs)

    if iscoroutinefunction(run):

        def raised_within(error):  # its event loop expects to see these
            if not isinstance(error, (CancelledError, GeneratorExit)):
                raised(error)

        @wraps(run)
        async def run_or_replace(*args, **kwargs):
            with Replacing(raised_within):
                return await run(*args, **kwargs)

    run_or_replace._replaces_errors = True
    task.run = run_or_replace


class Replacing:
    def __init__(self, raised):
        self.raised, self.process = raised, os.getpid()

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        try:
            if error is not None:
                self.raised(error)
        finally:
            if os.getpid() != self.process:
                os._exit(1)  # a copy that the task forked: it would go on as a second worker
