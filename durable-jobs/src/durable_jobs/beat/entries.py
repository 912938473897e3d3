"""What Beat can start: an entry of CELERY_BEAT_SCHEDULE, or a row of django-celery-beat."""

import json

from celery.beat import BeatLazyFunc

from durable_jobs.messages import find_task, is_job


def check_entry(name, args, kwargs, options):
    """Raise TypeError or ValueError if Beat cannot start the task `name` with this call."""
    task = find_task(name)
    if task is None:
        raise ValueError(f"there is no task {name!r}: write the full path, such as app.tasks.name")
    if not isinstance(args, (list, tuple)) or not isinstance(kwargs, dict):
        raise TypeError("args must be a list, such as [10], and kwargs a dictionary")
    args = [None if isinstance(arg, BeatLazyFunc) else arg for arg in args]
    kwargs = {key: None if isinstance(arg, BeatLazyFunc) else arg for key, arg in kwargs.items()}
    if is_job(task):
        task._fields_of(args, kwargs, options)
    elif task.typing:
        task.__header__(*args, **kwargs)


def check_row(row):
    """Raise TypeError or ValueError if Beat cannot start the job of this row of django-celery-beat."""
    if is_job(find_task(row.task)):
        names = ["queue", "exchange", "routing_key", "priority", "expires", "expire_seconds"]
        options = {name: getattr(row, name) for name in names}
        check_entry(row.task, json.loads(row.args), json.loads(row.kwargs), options)
