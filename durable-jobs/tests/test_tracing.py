"""A job belongs to the trace and to the log lines of the request that enqueued it.

With the instrumentation of OpenTelemetry and with django-structlog, as they are on PyPI.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from celery import current_app, shared_task, signals
from django.db.models.functions import Now
from django_structlog.celery.receivers import CeleryReceiver
from helpers import claim, sweeper
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.contextvars import bound_contextvars, get_contextvars

from durable_jobs import admission, batches, publish, tracing, transitions
from durable_jobs.actions import cancel, run_all_again
from durable_jobs.beat import republish
from durable_jobs.beat.schedule import check_entry
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.messages import MESSAGE_FIELDS, send
from durable_jobs.models import Batch, Job
from durable_jobs.tasks import JobTask
from durable_jobs.worker import lease

pytestmark = pytest.mark.django_db
INVALID = trace.INVALID_SPAN


@shared_task(base=JobTask)
def add(x, y=0):
    return x + y


@shared_task(base=JobTask, limit="one")
def limited():
    pass


@shared_task(base=JobTask)
def enqueue_another():
    enqueue(add, [1])


@pytest.fixture
def spans(monkeypatch):
    """The function returns the finished spans, the oldest first."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    CeleryInstrumentor().instrument(tracer_provider=provider)
    yield lambda: sorted(exporter.get_finished_spans(), key=lambda span: span.start_time)
    CeleryInstrumentor().uninstrument()


@pytest.fixture
def messages(monkeypatch):
    """The headers of each message. They go to a broker without workers."""
    sent, receiver = [], CeleryReceiver()

    def keep(headers, **kwargs):
        sent.append(headers)

    signals.before_task_publish.connect(receiver.receiver_before_task_publish)
    signals.before_task_publish.connect(keep)
    current_app.conf.task_always_eager = False
    monkeypatch.setattr(republish, "messages_in", lambda name, broker: 0)
    yield sent
    signals.before_task_publish.disconnect(receiver.receiver_before_task_publish)
    signals.before_task_publish.disconnect(keep)


@pytest.fixture
def request_of(spans):
    """A function that starts a request with this id. The value is the context of its span."""

    class Request:
        def __init__(self, id):
            self.span = trace.get_tracer("web").start_as_current_span(id)
            self.bound = bound_contextvars(request_id=id, user_id=7)

        def __enter__(self):
            self.bound.__enter__()
            return self.span.__enter__().get_span_context()

        def __exit__(self, *exc_info):
            self.span.__exit__(*exc_info)
            self.bound.__exit__(*exc_info)

    return Request


def stored(job):
    """Return the trace and the id of the request in the row of a job."""
    trace, request_id = Job.objects.values_list("trace", "request_id").get(pk=job.pk)
    return trace.split("-")[1:2], request_id


def of(context, request_id):
    return [f"{context.trace_id:032x}"], request_id


def logged(message):
    """Return what django-structlog binds in the worker that gets this message."""
    return message["__django_structlog__"]


def is_nothing_bound():
    return trace.get_current_span() is INVALID and not get_contextvars()


def test_messages_of_the_request_and_of_the_sweep_belong_to_the_request(
    spans, messages, request_of, commit
):
    with request_of("r1") as root, commit():
        job = enqueue(add, [1])
    assert stored(job) == of(root, "r1")
    Job.objects.update(times_sent=0, sweep_at=Now())  # as after a countdown, a retry or a crash
    sweeper.sender.send_due()
    assert [logged(message) for message in messages] == [
        {"request_id": "r1", "user_id": 7},
        {"request_id": "r1"},
    ]
    produced = [span for span in spans() if span.kind == trace.SpanKind.PRODUCER]
    assert [span.parent.span_id for span in produced] == [root.span_id] * 2
    sent = [message["traceparent"].split("-")[2] for message in messages]
    assert sent == [f"{span.context.span_id:016x}" for span in produced]
    assert is_nothing_bound()


def test_a_message_needs_no_query_for_its_request(messages, django_assert_num_queries):
    enqueue(add, [1])
    job = Job.objects.only(*MESSAGE_FIELDS).get()
    with django_assert_num_queries(0):
        send([job])


