"""The results of jobs: AsyncResult(id) and GroupResult read the rows of jobs."""

import time
from functools import cache

from celery import current_app, states
from celery.app import backends
from celery.backends.base import BaseBackend
from celery.exceptions import TimeoutError
from celery.result import AsyncResult, GroupResult, assert_will_not_block

from . import batches, turns
from .models import Batch, Job
from .publish import publish
from .values import uuids

STATES = {
    "queued": states.PENDING,
    "running": states.STARTED,
    "succeeded": states.SUCCESS,
    "failed": states.FAILURE,
    "cancelled": states.REVOKED,
}
ERRORS = {"failed": "TaskError", "cancelled": "TaskRevokedError"}  # in celery.exceptions
UNKNOWN = {"status": states.PENDING, "result": None}  # what Celery answers for an unknown id


def backend(app, url=None):
    """Return the result backend of the settings, extended to read the rows of jobs.

    `url` is ignored: Celery gives none.
    """
    kind, url = backends.by_url(app.conf.result_backend, app.loader)
    return type(kind.__name__, (JobRowsMixin, kind), {})(app=app, url=url)


def enqueue(signature, args=None, kwargs=None, **options):
    """Store the jobs of a chain, group or chord. Returns the result that Celery would return."""
    return result_of(batches.enqueue(signature, args, kwargs, **options))


def result_of(steps, parent=None):
    """Return the result of the last of these steps. Its parent is the result of the step before it."""
    for step in steps:
        if "group" not in step:
            parent = current_app.tasks[step["task"]].AsyncResult(step["id"], parent=parent)
            continue
        members = [result_of(member, parent) for member in step["group"]]
        parent = JobGroupResult(step["id"], members, parent=parent, app=current_app)
    return parent


def read_jobs(ids):
    """Return {id: status and result}, as Celery's backends do, for those ids that are ids of jobs."""
    keys = uuids(ids)
    if current_app.conf.task_always_eager:
        run_until_stored(list(keys))
    jobs = Job.objects.only("state", "result", "error").in_bulk(list(keys))
    return {keys[pk]: meta(job.state, job.error, job.result) for pk, job in jobs.items()}


def meta(state, error, result=None):
    if name := ERRORS.get(state):
        result = {"exc_type": name, "exc_message": error, "exc_module": "celery.exceptions"}
    return {"status": STATES[state], "result": result}


def run_until_stored(keys):
    """Run these jobs in eager mode. A test's transaction never commits, so get() would wait forever.

    If one is not stored, it may come after other jobs. Then run all that are queued.
    """
    turns.ignore_limits(Job.objects.filter(pk__in=keys))
    jobs = Job.objects.in_bulk(keys)
    for job in jobs.values():
        if job.state == "queued":
            publish([job])
    if missing := [key for key in keys if key not in jobs]:
        ended = Job.objects.filter(pk__in=missing, finished_at__isnull=False)
        run_queued(until=lambda: ended.count() == len(missing))


def run_queued(until=lambda: False):
    """Run all queued jobs and those that they enqueue, one by one. Wait for no countdown and no rate."""
    queued = Job.objects.filter(state="queued").order_by("created_at")
    # (id, retries): a job that the broker refuses stays queued, so publish it only once.
    ran = set()
    while not until():
        batches.end_all()  # as the sweep does
        turns.ignore_limits(queued)
        tries = set(queued.values_list("pk", "retries")) - ran
        if not tries:
            return
        ran |= tries
        for job in queued.filter(pk__in=[pk for pk, _ in tries]):
            publish([job])


def read(results):
    """Return status and result of each of these JobResults. The number of queries does not grow with theirs.

    A step that can no longer start counts as revoked.
    """
    metas = read_jobs([result.id for result in results if result._cache is None])
    missing = [each for each in results if each._cache is None and each.id not in metas]
    metas |= never_started(missing)
    return [each._cache or each._maybe_set_cache(metas.get(each.id, UNKNOWN)) for each in results]


def never_started(results):
    """Return {id: status and result} of those steps before which a job or a batch failed or was cancelled."""
    before = {each.id: [node.id for node in each._parents()] for each in results}
    ids = {id for ids in before.values() for id in ids}
    rows = {}
    for manager in (Job.objects, Batch.objects) if ids else ():
        ended = manager.filter(state__in=ERRORS).only("state", "error").in_bulk(list(ids))
        rows |= {str(pk): row for pk, row in ended.items()}
    metas = {}
    for id, ids in before.items():
        if row := next((rows[each] for each in ids if each in rows), None):
            text = f"It never starts: the {row._meta.model_name} {row.pk} before it is {row.state}."
            metas[id] = meta("cancelled", f"{text} {row.error}".strip())
    return metas


def wait(is_ready, timeout=None, interval=0.5, on_interval=None, **options):
    end = None if timeout is None else time.monotonic() + timeout
    while not is_ready():
        if on_interval:
            on_interval()
        left = interval if end is None else end - time.monotonic()
        if left <= 0:
            raise TimeoutError("The operation timed out.")
        time.sleep(min(interval, left))


