"""Pauses: while a queue or a task is paused, no job of it starts. A pause is a row, so it survives everything.

Each claim reads the table, and the sweeper leaves paused jobs alone. A worker that has the message of one puts
the job back: see put_back() in admission.py.
"""

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
        raise ValueError(f"no queue or task is named {name!r}: the queues are {', '.join(queues)}")
    changes = {"reason": reason[:255]} if reason else {}
    return Pause.objects.update_or_create(changes, name=name)[0]


def resume(name: str) -> bool:
    """Let jobs of this queue or task start again: Beat sends them, the oldest first. Returns whether it was paused."""
    deleted, _ = Pause.objects.filter(name=name).delete()
    return bool(deleted)
