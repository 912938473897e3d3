"""Result backends that keep each result. The worker's consumer replaces Celery's own by these."""

from math import inf

from celery import signals, states
from celery.app import backends
from celery.concurrency import prefork

from celery_steady import versions

INSTEAD_OF = {
    "celery.backends.redis:RedisBackend": "celery_steady.redis:RedisBackend",
    "celery.backends.redis:SentinelBackend": "celery_steady.redis:SentinelBackend",
    "celery.backends.dynamodb:DynamoDBBackend": "celery_steady.dynamodb:DynamoDBBackend",
    "django_celery_results.backends.database:DatabaseBackend": (
        "celery_steady.django_celery_results:DatabaseBackend"
    ),
}


def replace(app):
    """Replace the result backend of the settings, if it is one of Celery's that has a class here."""
    kind, url = backends.by_url(app.backend_cls or app.conf.result_backend, app.loader)
    path = INSTEAD_OF.get(f"{kind.__module__}:{getattr(kind, '__qualname__', '')}")
    if path and versions.fits("results"):
        app.backend_cls = f"{path}+{url}" if url else path


def insist(app, pool):
    """Store each result again until it succeeds, as result_backend_always_retry does.

    With prefork only in the children: the worker's main process must go on, or its messages would be
    delivered again.
    """
    in_children = isinstance(pool, prefork.TaskPool)
    app.conf.result_backend_always_retry = not in_children
    app.conf.result_backend_max_retries = inf  # a web process may retry once
    # What counts a chord's ended tasks is not retried otherwise: a lost connection would fail the task.
    app.conf.redis_retry_on_timeout = True
    if not in_children:
        return

    def insist_in_child(**kwargs):
        app.backend.always_retry = True

    signals.worker_process_init.connect(insist_in_child, weak=False, dispatch_uid=__name__)


class KeepsResults:
    def _store_result(self, task_id, result, state, *args, **kwargs):
        """Don't let the state RETRY, stored late, replace a result.

        A task sends its retry before it stores this state, for which it may have to wait for the backend.
        By then, the retry may have ended (celery pull 6115 cures one backend).
        """
        if state == states.RETRY and self.get_state(task_id) in states.READY_STATES:
            return result
        return super()._store_result(task_id, result, state, *args, **kwargs)

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
