"""Result backends that keep each result. The worker's consumer replaces Celery's own by these."""

import threading

from celery import signals, states
from celery.app import backends
from celery.utils.imports import symbol_by_name

from celery_steady import defaults, versions
from celery_steady.transports import as_redis

INSTEAD_OF = {
    "celery.backends.redis:RedisBackend": "celery_steady.redis:RedisBackend",
    "celery.backends.redis:SentinelBackend": "celery_steady.redis:SentinelBackend",
    "celery.backends.dynamodb:DynamoDBBackend": "celery_steady.dynamodb:DynamoDBBackend",
    "django_celery_results.backends.database:DatabaseBackend": (
        "celery_steady.django_celery_results:DatabaseBackend"
    ),
}


def by_url(app):
    """Return the class of the app's result backend, ours in place of Celery's, and its URL."""
    url = as_redis(app.backend_cls or app.conf.result_backend)
    kind, url = backends.by_url(url, app.loader)
    path = INSTEAD_OF.get(f"{kind.__module__}:{getattr(kind, '__qualname__', '')}")
    if path and versions.fits("results"):
        kind = symbol_by_name(path)
    return kind, url


def prepare(app, pool):
    """Before a worker starts: replace the result backend, and let a prefork worker's children insist.

    They store each result again until it succeeds. The main process must go on, or its messages would be
    delivered again.
    """
    kind, url = by_url(app)
    if kind.__module__.startswith("celery_steady."):
        path = f"{kind.__module__}:{kind.__qualname__}"
        app.backend_cls = f"{path}+{url}" if url else path
    # A backend that was used before has the settings of then.
    app._backend_cache, app._local = None, threading.local()
    name = "result_backend_always_retry"
    if not defaults.is_prefork(pool) or defaults.own(app.conf).get(name) is not None:
        return

    def insist_in_child(**kwargs):
        app.backend.always_retry = True

    signals.worker_process_init.connect(insist_in_child, weak=False, dispatch_uid=__name__)


class KeepsResults:
    """In each subclass, the state RETRY, stored late, doesn't replace a result: it looks and writes in one step.

    A task sends its retry before it stores this state, for which it may have to wait for the backend.
    By then, the retry may have ended (celery pull 6115 cures one backend).
    """

    def is_result(self, stored):
        """Return whether this is a result, as it is stored."""
        return bool(stored) and self.decode_result(stored)["status"] in states.READY_STATES

    def mark_as_retry(self, task_id, exc, traceback=None, request=None, **kwargs):
        """Don't store the state RETRY of a task with ignore_result=True: no success would replace it.

        Celery does so with task_store_errors_even_if_ignored.
        """
        if not getattr(request, "ignore_result", False):
            return super().mark_as_retry(task_id, exc, traceback, request, **kwargs)


class StoresChordMembers:
    """For backends that read a chord's results one by one, and need all of them."""

    def on_chord_part_return(self, request, state, result, **kwargs):
        """Store what a chord's task returns, even with ignore_result=True: its callback needs all.

        Without this, each of them must set ignore_result=False (celery pull 1864).
        """
        if getattr(request, "ignore_result", False):
            self.store_result(request.id, result, state, request=request)
        return super().on_chord_part_return(request, state, result, **kwargs)
