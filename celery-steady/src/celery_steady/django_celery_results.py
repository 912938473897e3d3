"""The result backend of django-celery-results, through restarts of the database."""

from celery import states
from django.db import connection, router, transaction
from django.db.utils import InterfaceError, InternalError, OperationalError
from django_celery_results.backends import database

from celery_steady.results import KeepsResults, StoresChordMembers


class DatabaseBackend(StoresChordMembers, KeepsResults, database.DatabaseBackend):
    def exception_safe_to_retry(self, error):
        """Tell Celery which errors may end. It tries to store the result again until they do.

        The backend's own knows only InterfaceError (django-celery-results pull 290).
        """
        # An InternalError is a server that is read-only, as during a failover.
        is_temporary = isinstance(error, (InterfaceError, InternalError, OperationalError))
        return is_temporary and not connection.in_atomic_block

    def _store_result(self, task_id, result, status, *args, **kwargs):
        if status != states.RETRY:
            return super()._store_result(task_id, result, status, *args, **kwargs)
        using = router.db_for_write(self.TaskModel)
        rows = self.TaskModel._default_manager.using(using).filter(task_id=task_id)
        with transaction.atomic(using=using):
            while not rows.update(task_id=task_id):  # locks the row
                rows.get_or_create(task_id=task_id)
            if not rows.filter(status__in=states.READY_STATES).exists():
                super()._store_result(task_id, result, status, *args, **kwargs)
        return result

    def on_backend_retryable_error(self, error):
        connection.close()
