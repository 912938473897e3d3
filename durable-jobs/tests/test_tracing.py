"""What receivers of Celery's before_task_publish add to a job's headers is the same for all its messages.

With the instrumentation of OpenTelemetry and with django-structlog, as they are on PyPI.
"""

import uuid
from collections import Counter
from contextvars import ContextVar
from unittest.mock import Mock

import pytest
from celery import current_app, shared_task, signals
from celery.app.trace import build_tracer
from django_structlog.celery.receivers import CeleryReceiver
from helpers import add, run, sweeper
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.contextvars import bound_contextvars, get_contextvars

from durable_jobs import batches
from durable_jobs.actions import cancel, run_again
from durable_jobs.beat import republish
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.messages import MESSAGE_FIELDS, send
from durable_jobs.models import Batch, Job
from durable_jobs.tasks import JobTask
from durable_jobs.worker import execution

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask, bind=True)
def continue_with_add(self):
    self.enqueue_next(add.s(1, 2))


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
def structlog():
    receiver = CeleryReceiver().receiver_before_task_publish
    signals.before_task_publish.connect(receiver)
    yield
    signals.before_task_publish.disconnect(receiver)


@pytest.fixture
def calls():
    """The ids of the jobs for which the owner's own receiver was called."""
    ids = []

    def add_header(sender, headers, properties, body, routing_key, **kwargs):
        assert (sender, properties["correlation_id"]) == (headers["task"], headers["id"])
        assert list(body[0]) in ([1, 2], [3, 4], []) and routing_key == "celery"
        ids.append(headers["id"])
        headers["tenant"] = len(ids)

    signals.before_task_publish.connect(add_header)
    yield ids
    signals.before_task_publish.disconnect(add_header)


@pytest.fixture
def messages(broker, monkeypatch):
    """The headers of each message. They go to a broker without workers."""
    sent = []
    monkeypatch.setattr(
        "kombu.Producer.publish", lambda self, body, headers, **kwargs: sent.append(headers)
    )
    monkeypatch.setattr(republish, "messages_in", lambda name, broker: 0)
    return sent


def send_again():
    Job.objects.update(times_sent=0, send_at=Now())  # as after a countdown, a retry or a crash
    sweeper.sender.send_due()


def trace_of(headers):
    """Return the ids of the trace and of the span."""
    return headers["traceparent"].split("-")[1:3]


