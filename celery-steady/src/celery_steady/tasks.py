"""Tasks whose errors would end their worker fail instead, like any other."""

from asyncio import CancelledError
from datetime import UTC, datetime
from functools import cache, wraps

from celery.utils.imports import symbol_by_name

# Celery's threads and greenlets would never end such a task (celery issue 10462).
NO_EXCEPTIONS = (CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
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
    """Let the function of this task raise exceptions only."""
    run = task.run
    if hasattr(run, "_lets_fail"):
        return

    @wraps(run)
    def run_or_fail(*args, **kwargs):
        try:
            return run(*args, **kwargs)
        except NO_EXCEPTIONS as error:
            raise RuntimeError(f"The task raised {error!r}.") from error

    run_or_fail._lets_fail = True
    task.run = run_or_fail
