"""Pauses: while a queue or a task is paused, no job of it starts. A pause is a row, so it survives everything.

Each claim reads the table. A job that may not start is *blocked* by the pause, see admission.py: it has no
message, and when the pause has ended, it starts in the order of `due_at`.
"""

from django.db import transaction

from durable_jobs import admission
from durable_jobs.limits import PAUSE
from durable_jobs.messages import known_names
from durable_jobs.models import Job, Pause

__all__ = ["pause", "resume"]


def pause(name: str, reason: str = "") -> Pause:
    """Start no job of this queue or task until resume(). Running jobs continue. Returns the Pause.

    A job of which a worker is just claiming the row may still start. If the name is paused already, the
    new reason, if any, replaces the old one. Raises ValueError for the name of no queue and no task.
    """
    queues, tasks = known_names()
    if name not in [*queues, *tasks] and not Job.objects.filter(queue=name).exists():
        raise ValueError(
            f"there is no queue and no task {name!r}: the queues are {', '.join(queues)}"
        )
    row, is_new = Pause.objects.get_or_create({"reason": reason[:255]}, name=name)
    if reason and not is_new:
        row.reason = reason[:255]
        row.save(update_fields=["reason"])
    return row


def resume(name: str) -> bool:
    """Start the jobs of this queue or task again, the oldest first. Returns whether it was paused."""
    deleted, _ = Pause.objects.filter(name=name).delete()
    using = Pause.objects.db
    transaction.on_commit(lambda: admission.resume(PAUSE + name), using=using, robust=True)
    return bool(deleted)