def of(span):
    return [f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"]


def test_messages_of_the_request_and_of_the_sweeper_belong_to_the_request(
    spans, structlog, messages, commit
):
    with trace.get_tracer("web").start_as_current_span("request") as request:
        with bound_contextvars(request_id="r1", user_id=7), commit():
            job = enqueue(add, [1, 2])
            assert trace.get_current_span() is request
    send_again()
    [produced, _] = [span for span in reversed(spans())]
    assert produced.kind == trace.SpanKind.PRODUCER
    assert produced.parent.span_id == request.context.span_id
    assert produced.attributes["messaging.message.id"] == str(job.pk)
    assert [trace_of(message) for message in messages] == [of(produced)] * 2
    bound = {"request_id": "r1", "user_id": 7}
    assert [message["__django_structlog__"] for message in messages] == [bound] * 2
    assert trace.get_current_span() is trace.INVALID_SPAN and not get_contextvars()


def test_the_sweeper_mixes_no_requests(spans, messages):
    jobs = []
    for name in "one", "two":
        with trace.get_tracer("web").start_as_current_span(name):
            jobs.append(enqueue(add, [1, 2], countdown=1))
    send_again()
    found = {message["id"]: trace_of(message) for message in messages}
    assert found == {str(job.pk): trace_of(job.headers) for job in jobs}
    assert len({trace_id for trace_id, _ in found.values()}) == 2


def test_a_message_needs_no_query_for_its_headers(calls, messages, django_assert_num_queries):
    enqueue(add, [1, 2])
    job = Job.objects.only(*MESSAGE_FIELDS).get()
    with django_assert_num_queries(0):
        send([job])
    assert messages[0]["tenant"] == 1 and calls == [str(job.pk)]


WAYS = {
    "enqueue": lambda: enqueue(add, [1, 2]),
    "unique": lambda: [enqueue(add, [1, 2], unique="a") for _ in range(2)],
    "many": lambda: enqueue_many([add.s(1, 2), add.s(3, 4)]),
    "batch": lambda: batches.enqueue([add.s(1, 2)], on_finish=add.si(1, 2)),
    "next": lambda: enqueue(continue_with_add),
}


@pytest.mark.parametrize("way", WAYS)
def test_receivers_are_called_once_for_each_job(way, calls, run_jobs):
    WAYS[way]()
    run_jobs()
    headers = {str(job.pk): job.headers for job in Job.objects.all()}
    assert headers == {pk: {"tenant": number} for number, pk in enumerate(calls, 1)}


@pytest.mark.parametrize("way", WAYS)
def test_a_receiver_that_adds_no_header_is_called_once_for_each_job(way, run_jobs):
    ids = []

    def count(headers, **kwargs):
        ids.append(headers["id"])

    signals.before_task_publish.connect(count)
    try:
        WAYS[way]()
        run_jobs()
    finally:
        signals.before_task_publish.disconnect(count)
    assert sorted(ids) == sorted(str(pk) for pk in Job.objects.values_list("pk", flat=True))


def test_the_signal_after_publishing_is_sent_although_nobody_receives_the_one_before():
    sent = Mock()
    signals.after_task_publish.connect(sent)
    job = enqueue(add, [1, 2])
    signals.after_task_publish.disconnect(sent)
    assert sent.call_args.kwargs["headers"]["id"] == str(job.pk)


def test_a_job_that_runs_again_belongs_to_the_request_that_runs_it(calls):
    failed, succeeded = enqueue(add, [1, 2]), enqueue(add, [1, 2])
    cancel(failed)
    Job.objects.filter(pk=succeeded.pk).update(state="succeeded", finished_at=Now(), send_at=None)
    again = [run_again(job) for job in Job.objects.order_by("created_at")]
    assert [job.headers for job in again] == [{"tenant": 3}, {"tenant": 4}]
    assert calls == [str(job.pk) for job in [failed, succeeded, *again]]


def test_callbacks_belong_to_the_request_that_stored_their_batch(spans, run_jobs):
    tracer = trace.get_tracer("web")
    with tracer.start_as_current_span("first") as first:
        batches.enqueue([add.s(1, 2)], on_success=add.si(1, 1), on_finish=add.si(2, 2))
    with tracer.start_as_current_span("second"):
        batches.add(Batch.objects.get(), add.s(3, 4))
    run_jobs()
    callbacks = Job.objects.filter(follows__isnull=False)
    assert [trace_of(job.headers)[0] for job in callbacks] == [f"{first.context.trace_id:032x}"] * 2


def test_headers_of_apply_async_are_stored(messages, commit):
    with commit():
        add.apply_async([1, 2], headers={"tenant": 7, "id": object()})
    assert Job.objects.get().headers == {"tenant": 7}
    assert messages[0]["tenant"] == 7


def test_headers_of_a_message_that_another_app_has_sent_are_kept(commit):
    headers = {"tenant": 7, "durable_job": "its own"}
    tracer = build_tracer(add.name, add, app=current_app)
    with commit():
        execution.trace(
            add, tracer, id := str(uuid.uuid4()), [1, 2], {}, {"id": id, "headers": headers}
        )
    job = Job.objects.get()
    assert (job.state, job.headers) == ("succeeded", headers)


# The receivers for django-tenants, as docs/existing-project.md has them. `schema` is that of the connection.

schema = ContextVar("schema", default="public")


def name_schema(headers, **kwargs):
    headers.setdefault("schema", schema.get())


def enter_schema(task, **kwargs):
    schema.set(getattr(task.request, "schema", "public"))


def leave_schema(**kwargs):
    schema.set("public")


@shared_task(base=JobTask, bind=True)
def name_schemas(self, rest=()):
    if rest:
        name_schemas.enqueue()
        self.enqueue_next(name_schemas.s())
        batches.enqueue([name_schemas.s()], on_finish=name_schemas.si())
    return schema.get()


def test_receivers_run_each_job_for_the_tenant_that_enqueued_it(run_jobs):
    receivers = {"before_task_publish": name_schema, "task_prerun": enter_schema}
    receivers["task_postrun"] = leave_schema
    for signal, receiver in receivers.items():
        getattr(signals, signal).connect(receiver)
    try:
        for tenant in "red", "blue":
            schema.set(tenant)
            job = name_schemas.using(label=tenant).enqueue([1])
        schema.set("public")
        cancel(job)
        job.refresh_from_db()
        run_again(job)  # in the admin
        run_jobs()
    finally:
        for signal, receiver in receivers.items():
            getattr(signals, signal).disconnect(receiver)
    assert Counter(Job.objects.values_list("result", flat=True)) == {"red": 5, "blue": 5}


def test_a_receiver_may_add_headers_where_sentry_reads_them():
    """There, they replace all other headers in `request.headers`. (https://github.com/celery/celery/issues/4875)"""

    def add_trace(headers, **kwargs):
        headers.setdefault("headers", {})["sentry-trace"] = "1-2-1"

    signals.before_task_publish.connect(add_trace)
    try:
        job = run(lambda task: task.request.headers)
    finally:
        signals.before_task_publish.disconnect(add_trace)
    assert (job.state, job.result) == ("succeeded", {"sentry-trace": "1-2-1"})


@pytest.mark.parametrize("value", ["a\0b", "\ud800", object, float("nan")], ids=repr)
def test_a_header_that_cannot_be_stored_is_left_out(value, structlog, calls):
    with bound_contextvars(request_id=value):
        enqueue(add, [1, 2])
    assert Job.objects.get().headers == {"tenant": 1}


def test_without_receivers_enqueue_makes_no_message(monkeypatch):
    monkeypatch.setattr(current_app.amqp, "create_task_message", Mock(side_effect=AssertionError))
    assert enqueue(add, [1, 2]).headers == {}
