"""Pauses: while a queue or a task is paused, no job of it starts. A pause is a row, so it survives everything.

Nobody admits, sends or claims a paused job. If a worker has its message, transitions.put_back() takes the
job back: it counts as not sent, and is blocked if it has a limit.
"""

from difflib import get_close_matches

from django.db.models import Q

from durable_jobs.messages import job_names, known_queues
from durable_jobs.models import Job, Pause

__all__ = ["pause", "resume"]


def pause(name: str, reason: str = "") -> Pause:
    """Start no job of this queue or task until resume(). Running jobs continue. Returns the Pause.

    A job that a worker is claiming at this moment may still start. If the name is paused already, the
    new reason, if any, replaces the old one. Raises ValueError for the name of no queue and no task.
    """
    queues, tasks = known_queues(), job_names()
    if name not in [*queues, *tasks] and not Job.objects.filter(queue=name).exists():
        near = " or ".join(get_close_matches(name, tasks, cutoff=0.8))
        hint = f"did you mean {near}?" if near else f"the queues are {', '.join(queues)}"
        raise ValueError(f"no queue or task is named {name!r}: {hint}")
    changes = {"reason": reason[:255]} if reason else {}
    return Pause.objects.update_or_create(changes, name=name)[0]


def resume(name: str) -> bool:
    """Let jobs of this queue or task start again: Beat sends them, the oldest first. Returns whether it was paused."""
    deleted, _ = Pause.objects.filter(name=name).delete()
    return bool(deleted)


def is_paused(names=None):
    """Return the condition for a job to be paused. `names` is what is paused, if it was read before.

    Each claim has it, and PostgreSQL plans this form faster than EXISTS.
    """
    if names is None:
        names = Pause.objects.values("name")
    return Q(queue__in=names) | Q(task__in=names)


def paused_names():
    return list(Pause.objects.values_list("name", flat=True))
