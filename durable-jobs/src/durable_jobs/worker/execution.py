"""How a worker runs the task function of a job, and what it writes when that has ended."""

import logging
import uuid
from contextlib import suppress
from functools import partial

from billiard.einfo import ExceptionInfo
from celery import states
from celery.app.task import Context
from celery.app.trace import TraceInfo, trace_ok_t
from celery.exceptions import Ignore
from celery_steady.django import check_connections
from django.db import IntegrityError, connection

from durable_jobs import conf, database, transitions
from durable_jobs.enqueue import NO_CANVAS, insert, new_fields
from durable_jobs.messages import fields_in, is_job, storable
from durable_jobs.models import Job
from durable_jobs.pools import shutting_down
from durable_jobs.validation import uuids
from durable_jobs.worker import lease
from durable_jobs.worker.runs import Run

logger = logging.getLogger(__name__)


def trace_jobs(app):
    """Let each job of this app be traced by trace(). Celery has just made its tracers."""
    for task in app.tasks.values():
        if is_job(task):
            task.__trace__ = partial(trace, task, task.__trace__)


def trace(task, tracer, id, args, kwargs, headers):
    """Claim the job of a message, and let Celery's `tracer` run its function. Returns what the tracer returns.

    Celery sends its signals in the tracer: so a message that starts no run sends none.
    """
    request = Context(headers, args=args, kwargs=kwargs, called_directly=False)
    if not request.is_eager:  # the caller may be reading from this connection
        check_connections()
    connection.health_check_done = True  # on a dead connection, the claim is tried again
    try:
        run = start(task, request)
    except Ignore as error:
        info, result = TraceInfo(states.IGNORED, error), ExceptionInfo(internal=True)
        info.handle_ignore(task, request)
        if not request.is_eager:
            check_connections()
        return trace_ok_t(result, info, None, None)
    except Exception as error:  # for the tracer, which handles what the task raises
        return tracer(id, args, kwargs, {**headers, "start_error": error})
    try:
        with run:
            return tracer(id, args, kwargs, {**headers, "run_of_job": run})
    finally:
        if not run.is_started:  # a shutdown during task_prerun
            run.release()
        run.ended = True


def start(task, request):
    """Claim the job of this request. Returns its Run. Raises Ignore if it may not start now."""
    if (
        fields_in(vars(request)) is None
    ):  # an app that does not know that this task is a job has sent it
        store(task, request)
        raise Ignore("stored as a job, which has a message of its own")
    run = Run(task, request)
    if not request.is_eager:  # the thread could not see the rows of a test's transaction
        lease.start_thread()
    # A suspect has crashed and fails at its next crash. A process runs only one: see become_suspect().
    is_suspect = run.crashes and run.crashes + 1 >= conf.MAX_CRASHES
    if shutting_down.value or (is_suspect and not run.become_suspect()):
        # Let another worker run it, unless it was queued again after this message was sent.
        row = Job.objects.filter(database.LOCK_TIMEOUT, pk=request.id)
        database.wait_past_soft_limit(transitions.send_again, row, conf.SWEEP_SECONDS)
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


def store(task, request):
    """Store the job that a plain message asks for. Its id may be any text, but that of a job is a UUID."""
    id = request.id
    lost = [name for name in ("callbacks", "errbacks", "chain", "chord") if request.get(name)]
    if lost:  # an app that does not know jobs could not refuse them
        logger.error("%s[%s]: its %s will not run. %s", task.name, id, ", ".join(lost), NO_CANVAS)
    pk = next(iter(uuids([id])), uuid.uuid5(uuid.NAMESPACE_OID, id))
    fields = {"pk": pk, "headers": storable(request.headers)}
    with suppress(IntegrityError):  # a second copy of the message
        database.wait_for(insert, {**new_fields(task, request.args, request.kwargs), **fields})
