{% from "chosen.jinja" import broker, worker_pool with context %}
"""What Celery's own words do with jobs, delay() and revoke say; what a worker does beside them."""

{% print worker_pool.worker_imports %}
import uuid
from contextlib import suppress
from copy import copy
from datetime import timedelta
from pathlib import Path

{% print worker_pool.worker_celery | default("from celery import signals, states\n") %}
from celery.backends.base import BaseBackend
from celery.beat import SchedulingError
from celery.contrib.django.task import DjangoTask
{% if broker.flower %}
from celery.utils.functional import maybe_list
{% endif %}
from celery.utils.time import maybe_make_aware
{% print worker_pool.worker_celery_imports | default %}
{% if broker.flower %}
from celery.worker.control import Panel
{% endif %}
from django.conf import settings
from django.core.exceptions import ValidationError
{% print worker_pool.worker_django_imports %}


class JobBackend(BaseBackend):
    """The result backend of `task.AsyncResult(id)`: it reads the row."""

    states = {
        "queued": states.PENDING,
        "running": states.STARTED,
        "succeeded": states.SUCCESS,
        "failed": states.FAILURE,
        "cancelled": states.REVOKED,
    }
    errors = {"failed": "TaskError", "cancelled": "TaskRevokedError"}  # of celery.exceptions

    def get_task_meta(self, task_id, cache=True):
        job = None
        with suppress(ValidationError):  # some task's own kind of id
            job = Job.objects.filter(pk=task_id).first()
        if job is None:
            return {"status": states.PENDING, "result": None}  # as Celery says of unknown tasks
        result = job.result
        if kind := self.errors.get(job.state):
            result = {"exc_type": kind, "exc_message": job.error, "exc_module": "celery.exceptions"}
        return {"status": self.states[job.state], "result": result}


class CeleryTask(DjangoTask):
    """A task whose delay() and apply_async(), and what calls these, enqueue a job."""

    abstract = True
    options = ("queue", "headers", "ignore_result", "producer", "retries")  # which matter or not
    job_run = property(lambda self: getattr(self.request, "job_run", None))

    @classmethod
    def on_bound(cls, app):
        """Refuse what a job cannot have. Lower the soft limit to a short hard limit of the task."""
        for name in ("before_start", "exchange", "expires", "routing_key"):
            if getattr(cls, name, None) != getattr(DjangoTask, name, None):
                raise TypeError(f"{cls.name}: a job cannot have {name}, begin in its body")
        if cls.time_limit and cls.soft_time_limit and cls.soft_time_limit > cls.time_limit:
            cls.soft_time_limit = cls.time_limit * 0.9

    def apply_async(self, args=(), kwargs=None, task_id=None, countdown=None, eta=None, **options):
        """Enqueue a job that nobody owns. Returns its AsyncResult.

        Raises TypeError for what a job cannot have or be, say a member of a group.
        """
        if eta:
            countdown = (maybe_make_aware(eta) - timezone.now()).total_seconds()
        if self.job_run and task_id == self.request.id:
            return self.retry_later(args, kwargs, countdown, **options)
        if refused := [name for name in options if options[name] and name not in self.options]:
            reason = f"a job takes no {', '.join(refused)}, and joins no group, chain or chord"
            raise TypeError(f"{reason}: see Job.objects.enqueue() and enqueue_many()")
        fields = {"pk": task_id} if task_id else {}
        fields |= {"countdown": max(countdown or 0, 0), "queue": options.get("queue")}
        job = Job.objects.enqueue(self, args or (), kwargs, **fields)
        return self.AsyncResult(str(job.pk))

    def retry_later(self, args, kwargs, countdown, retries, queue=None, **options):
        """Remember what retry() wants: once the body and its transactions have ended, it is written."""
        text = f"Try {retries} failed, the next one in {countdown:.0f} s"
        changes = {"args": args, "kwargs": kwargs, "retries": retries, "message": text}
        self.job_run.retry = {"delay": countdown, **changes, **({"queue": queue} if queue else {})}

    def AsyncResult(self, task_id, **kwargs):  # noqa: N802
        return self.app.AsyncResult(task_id, backend=JobBackend(self.app), **kwargs)

    def replace(self, sig):
        raise NotImplementedError("a job cannot be replaced: enqueue the other one, and return")


def name_ticks(sender, **kwargs):
    """Give a job that Beat starts, which is `sender`, the id of its tick: two Beats start one job."""
    apply_async = sender.scheduler.apply_async

    def apply_tick(entry, **options):
        if not isinstance(sender.app.tasks.get(entry.task), CeleryTask):
            return apply_async(entry, **options)
        close_old_connections()  # Beat has no requests or tasks that do it
        schedule, entry = entry.schedule, copy(entry)
        # Exact to milliseconds, so a second is added. Intervals begin when their Beat does: one tick
        # counts between two multiples of its length.
        due = schedule.now() + schedule.remaining_estimate(entry.last_run_at) + timedelta(seconds=1)
        length = getattr(schedule, "run_every", timedelta(minutes=1))
        tick = f"{entry.name} {due.timestamp() // length.total_seconds()}"
        task_id = str(uuid.uuid5(uuid.NAMESPACE_OID, tick))
        entry.options = {"task_id": task_id, **entry.options}
        try:
            return apply_async(entry, **options)
        except SchedulingError as error:
            if not isinstance(error.__context__, IntegrityError):
                raise

    sender.scheduler.apply_async = apply_tick


def show_life(**kwargs):
    """Touch LIVENESS_FILE: who finds it old takes this process for dead."""
    if file := os.environ.get("LIVENESS_FILE"):
        Path(file).touch()


{% print worker_pool.worker %}
{% if broker.flower %}


@signals.worker_init.connect
def follow_revokes(**kwargs):
    """Cancel the job of every task that this worker is told to revoke or to terminate.

    Celery's signal task_revoked comes when the message reaches a free slot, on some pools never.
    """
    revoke = Panel.data["revoke"]

    def cancel(ids):
        for pk in ids:
            with suppress(Exception):  # some task's own kind of id, or the database is away
                Job.objects.filter(pk=pk).cancel()
        connection.close()  # a child must not inherit it

    def cancel_and_revoke(state, task_id, terminate=False, signal=None, **kwargs):
        # Not in the worker's loop, which ends bodies in time: one of them may hold the job's row.
        threading.Thread(target=cancel, args=[maybe_list(task_id) or []]).start()
        # Whatever signal Flower asks for: one that children ignore would leave the task running.
        return revoke(state, task_id, terminate=terminate, signal="SIGKILL", **kwargs)

    def cancel_and_terminate(state, signal, task_id, **kwargs):
        return cancel_and_revoke(state, task_id, terminate=True, **kwargs)

    Panel.data |= {"revoke": cancel_and_revoke, "terminate": cancel_and_terminate}
{% endif %}
