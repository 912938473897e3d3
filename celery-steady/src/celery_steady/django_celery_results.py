"""The result backend of django-celery-results, through restarts of the database."""

from django.db import connection
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

    def on_backend_retryable_error(self, error):
        connection.close()
