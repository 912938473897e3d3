"""Jobs are tasks: @job declares one, and JobTask is the base class of all.

JobTask says what delay(), retry() and report() do with a job's row. How a worker runs a task function is in
worker/execution.py and worker/runs.py, which no other process needs.
"""

import sys
from collections.abc import Callable
from functools import partial, wraps
from inspect import getattr_static, iscoroutinefunction, signature, unwrap
from typing import Any, Concatenate, Literal, NoReturn, ParamSpec, Unpack, overload

from celery import shared_task
from celery.contrib.django.task import DjangoTask
from celery.exceptions import Retry
from celery.result import AsyncResult
from celery.utils.functional import head_from_fun
from celery.utils.time import maybe_make_aware

from durable_jobs import batches
from durable_jobs.coroutines import run_coroutine
from durable_jobs.enqueue import (
    BULK_OPTIONS,
    EXPIRES,
    MEMBER_OPTIONS,
    NO_CANVAS,
    SINGLE_OPTIONS,
    Enqueueable,
    JobSignature,
    Options,
    P,
    check_call,
    check_options,
    check_times,
    insert,
    new_fields,
)
from durable_jobs.exceptions import JobError
from durable_jobs.models import Batch
from durable_jobs.process import process
from durable_jobs.validation import MAX_COUNTDOWN, uuids

__all__ = ["JobSignature", "JobTask", "job"]

StepP = ParamSpec("StepP")


@overload
def job(function: Callable[Concatenate[Any, P], Any], /) -> "JobTask[P]": ...
@overload
def job(*, bind: Literal[False], **options: Any) -> Callable[[Callable[P, Any]], "JobTask[P]"]: ...
@overload
def job(**options: Any) -> Callable[[Callable[Concatenate[Any, P], Any]], "JobTask[P]"]: ...
def job(
    function: Any = None, *, base: type | None = None, bind: bool = True, **options: Any
) -> Any:
    """Declare a task function whose calls are jobs. It gets the task as its first argument, `self`.

        @job(autoretry_for=(OSError,), retry_backoff=True, max_retries=8)
        def send_confirmation(self, order_id): ...

    This is @shared_task(base=JobTask, bind=True), with the same options: those of Celery, `limit`, and
    `owner_may_run_again`. `base` may be your own class of tasks: JobTask is added as its last base. Raises
    TypeError if the function lacks `self`, or if the class has a method that jobs would never call.
    """
    if base is None or issubclass(JobTask, base):
        base = JobTask
    elif not issubclass(base, JobTask):
        base = type(base.__name__, (base, JobTask), {"abstract": True})
    base._check_methods()

    def declare(function):
        first = next(iter(signature(function).parameters.values()), None)
        if bind and getattr(first, "name", "") != "self" and "*" not in str(first):
            raise TypeError(
                f"the first parameter of {function.__qualname__}() must be self, the task"
            )
        return shared_task(base=base, bind=bind, **options)(function)

    return declare(function) if function else declare


def in_run(call):
    """Wrap __call__() of a task's class: for the message of a job, its Run calls it, and writes how it ended."""

    @wraps(call)
    def __call__(self, *args, **kwargs):
        if error := getattr(self.request, "start_error", None):  # of worker.execution.trace()
            raise error
        run = self._current_run
        if run and not run.is_started:
            return run.call(partial(call, self), args, kwargs)
        return call(self, *args, **kwargs)  # a direct call, or apply()

    __call__._is_in_run = True
    return __call__


