"""Celery's app, which knows jobs: they have rows, and are no part of another task."""

import celery
from celery.contrib.django.task import DjangoTask

ALONE = "A job joins no group, chain or chord, and is no callback: enqueue it in a task's body"
COMBINED = ("link", "link_error", "chain", "chord")  # options that hold other tasks


class Task(DjangoTask):
    """A plain task."""

    def apply_async(self, *args, **options):
        refuse_jobs(self.app, options)  # here too, because eager mode sends nothing
        return super().apply_async(*args, **options)


class Celery(celery.Celery):
    task_cls = Task
    backend_cls = "jobs.results:backend"  # by its name: it needs models, which need an app

    def send_task(self, name, args=None, kwargs=None, countdown=None, eta=None, **options):
        """Send a message, as Celery documents it, or enqueue the job of this name.

        Raises TypeError if a job is to be a callback, or a part of a chain or chord.
        """
        refuse_jobs(self, options)
        options |= {"countdown": countdown, "eta": eta}
        if is_job(self, name):
            return self.tasks[name].apply_async(args, kwargs, **options)
        return super().send_task(name, args, kwargs, **options)


def is_job(app, name):
    return getattr(app.tasks.get(name), "is_job", False)


def refuse_jobs(app, options):
    for option in COMBINED:
        if jobs := [name for name in names(options.get(option)) if is_job(app, name)]:
            raise TypeError(f"{option}={jobs[0]}: {ALONE}")


def names(value):
    """Yield the names of the tasks in a signature, or in a list of some."""
    if isinstance(value, dict):
        yield value.get("task")
        value = [*value.get("kwargs", {}).values(), *value.get("options", {}).values()]
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from names(each)
