"""Pauses: while a queue or a task is paused, no job of it starts. A pause is a row, so it survives everything.

Each claim reads the table. A job that may not start is *held* by the pause, see turns.py: it has no message,
and when the pause has ended, it goes in the order of `due_at`.
"""

from typing import TYPE_CHECKING

from celery import current_app
from django.db import models, transaction

from . import turns
from .celery import is_job
from .limits import PAUSE
from .messages import known_queues

if TYPE_CHECKING:
    from .models import Pause

__all__ = ["PauseManager"]


def known_names():
    """Return the names that can be paused: queues and tasks. A queue without settings needs a job."""
    return known_queues(), sorted(name for name in current_app.tasks if is_job(current_app, name))


# Type checkers do not see the methods that Django copies from a queryset to its manager.
class PauseManager(models.QuerySet if TYPE_CHECKING else models.Manager):
    db = property(lambda self: self._db or "default")  # as for jobs

    def get_queryset(self) -> "models.QuerySet[Pause]":
        return models.QuerySet(self.model, using=self.db, hints=self._hints)

    def pause(self, name: str, reason: str = "") -> "Pause":
        """Start no job of this queue or task until resume(). Running jobs continue. Returns the Pause.

        A job of which a worker is just claiming the row may still start. If the name is paused already, the
        new reason, if any, replaces the old one. Raises ValueError for the name of no queue and no task.
        """
        queues, tasks = known_names()
        if name not in [*queues, *tasks] and not turns.job_manager().filter(queue=name).exists():
            raise ValueError(
                f"there is no queue and no task {name!r}: the queues are {', '.join(queues)}"
            )
        pause, is_new = self.get_or_create({"reason": reason[:255]}, name=name)
        if reason and not is_new:
            pause.reason = reason[:255]
            pause.save(update_fields=["reason"])
        return pause

    def resume(self, name: str) -> bool:
        """Start the jobs of this queue or task again, the oldest first. Returns whether it was paused."""
        deleted, _ = self.filter(name=name).delete()
        transaction.on_commit(lambda: turns.resume(PAUSE + name), using=self.db, robust=True)
        return bool(deleted)
