"""Many tasks: alone, and with a callback when all have ended."""

from celery import chord
from sending import KINDS, empty, seconds_of


def store(kind, shape, count, path):
    """Store `count` tasks. Returns the seconds. The callback, if any, writes another file."""
    import work_tasks

    empty(kind)
    arguments, task = [path, 0, 0], getattr(work_tasks, kind)
    then = task.si(f"{path}.then", 0, 0)
    return seconds_of(SHAPES[shape, kind], task, [arguments] * count, then)


def send_each(task, calls, then):
    for arguments in calls:
        task.delay(*arguments)


def enqueue_many(task, calls, then):
    KINDS["job"]().send_many(calls)


def enqueue_batch(task, calls, then):
    from durable_jobs import batches  # bare Celery has none

    batches.enqueue([task.s(*args) for args in calls], on_success=then)


def send_chord(task, calls, then):
    chord(task.si(*arguments) for arguments in calls)(then)


SHAPES = {
    ("alone", "plain"): send_each,
    ("alone", "job"): enqueue_many,
    ("with a callback", "plain"): send_chord,
    ("with a callback", "job"): enqueue_batch,
}
