"""Tasks whose errors would end their worker fail instead, like any other."""

import os
import sys
from datetime import UTC, datetime
from functools import cache, wraps

from billiard.common import terminate_handler_fired
from celery.exceptions import TaskPredicate
from celery.utils.imports import symbol_by_name

# The name that logs and Flower show. It isn't the built-in one, which Celery would raise again.
OutOfMemory = type("MemoryError", (Exception,), {})


class SteadyRequest:
    """A task that raises a MemoryError fails. Celery would end the worker, or never acknowledge the
    task, which then comes again without end (celery issue 10462).
    """

    @property
    def eta(self):
        """When to start, or None if that time has come. Celery would take one more message meanwhile."""
        eta = super().eta
        return eta if eta and eta > datetime.now(UTC) else None

    def on_failure(self, exc_info, *args, **kwargs):
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, MemoryError):
            exc_info.exception = OutOfMemory(*error.args)
        return super().on_failure(exc_info, *args, **kwargs)


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

    A process that the function has forked ends there.
    """
    run = task.run
    if hasattr(run, "_replaces_errors"):
        return

    @wraps(run)
    def run_or_replace(*args, **kwargs):
        process = os.getpid()
        try:
            return run(*args, **kwargs)
        except BaseException as error:
            raised(error)
            raise
        finally:
            if os.getpid() != process:
                os._exit(1)  # a copy that the task forked: it would go on as a second worker

    run_or_replace._replaces_errors = True
    task.run = run_or_replace
