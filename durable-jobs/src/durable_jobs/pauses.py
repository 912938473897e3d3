"""Pauses: while a queue or a task is paused, no job of it starts. A pause is a row, so it survives everything.

Nobody admits, sends or claims a paused job. If a worker has its message, put_back() takes the job back: it counts
as not sent, and is blocked if it has a limit.
"""

from django.db.models import Case, F, Q, When
from django.db.models.functions import Greatest

from durable_jobs.messages import job_names, known_queues
from durable_jobs.models import Job, Pause
from durable_jobs.states import QUEUED

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


def is_paused(names=None):
    """Return the condition for a job to be paused. `names` is what is paused, if it was read before.

    Each claim has it, and PostgreSQL plans this form faster than EXISTS.
    """
    if names is None:
        names = Pause.objects.values("name")
    return Q(queue__in=names) | Q(task__in=names)


def paused_names():
    return list(Pause.objects.values_list("name", flat=True))


def put_back(jobs):
    """Put back those of these queued jobs that are paused: they lose slot and message. Returns how many.

    Those without a limit stay due, so the sweeper sends them when the pause has ended.
    """
    # Jobs of one insert_many() have the same due_at, but their created_at differ: the later time keeps the order.
    sweep_at = Case(When(limit_key=None, then=Greatest("due_at", "created_at")))
    changes = {"blocked_by": F("limit_key"), "sweep_at": sweep_at, "times_sent": 0}
    return jobs.filter(QUEUED, is_paused()).update(**changes)
