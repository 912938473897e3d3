"""Pauses: while a queue or a task is paused, no job of it starts. A pause is a row, so it survives everything.

Each claim reads the table. A job that may not start is *held* by the pause, see limits.py: it has no message,
and when the pause has ended, it goes in the order of `due_at`.
"""

from typing import TYPE_CHECKING

from celery import current_app
from django.apps import apps
from django.db import models, transaction
from django.db.models import F, Q, Subquery, Value
from django.db.models.functions import Concat, Now

from . import updates
from .expressions import QUEUED, is_paused, pauses_of_job
from .messages import known_queues

if TYPE_CHECKING:
    from .models import Pause

__all__ = ["PauseManager"]

PREFIX = "pause:"  # of Job.held_by
BATCH_SIZE = 500  # jobs per statement


# models.py imports this module.


def job_manager():
    return apps.get_model("jobs.Job").objects


def pause_manager():
    return apps.get_model("jobs.Pause").objects


def names():
    """Return the names that are paused."""
    return list(pause_manager().values_list("name", flat=True))


def hold(jobs):
    """Hold those of these queued jobs that are paused. Returns how many there were."""
    held_by = Concat(Value(PREFIX), Subquery(pauses_of_job().values("name")[:1]))
    changes = {"held_by": held_by, "sweep_at": None, "times_sent": 0}
    return jobs.filter(QUEUED, is_paused()).update(**changes)


def hold_due(paused):
    """Hold the jobs that the sweep would send although they are paused. `paused` is what names() returns."""
    if paused:
        is_meant = Q(queue__in=paused) | Q(task__in=paused)
        due = job_manager().filter(is_meant, state="queued", sweep_at__lt=Now())
        hold_pages(due.order_by("sweep_at"))


def hold_all(key):
    """Hold those jobs by their pauses that the limit with this key holds: they must not delay the others."""
    hold_pages(job_manager().filter(held_by=key).order_by("due_at", "created_at"))


def hold_pages(jobs):
    """Hold the first ones of these jobs, as far as they are paused."""
    held = BATCH_SIZE
    while held == BATCH_SIZE:
        with transaction.atomic():
            page = updates.locking(jobs).values_list("pk", flat=True)[:BATCH_SIZE]
            held = hold(job_manager().filter(pk__in=list(page)))


def hold_by_others(key):
    """After a pause, let other pauses or their limits hold its jobs. Returns the keys of these limits."""
    jobs = job_manager().filter(held_by=key)
    hold(jobs)
    limited = jobs.filter(limit_key__isnull=False)
    keys = set(limited.values_list("limit_key", flat=True).distinct())
    limited.update(held_by=F("limit_key"))
    return keys


def known_names():
    """Return the names that can be paused: queues and tasks. A queue without settings needs a job."""
    tasks = [name for name, task in current_app.tasks.items() if getattr(task, "_is_job", False)]
    return known_queues(), sorted(tasks)


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
        if name not in [*queues, *tasks] and not job_manager().filter(queue=name).exists():
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
        from .limits import grant  # which needs this module

        deleted, _ = self.filter(name=name).delete()
        key = PREFIX + name
        transaction.on_commit(lambda: grant([key, *hold_by_others(key)]), robust=True)
        return bool(deleted)