class JobResult(AsyncResult):
    """The AsyncResult of a job, or of a step that is not stored yet."""

    def _get_task_meta(self):
        return self._cache or read([self])[0]

    def revoke(self, *args, **options):
        """Cancel the job. If it is a step that is not stored yet, cancel what comes before it."""
        super().revoke(*args, **options)
        if self.parent and not Job.objects.filter(pk=self.id).exists():
            self.parent.revoke(*args, **options)

    def _maybe_reraise_parent_error(self):
        parents = list(self._parents())
        read([node for node in parents if isinstance(node, JobResult)])
        for node in reversed(parents):
            if isinstance(node, GroupResult) or node._cache:
                node.maybe_throw()


class JobGroupResult(GroupResult):
    """The GroupResult of jobs. It reads all of them at once."""

    def _jobs(self):
        for result in self.results:  # a chain that ends with a group has a GroupResult
            yield from result._jobs() if isinstance(result, GroupResult) else [result]

    def _statuses(self):
        return [each["status"] for each in read(list(self._jobs()))]

    @property
    def backend(self):
        return job_backend(self.app)

    def ready(self):
        return states.READY_STATES.issuperset(self._statuses())

    def successful(self):
        return {states.SUCCESS}.issuperset(self._statuses())

    def failed(self):
        return states.FAILURE in self._statuses()

    def completed_count(self):
        return self._statuses().count(states.SUCCESS)

    def maybe_throw(self, callback=None, propagate=True):
        """Raise the error of the first job that has failed or was cancelled. Returns whether all have ended."""
        jobs = list(self._jobs())
        is_ready = states.READY_STATES.issuperset(each["status"] for each in read(jobs))
        for each in jobs:
            if each._cache and propagate and each.state == states.REVOKED:
                each._maybe_reraise_parent_error()  # it may be the reason
            if each._cache:
                each.maybe_throw(callback=callback, propagate=propagate)
        return is_ready

    maybe_reraise = maybe_throw

    def join(self, propagate=True, callback=None, disable_sync_subtasks=True, **options):
        """Wait until all jobs have ended, and return their results. See Celery's ResultSet.join()."""
        if disable_sync_subtasks:
            assert_will_not_block()
        wait(lambda: self.maybe_throw(propagate=propagate), **options)
        if callback:
            self.maybe_throw(callback, propagate)
            return []
        return self._values()

    join_native = join

    def _values(self):
        return [
            each._values() if isinstance(each, GroupResult) else each.result
            for each in self.results
        ]

    def revoke(self, *args, **options):
        """Cancel the batch. If it is not stored yet, cancel what comes before it."""
        ids = [self.id, *(each.id for each in self._jobs())]
        self.app.control.revoke(ids, *args, **options)
        if self.parent and not Batch.objects.filter(pk=self.id).exists():
            self.parent.revoke(*args, **options)


def is_of_jobs(result):
    """Return whether this result, or one before it, is that of a stored job."""
    while result is not None:
        members = getattr(result, "results", None)
        if members is None and read_jobs([result.id]):
            return True
        result = members[0] if members else result.parent
    return False


@cache
def job_backend(app):
    return JobBackend(app)


class JobRowsMixin:
    """Reads jobs from their rows. All other ids are left to the result backend."""

    def get_task_meta(self, task_id, cache=True):
        return read_jobs([task_id]).get(task_id) or super().get_task_meta(task_id, cache=cache)

    def wait_for_pending(self, result, **options):
        backend = job_backend(self.app) if is_of_jobs(result) else super()
        return backend.wait_for_pending(result, **options)

    def iter_native(self, result, timeout=None, interval=0.5, **options):
        """Read the jobs of a GroupResult that was restored, for example by result_from_tuple()."""
        if not is_of_jobs(result):
            yield from super().iter_native(result, timeout=timeout, interval=interval, **options)
            return
        for each in result.results:
            try:
                value = each.get(timeout, interval=interval, disable_sync_subtasks=False)
                yield each.id, {"status": states.SUCCESS, "result": value}
            except TimeoutError:
                raise
            except Exception as error:  # of this job or of one before it
                yield each.id, {"status": states.FAILURE, "result": error}


class JobBackend(BaseBackend):
    """Reads jobs only. It polls the rows, because no message reports a job's result."""

    def _ensure_not_eager(self):
        """Do not warn: in eager mode, too, a job's result is in its row."""

    def get_task_meta(self, task_id, cache=True):
        return read_jobs([task_id]).get(task_id) or UNKNOWN

    def task_result_exists(self, task_id):
        return bool(read_jobs([task_id]))

    def wait_for_pending(self, result, callback=None, propagate=True, **options):
        wait(result.ready, **options)
        return result.maybe_throw(callback=callback, propagate=propagate)
