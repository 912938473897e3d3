"""The signature of a job: its task, arguments and options, to enqueue later or as the callback of a batch.

    send_confirmation.using(owner=user, queue="io").enqueue(order.pk)
    batches.enqueue(resize, [[1], [2]], on_success=send_summary.s("ada@example.com"))

Celery's own signatures are for its canvas. A job is no part of that, see NO_CANVAS.
"""

from asgiref.sync import sync_to_async
from celery.utils.abstract import CallableSignature

from durable_jobs.enqueue import Options
from durable_jobs.enqueue import enqueue as enqueue_job
from durable_jobs.models import Job

__all__ = ["JobSignature"]

NO_CANVAS = (
    "A job can't be part of a chain, group or chord, nor a link of a task: use a batch with on_success= or"
    " on_finish=, or self.enqueue_next()"
)
OF_CANVAS = {"link", "link_error", "chain", "chord", "group_id", "root_id"}
# Options of apply_async() that are supported or harmless.
HARMLESS = ("queue", "headers", "ignore_result", "producer", "retries")


def check_options(options, supported=()):
    """Raise TypeError for options of apply_async() that a job cannot have."""
    known = [*HARMLESS, *supported]
    if refused := [name for name in options if options[name] and name not in known]:
        hint = NO_CANVAS if OF_CANVAS & {*refused} else "See the options of enqueue()"
        raise TypeError(f"a job does not take {', '.join(refused)}. {hint}")


class JobSignature:
    """A task with arguments and options. Made by JobTask.using(), s() and si()."""

    def __init__(self, task, args=(), kwargs=None, options=None, immutable=False):
        self.task, self.args, self.kwargs = task, tuple(args), kwargs or {}
        self.options, self.immutable = options or {}, immutable

    def s(self, *args, **kwargs) -> "JobSignature":
        """Return this signature with more arguments. As a callback, it gets the results of the batch first."""
        return JobSignature(self.task, [*self.args, *args], {**self.kwargs, **kwargs}, self.options)

    def si(self, *args, **kwargs) -> "JobSignature":
        """Return this signature with more arguments. As a callback, it does not get the results of the batch."""
        call = self.s(*args, **kwargs)
        call.immutable = True
        return call

    def set(self, **options) -> "JobSignature":
        """Add options of enqueue() to this signature. Raises TypeError for others."""
        check_options(options, Options.__optional_keys__)
        self.options = {**self.options, **options}
        return self

    def enqueue(self, *args, **kwargs) -> Job:
        """Enqueue a job with these arguments, after those of the signature. Returns the Job."""
        args, kwargs = [*self.args, *args], {**self.kwargs, **kwargs}
        return enqueue_job(self.task, args, kwargs, **self.options)

    aenqueue = sync_to_async(enqueue)

    def delay(self, *args, **kwargs):
        """Enqueue a job with these arguments. Returns its AsyncResult."""
        return self.apply_async(args, kwargs)

    def apply_async(self, args=(), kwargs=None, **options):
        """Enqueue a job as JobTask.apply_async() does. Returns its AsyncResult."""
        args, kwargs = [*self.args, *(args or ())], {**self.kwargs, **(kwargs or {})}
        return self.task.apply_async(args, kwargs, **{**self.options, **options})

    # What Celery calls to combine signatures, or to store one in a message

    def clone(self, *args, **kwargs):
        raise TypeError(f"{self.task.name}: {NO_CANVAS}")

    apply = freeze = link = link_error = __or__ = __ror__ = __json__ = clone
    app = name = type = property(clone)  # what the canvas reads before it calls anything


CallableSignature.register(JobSignature)  # so that Celery's canvas calls clone()
