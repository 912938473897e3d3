"""How a worker runs the task function of a job, and what it writes when that has ended."""

import asyncio
import logging
import uuid
from contextlib import suppress

from billiard.einfo import ExceptionInfo
from celery import states
from celery.app.task import Context
from celery.app.trace import TraceInfo, trace_ok_t
from celery.exceptions import Ignore, Retry
from celery_steady.django import check_connections
from django.db import IntegrityError, connection
from django.db.transaction import TransactionManagementError

from durable_jobs import batches, conf, database, transitions
from durable_jobs.enqueue import NO_CANVAS, insert, new_fields
from durable_jobs.exceptions import JobLost, WorkerStopping
from durable_jobs.messages import fields_in, storable
from durable_jobs.models import Job
from durable_jobs.pools import pool, shutting_down
from durable_jobs.states import SENT
from durable_jobs.validation import uuids
from durable_jobs.worker import lease
from durable_jobs.worker.runs import OVER_TIME_LIMIT, Run
from durable_jobs.worker.shutdown import child_has_crashed

logger = logging.getLogger(__name__)


def trace(task, tracer, id, args, kwargs, request):
    """Claim the job of a message, and let Celery's `tracer` run its function. Returns what the tracer returns.

    Celery sends its signals in the tracer: so a message that starts no run sends none.
    """
    context = Context(request, args=args, kwargs=kwargs, called_directly=False)
    if not context.is_eager:  # the caller may be reading from this connection
        check_connections()
    connection.health_check_done = True  # on a dead connection, the claim is tried again
    try:
        run = start(task, context, args, kwargs)
    except Ignore as error:
        info, result = TraceInfo(states.IGNORED, error), ExceptionInfo(internal=True)
        info.handle_ignore(task, context)
        if not context.is_eager:
            check_connections()
        return trace_ok_t(result, info, None, None)
    except Exception as error:  # for the tracer, which handles what the task raises
        return tracer(id, args, kwargs, {**request, "start_error": error})
    try:
        with run:
            return tracer(id, args, kwargs, {**request, "run_of_job": run})
    finally:
        if not run.is_started:  # a shutdown during task_prerun
            run.release()
        run.ended = True


def start(task, request, args, kwargs):
    """Claim the job of this request. Returns its Run. Raises Ignore if it may not start now."""
    fields = fields_in(vars(request))  # Sentry replaces request.headers
    if fields is None:  # an app that does not know that this task is a job has sent it
        store(task, request, args, kwargs)
        raise Ignore("stored as a job, which has a message of its own")
    run = Run(task, request, fields)
    if not request.is_eager:  # the thread could not see the rows of a test's transaction
        lease.start_thread()
    # A suspect has crashed and fails at its next crash. A process runs only one: see become_suspect().
    crashes = fields["crashes"]
    is_suspect = crashes and crashes + 1 >= conf.MAX_CRASHES
    if shutting_down.value or (is_suspect and not run.become_suspect()):
        # Let another worker run it, unless it was queued again after this message was sent.
        row = Job.objects.filter(SENT, database.LOCK_TIMEOUT, pk=request.id)
        database.wait_past_soft_limit(transitions.requeue, row, conf.SWEEP_SECONDS)
        raise Ignore("must wait: its worker is shutting down, or runs another suspect")
    try:
        if not database.wait_past_soft_limit(run.claim):
            if run.put_back_if_paused():
                raise Ignore("its queue or its task is paused")
            if not database.wait_past_soft_limit(run.claim):  # a pause may have ended in between
                raise run.ignored()
    except BaseException:
        run.ended = True
        raise
    return run


def store(task, request, args, kwargs):
    """Store the job that a plain message asks for. Its id may be any text, but that of a job is a UUID."""
    id = request.id
    lost = [name for name in ("callbacks", "errbacks", "chain", "chord") if request.get(name)]
    if lost:  # an app that does not know jobs could not refuse them
        logger.error("%s[%s]: its %s will not run. %s", task.name, id, ", ".join(lost), NO_CANVAS)
    pk = next(iter(uuids([id])), uuid.uuid5(uuid.NAMESPACE_OID, id))
    fields = {"pk": pk, "headers": storable(request.headers)}
    with suppress(IntegrityError):  # a second copy of the message
        database.wait_for(insert, {**new_fields(task, args, kwargs), **fields})


def run_and_write(run, args, kwargs):
    """Run the function, and write how it ended. Returns its result, or raises what Celery expects."""
    run.is_started = True
    with connection.execute_wrapper(database.end_interrupted_query):
        return call_and_write(run, args, kwargs)


def call_and_write(run, args, kwargs):
    try:
        result = call(run, args, kwargs)
    except Retry:
        if run.retry:
            run.try_again()
        else:
            run.fail("Retry was raised directly: call self.retry()")
        raise
    except Ignore:  # raised by the function: the job succeeds without a result
        result = None
    except JobLost:
        raise run.ignored() from None
    except WorkerStopping:
        run.release()
        raise Ignore("will continue in another worker") from None
    except BaseException as error:
        if pool.is_terminated(error):
            if not child_has_crashed():
                run.release()
            raise  # after a crash, the main process recovers the job
        if isinstance(error, SystemExit):
            run.fail(f"The task called sys.exit({error.code!r})")
            # Not SystemExit, which would end the child process or the thread.
            raise RuntimeError("sys.exit() in a task") from error
        run.fail(OVER_TIME_LIMIT if isinstance(error, pool.time_limit_errors) else "")
        raise
    if run.retry:  # with throw=False
        run.try_again()
        raise Ignore("queued again")
    run.succeed(result)
    return result


def call(run, args, kwargs):
    """Return the function's result. Raises TransactionManagementError if it left a transaction open."""
    in_block = connection.in_atomic_block  # of a test: leave it open
    try:
        if run.results_of:
            args = [database.wait_for(batches.results_of, run.results_of), *args]
        result = run.task._call(*args, **kwargs)
    finally:
        was_open = not in_block and database.roll_back_open_transaction()
    if was_open:
        raise TransactionManagementError("The task left a transaction open")
    return result


def run_coroutine(task, coroutine):
    """Run the coroutine of a task function in an event loop, which has a thread of its own.

    A function that the coroutine passes to sync_to_async() runs in the thread of this call, on its
    database connection. An exception that ends this call, such as that of a time limit, cancels the
    coroutine.
    """
    request, loop, current = task.request, None, None
    if run := task._run_in_this_thread():
        # Now, because a coroutine cannot query the database.
        run.read_cursor()
        run.read_batch()

    async def with_request():
        nonlocal loop, current
        loop, current = asyncio.get_running_loop(), asyncio.current_task()
        task.request_stack.push(request)  # each thread has its own stack
        try:
            return await coroutine
        finally:
            task.request_stack.pop()

    try:
        return pool.run_coroutine(with_request)
    except BaseException:
        with suppress(RuntimeError):  # the loop has ended
            if loop:
                loop.call_soon_threadsafe(current.cancel)
        raise