def test_the_sweep_mixes_no_requests(messages, request_of):
    jobs = []
    for name in "r1", "r2":
        with request_of(name):
            jobs.append(enqueue(add, [1], countdown=1))
    jobs.append(enqueue(add, [1], countdown=1))
    Job.objects.update(sweep_at=Now())
    sweeper.sender.send_due()
    found = {message["id"]: logged(message) for message in messages}
    assert found == {
        str(jobs[0].pk): {"request_id": "r1"},
        str(jobs[1].pk): {"request_id": "r2"},
        str(jobs[2].pk): {},
    }
    assert len({message["traceparent"].split("-")[1] for message in messages}) == 3
    assert is_nothing_bound()


def test_a_failed_publish_leaves_nothing_attached(messages, request_of, commit, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError

    monkeypatch.setattr("kombu.Producer.publish", refuse)
    with commit():
        enqueue(add, [1])
    assert is_nothing_bound()
    publish.publisher.again_at.clear()
    with request_of("r1"):
        before = trace.get_current_span(), get_contextvars()
        with commit():
            enqueue(add, [1])
        assert (trace.get_current_span(), get_contextvars()) == before
    assert len(messages) == 2


def test_a_lost_run_has_a_span_and_its_log_lines_the_id(spans, request_of, monkeypatch):
    lines = []
    monkeypatch.setattr(lease.logger, "warning", lambda *args: lines.append(get_contextvars()))
    monkeypatch.setattr(lease.logger, "error", lambda *args: lines.append(get_contextvars()))
    with request_of("r1") as root:
        job = enqueue(add, [1])
    claim(job.pk)
    lease.recover(Job.objects.filter(pk=job.pk))
    claim(job.pk, crashes=1)
    Job.objects.update(deadline=Now())
    lease.recover(Job.objects.filter(pk=job.pk))
    assert lines == [{"request_id": "r1"}] * 2
    lost = [span for span in spans() if span.kind == trace.SpanKind.CONSUMER]
    assert [span.name for span in lost] == [f"run/{add.name}"] * 2
    assert [span.parent.span_id for span in lost] == [root.span_id] * 2
    assert {span.status.status_code for span in lost} == {trace.StatusCode.ERROR}
    assert [span.status.description for span in lost] == ["Its worker died", "Over its time limit"]
    assert is_nothing_bound()


def test_a_job_that_cannot_be_sent_is_logged_with_the_id_of_its_request(request_of, monkeypatch):
    lines = []
    monkeypatch.setattr(republish.logger, "error", lambda *args: lines.append(get_contextvars()))
    with request_of("r1"):
        job = enqueue(add, [1])
    republish.fail(job.pk, error="refused")
    republish.fail(job.pk, error="refused")  # it has failed, so nothing changes
    assert lines == [{"request_id": "r1"}]


def test_many_jobs_belong_to_the_request_that_enqueued_them_or_ran_them_again(request_of):
    with request_of("r1") as first:
        jobs = enqueue_many(add, [[1], [2]])
        jobs.append(enqueue(add, [1], unique="a"))
        jobs += batches.enqueue(add, [[1]]).jobs.all()
    assert [stored(job) for job in jobs] == [of(first, "r1")] * 4
    failed, copied, unique, member = jobs
    for job in failed, member, unique:
        cancel(job)
    Job.objects.filter(pk=copied.pk).update(state="succeeded", finished_at=Now(), sweep_at=None)
    with request_of("r2") as second:
        again = list(run_all_again(Job.objects.order_by("created_at")))
    assert len(again) == 4
    assert [stored(job) for job in again] == [of(second, "r2")] * 4
    assert stored(copied) == of(first, "r1")


def test_what_starts_next_belongs_to_the_request_of_the_first_job(request_of, run_jobs):
    """A batch's callback and what a task function enqueues."""
    with request_of("r1") as root:
        enqueue(enqueue_another)
        batches.enqueue(add, [[1], [2]], on_success=add.si(1), on_finish=add.si(2))
    with request_of("r2"):  # it adds a job, but the batch is that of r1
        batches.add(Batch.objects.get(), add, [3])
    run_jobs()
    jobs = Job.objects.exclude(request_id="r2").filter(trace__contains=f"{root.trace_id:032x}")
    assert jobs.filter(request_id="r1").count() == 1 + 2 + 2
    # In a worker, django-structlog binds the id of the message.
    assert Job.objects.exclude(request_id__in=["r1", "r2"]).count() == 1


def test_a_job_that_another_one_lets_go_does_not_get_its_ids(messages, request_of):
    """Not even if both have the same request: the first one has not enqueued the second."""
    with request_of("r1"):
        for _ in range(2):
            enqueue(limited)
    ids = {"task_id": "of the first", "user_id": 8}
    for name in "r1", "r2":
        with bound_contextvars(request_id=name, **ids):
            admission.admit([limited.limit])
            assert get_contextvars() == {"request_id": name, **ids}
        transitions.finish(Job.objects.filter(blocked_by=None), "succeeded")
    assert [logged(message) for message in messages] == [{"request_id": "r1"}] * 2


def test_a_job_of_a_body_gets_the_ids_of_its_run(messages, commit, spans):
    run = trace.get_tracer("worker").start_as_current_span("run/…")
    with bound_contextvars(request_id="r1", task_id="of the body", user_id=8), run as span:
        with commit():
            job = enqueue(add, [1])
    assert stored(job) == of(span.get_span_context(), "r1")
    [message] = messages
    assert logged(message) == {"request_id": "r1", "parent_task_id": "of the body", "user_id": 8}


def test_a_job_without_a_request_starts_a_trace_of_its_own(spans, messages, commit):
    """A job of Beat or of a shell: its first message and its retries are one tree."""
    with commit():
        job = enqueue(add, [1])
    Job.objects.update(times_sent=0, sweep_at=Now())
    sweeper.sender.send_due()
    root, *produced = spans()
    assert root.parent is None and root.name == f"enqueue/{add.name}"
    assert [span.parent.span_id for span in produced] == [root.context.span_id] * 2
    assert stored(job) == of(root.context, "")
    check_entry(add.name, [1], {}, {})
    assert len(spans()) == 3  # to check a schedule starts no trace


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("a\0b", "ab"), ("x" * 300, "x" * 255), ("\ud800", "?"), (7, "7"), (None, "")],
)
def test_any_text_of_a_client_can_be_stored_as_the_id_of_its_request(sent, kept, messages, commit):
    with bound_contextvars(request_id=sent, user_id=7), commit():
        job = enqueue(add, [1])
    assert stored(job)[1] == kept
    assert logged(messages[0])["user_id"] == 7  # it is still its own request


