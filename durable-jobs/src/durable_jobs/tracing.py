"""The request of a job: its trace in OpenTelemetry, and its id in the log of django-structlog.

The instrumentation of Celery and django-structlog put both into each message, as they are current when it is
sent. But the message may be sent hours later, by the sweeper. So the row has them, and run_as() makes them
current again. A job belongs to the request that enqueued it, also if a task function did that, and a next job to the
request of the job or batch that it follows.

A library that nobody has imported is not imported here: then all this costs two look-ups in a dictionary.
"""

import sys
import threading
from contextvars import Context, copy_context

from durable_jobs.validation import printable

FIELDS = ["trace", "request_id"]
FLUSH_SECONDS = 2  # a process that ends does not wait longer for the server that takes its spans


def opentelemetry():
    """Return the module `opentelemetry.trace`, if something has imported it."""
    return sys.modules.get("opentelemetry.trace")


def structlog():
    """Return the module `structlog.contextvars`, if something has imported it."""
    return sys.modules.get("structlog.contextvars")


def current(task):
    """Return the fields FIELDS of a new job of this task.

    Outside of a trace, for example in Beat, the job starts one: its messages and runs belong together.
    """
    traceparent = ""
    if trace := opentelemetry():
        context = trace.get_current_span().get_span_context()
        if not context.is_valid:
            root = trace.get_tracer(__name__).start_span(f"enqueue/{task}")
            root.end()
            context = root.get_span_context()
        if context.is_valid:  # else there is no provider
            traceparent = (
                f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
            )
    return {"trace": traceparent, "request_id": request_id()}


def of(row):
    """Return these fields of a row."""
    return {name: getattr(row, name) for name in FIELDS}


def request_id():
    """Return the id of the current request, which may be any text of a client, or ""."""
    bound = structlog().get_contextvars() if structlog() else {}
    return printable(bound.get("request_id") or "")[:255]


def run_as(job, function, *args, **kwargs):
    """Call a function as if the request of this job called it. Returns what it returns.

    It runs in a context of its own, so nothing stays that it binds: after a message that cannot be sent,
    the instrumentation of Celery leaves its span attached.
    """
    if not (opentelemetry() or structlog()):
        return function(*args, **kwargs)
    # In its own request, a job also gets what else is bound there, such as the id of the user. But if only
    # the fields for its message are loaded, something else has enqueued it, perhaps in the same request.
    is_own = job.request_id == request_id() and not job.get_deferred_fields()
    context = copy_context() if is_own else Context()
    return context.run(run_bound, job, function, args, kwargs)


def run_bound(job, function, args, kwargs):
    if structlog() and job.request_id:
        structlog().bind_contextvars(request_id=job.request_id)
    if not (trace := opentelemetry()):
        return function(*args, **kwargs)
    with trace.use_span(span_of(job)):
        return function(*args, **kwargs)


def span_of(job):
    """Return the span in which a job was enqueued, to be the parent of others."""
    trace = opentelemetry()
    if not job.trace:
        return trace.INVALID_SPAN
    _, trace_id, span_id, flags = (int(part, 16) for part in job.trace.split("-"))
    context = trace.SpanContext(
        trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(flags)
    )
    return trace.NonRecordingSpan(context)


def record_lost_run(job, error):
    """Record a span for a run whose own was lost with its process."""
    if trace := opentelemetry():
        parent, kind = trace.set_span_in_context(span_of(job)), trace.SpanKind.CONSUMER
        start_time = int(job.started_at.timestamp() * 1e9)  # nanoseconds
        tracer = trace.get_tracer(__name__)
        span = tracer.start_span(f"run/{job.task}", parent, kind, start_time=start_time)
        # The names of the instrumentation of Celery
        span.set_attributes({"messaging.message.id": str(job.pk), "celery.hostname": job.worker})
        span.set_status(trace.StatusCode.ERROR, error)
        span.end()


def flush(**kwargs):
    """Export the spans of a process that ends without Python's exit handlers, as Celery's children do."""
    trace = opentelemetry()
    if trace and hasattr(provider := trace.get_tracer_provider(), "force_flush"):
        # The SDK does not limit the time of force_flush().
        thread = threading.Thread(target=provider.force_flush, daemon=True)
        thread.start()
        thread.join(FLUSH_SECONDS)