class JobTask(Enqueueable[P], DjangoTask):
    """The base class of tasks that are jobs: see job().

    delay(), apply_async() and everything that calls them enqueue a job. If an app that is not a
    durable_jobs.celery.Celery sends it by name, a worker stores the job. A task that is called directly, or with
    apply(), runs as a plain function. After a crash the task function runs again, so it must be safe to repeat.
    """

    abstract = True
    _is_job = True  # checked by enqueue()
    _runs_coroutines = True  # checked by celery-steady
    # Celery 5.6 looks up the setting only when a task starts.
    from_config = (*DjangoTask.from_config, ("time_limit", "task_time_limit"))
    acks_late = False  # the row survives a crash, so acknowledge the message immediately
    retry_on_worker_lost = False  # the row counts crashes
    ignore_result = True  # the row has the result
    owner_may_run_again = False  # a job that failed or was cancelled, through the API
    # The key of its limit, or a function: see limits.py
    limit: str | Callable[..., str | None] | None = None
    _limit_header = None  # a function with the task function's parameters: see on_bound()

    @property
    def _current_run(self):
        return getattr(self.request, "run_of_job", None)

    @classmethod
    def on_bound(cls, app):
        """Prepare the class of a task. Raises TypeError for options that a job cannot have. Celery calls it twice."""
        cls._check_methods()
        if not hasattr(cls.__call__, "_is_in_run"):
            cls.__call__ = in_run(cls.__call__)
        for name in ("before_start", "exchange", "expires", "routing_key"):
            if getattr(cls, name, None) != getattr(DjangoTask, name, None):
                hint = f": {EXPIRES}" if name == "expires" else ""
                raise TypeError(f"{cls.name}: a job cannot have {name}{hint}")
        if cls.time_limit is not None and not cls.time_limit > 0:
            raise TypeError(f"{cls.name}: time_limit must be greater than 0, not {cls.time_limit}")
        cls.throws = (*cls.throws, JobError)  # Celery's log and Sentry expect it
        if callable(cls.limit):
            cls.limit = staticmethod(cls.limit)  # otherwise Python would pass self to it
            # The second time, cls.run may be the function below.
            if "_limit_header" not in vars(cls):
                has_self = not isinstance(getattr_static(cls, "run"), staticmethod)
                inner = unwrap(cls.run)  # what a decorator has wrapped
                cls._limit_header = staticmethod(head_from_fun(inner, bound=has_self))
        if iscoroutinefunction(cls.run):
            function = getattr_static(cls, "run")  # not yet bound to an instance

            @wraps(cls.run)  # retry() reads its signature
            def run(self, *args, **kwargs):
                return run_coroutine(self, function.__get__(self, cls)(*args, **kwargs))

            cls.run = run  # autoretry_for wraps it next, and would not see an error of a coroutine

    @classmethod
    def _check_methods(cls):
        """Raise TypeError if a base class of the project has a method that would never be called."""
        name, mro = cls.__name__, cls.__mro__
        if mro[mro.index(JobTask) :] != JobTask.__mro__:
            raise TypeError(f"JobTask must be the last base, as in class {name}(Other, JobTask)")
        for method in ("apply_async", "delay"):
            if getattr(cls, method) is not getattr(JobTask, method):
                hint = "to add headers, use a receiver of before_task_publish"
                raise TypeError(f"{name}: enqueue() would not call your own {method}(): {hint}")

    # For callers: Celery's methods

    def apply_async(
        self,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
        task_id: str | None = None,
        **options: Any,
    ) -> AsyncResult:
        """Enqueue a job. Returns its AsyncResult.

        It takes the options of using(), too. Raises TypeError for options that a job cannot have, such as `link`
        or `expires`; ValueError if `task_id` is no UUID.
        """
        if self._current_run and task_id == self.request.id:  # Celery's retry() calls this
            return self._retry_later(args, kwargs, **options)
        if task_id and not uuids([task_id]):
            raise ValueError(f"the task_id of a job must be a UUID, not {task_id!r:.50}")
        fields = self._fields_of(args, kwargs, options) | ({"pk": task_id} if task_id else {})
        single = {name: options.get(name) for name in SINGLE_OPTIONS}
        return self.AsyncResult(str(insert(fields, **single).pk))

    def _fields_of(self, args, kwargs, options):
        """Return the fields of the job that apply_async() stores. Raises its errors."""
        check_options(options, Options.__optional_keys__)
        bulk = {name: options[name] for name in BULK_OPTIONS & options.keys()}
        return new_fields(self, args or (), kwargs, **bulk)

    def using(self, **options: Unpack[Options]) -> JobSignature[P]:
        """Return the task with options: task.using(owner=user).enqueue(10) stores a job, and sends its message after the commit.

        - `owner`: a user.
        - `label`: a human-readable name, which is cut after 255 characters.
        - `queue`: the name of a queue. It overrides CELERY_TASK_ROUTES.
        - `headers`: a dictionary whose values are attributes of self.request in each run.
        - `countdown`, `eta`: the job starts after these seconds, or at this time. As in Celery, a datetime
          without a time zone is in UTC.
        - `unique`: a text that only one active job of this task may have, across all owners.
        - `unique_until`: with "start", a running job does not count, so that what has changed since it started is not
          missed. The job that is queued starts after the caller's transaction.
        - `idempotency_key`: a text that each owner can use once.

        enqueue() returns the new Job, or the queued or running one with the same `unique`, whose `is_new` is False.
        It raises TypeError if the task is not a job, if the arguments are not JSON or do not fit the task, or if both
        `countdown` and `eta` are given; ValueError if `unique` or `idempotency_key` is empty, if one of them or
        `queue` is too long, if `unique_until` is neither "start" nor "end" or has no `unique`, if the job would wait
        for more than ten years, if the arguments exceed 60,000 bytes or give no key of its limit, or if a text in an
        option has a NUL or half of a surrogate pair; IntegrityError if the owner has already used the key.
        """
        return JobSignature(self).set(**options)

    def _with(self, args, kwargs, immutable=False):
        return JobSignature(self, args, kwargs, immutable=immutable)

    # These store the row in the caller's transaction too. Celery's own would store it after the commit.

    def delay_on_commit(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult:
        return self.apply_async(args, kwargs)

    apply_async_on_commit = apply_async

    def map(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise TypeError: Celery would call the function without a job."""
        raise TypeError(f"{self.name}: {NO_CANVAS}")

    starmap = chunks = map

    def retry(
        self,
        args: Any = None,
        kwargs: dict[str, Any] | None = None,
        exc: Exception | None = None,
        throw: bool = True,
        **options: Any,
    ) -> Retry:
        """Works as Celery documents. The exception is stored in the Failure of this run.

        Until the next try, the owner reads the text of exc=JobError("The address service is down"). Raises
        TypeError for options that a job cannot have.
        """
        check_options(options, ["eta", "countdown", "max_retries"])
        check_times(options.get("countdown"), options.get("eta"))
        caught = sys.exception()
        if self._current_run and (exc or caught):
            self._current_run.fails_with(exc or caught, caught)
        request = self.request
        was_eager, request.is_eager = request.is_eager, request.is_eager and not self._current_run
        try:  # Celery would leave the retry of an eager job to apply()
            return super().retry(args, kwargs, exc, throw, **options)
        finally:
            request.is_eager = was_eager

    def _retry_later(self, args, kwargs, retries, countdown=None, eta=None, queue=None, **options):
        """Remember the options of retry(). They are stored when the function and its transaction have ended."""
        delay = maybe_make_aware(eta) if eta else min(countdown or 0, MAX_COUNTDOWN)
        changes = {"retries": retries, **({"queue": queue} if queue else {})}
        self._current_run.retry = {"delay": delay, "args": args, "kwargs": kwargs, **changes}

    def update_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "a job has no update_state() and no replace(): call self.report(), or enqueue_next()"
        )

    replace = update_state

    # For task functions

    @property
    def cursor(self) -> Any:
        """The last cursor that report() stored, in this run or an earlier one. None if there is none.

        Read it once, at the start of the function. It is None if the task was called directly. Raises
        RuntimeError in a thread that the function has started.
        """
        run = self._run_in_this_thread()
        return run.read_cursor() if run else None

    def report(
        self, done: float, total: float = 100, message: str | None = "", *, cursor: Any = None
    ) -> None:
        """Show the progress, `done` of `total`, and a line of text. If the job is cancelled, end its function.

        With `cursor`, any JSON value except null, the next run can continue here: after a crash, a deploy
        or a retry, it reads the value from self.cursor. The cursor is stored when this method returns.
        Inside your own atomic() it is stored together with your changes, or not at all. Keep that block
        short, because nobody can cancel the job until the block ends. Raises TypeError or ValueError if the
        cursor is not JSON, RuntimeError in a thread that the function has started.

        If the worker is shutting down, a call with `cursor` ends the function once the cursor is committed.
        The job continues in another worker.
        """
        if run := self._run_in_this_thread():
            run.write_report(done, total, message, cursor)

    def step(
        self,
        name: str,
        function: Callable[StepP, Any],
        /,
        *args: StepP.args,
        **kwargs: StepP.kwargs,
    ) -> Any:
        """Call function(*args, **kwargs) once for this job. Returns its result, or in later runs the stored one.

            payment = self.step("charge", charge, order.pk)

        The call is one transaction with the storing of its result: what the function writes to the database
        `default` is written exactly once. Anything else is repeated if the worker dies before the result is
        stored. A retry and run_again() keep the results. They count even if the function or its arguments have
        changed since.

        If the job is cancelled, or if the worker is shutting down and the result was stored, it ends the task
        function, as report() does. If the task was called directly, it only calls the function.

        Stores nothing and raises TypeError if `name` is no text; ValueError if a step of this run had the same name, or
        if the results of all steps exceed 1,000,000 bytes; TypeError or ValueError if the result is not JSON;
        RuntimeError in a thread that the task function has started.
        """
        run = self._run_in_this_thread()
        return run.step(name, function, args, kwargs) if run else function(*args, **kwargs)

    @property
    def batch(self) -> Batch | None:
        """The batch that this job belongs to, or None. batches.add() adds another job to it."""
        run = self._run_in_this_thread()
        return run.read_batch() if run else None

    def enqueue_next(self, call: JobSignature[[]]) -> None:
        """Enqueue a job in the transaction that stores the success of this one: exactly one row.

            self.enqueue_next(mail_summary.using(label="Summary").s(pk))

        However often the function runs, only what the last run names is stored. The new job has the same
        owner, and belongs to the same batch. If the task was called directly, the job is enqueued immediately.
        Raises the errors of enqueue(), and TypeError if the call has other options than `label`, `queue`, `countdown`
        and `eta`.
        """
        if run := self._run_in_this_thread():
            run.next_jobs.append(batches.planned(call))
        else:
            check_call(call, MEMBER_OPTIONS)
            call.enqueue()

    def _run_in_this_thread(self):
        if self.request_stack.top is None and process.has_run_of(self):
            raise RuntimeError(
                "report(), step(), enqueue_next() and cursor work only in the thread that runs the task function:"
                " call them there"
            )
        return self._current_run

    # In a worker

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        run = self._current_run
        if run and not run.is_called:
            run.is_called = True
            return self.run(*args, **kwargs)  # with the request of the message
        return super().__call__(*args, **kwargs)