def test_an_unsampled_trace_stays_unsampled(spans, messages):
    flags = trace.TraceFlags(0)
    context = trace.SpanContext(1, 2, is_remote=True, trace_flags=flags)
    with trace.use_span(trace.NonRecordingSpan(context)):
        job = enqueue(add, [1], countdown=1)
    assert job.trace == "00-" + "1".zfill(32) + "-" + "2".zfill(16) + "-00"
    Job.objects.update(sweep_at=Now())
    sweeper.sender.send_due()
    assert messages[0]["traceparent"].endswith("-00") and not spans()


def test_a_process_that_ends_exports_its_spans_but_does_not_wait_long(monkeypatch):
    flushed, may_end = [], threading.Event()

    class Provider:
        def force_flush(self):
            flushed.append(1)
            may_end.wait(60)

    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.1)
    monkeypatch.setattr(trace, "get_tracer_provider", Provider)
    signals.worker_process_shutdown.send(None, pid=1, exitcode=0)
    assert flushed == [1]
    may_end.set()


def test_without_a_provider_no_trace_is_stored(commit):
    with commit():
        job = enqueue(add, [1])
    assert stored(job) == ([], "")
    tracing.flush()


def test_a_library_that_nobody_uses_is_not_imported():
    code = """
import django, sys
django.setup()
from celery import shared_task
from durable_jobs import tracing

from durable_jobs.models import Job
from durable_jobs.tasks import JobTask
assert tracing.current("a task") == {"trace": "", "request_id": ""}
assert tracing.run_as(Job(), dict, a=1) == {"a": 1}
tracing.record_lost_run(Job(), "")
tracing.flush()
print([name for name in sys.modules if name.startswith(("opentelemetry", "structlog"))])
"""
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    options["env"] = {**os.environ, "DJANGO_SETTINGS_MODULE": "settings"}
    run = subprocess.run([sys.executable, "-c", code], **options)
    assert run.stdout == "[]\n", run.stdout + run.stderr
