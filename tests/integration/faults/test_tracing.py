"""One trace and one request id, from a request to each run of its task: real processes, real OTLP.

config/tracing.py sends the spans to a server of the test.
"""

import re
import time

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from pytest_httpserver import HTTPServer
from werkzeug import Response

from harness.faults import stacks
from harness.project import wait_for

LATER = {"OTEL_BSP_SCHEDULE_DELAY": 600_000}  # so that only the end of a process exports its spans
STEPS = 6  # jobs in each of the three: see faults/survey.py
on_each_pool = stacks(["redis"], tracing=True)
on_prefork = stacks(["redis"], ["prefork"], tracing=True)
on_each_plain_pool = stacks(["redis"], plain="traced-", tracing=True)


class Collector(HTTPServer):
    """Takes spans as an OpenTelemetry collector does."""

    def __init__(self):
        super().__init__(threaded=True)
        self.spans = []
        self.expect_request("/v1/traces", method="POST").respond_with_handler(self.take)

    def take(self, request):
        for resource in ExportTraceServiceRequest.FromString(request.data).resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return Response()

    def trace(self, span):
        """Return the spans of the same trace, the oldest first."""
        found = [each for each in tuple(self.spans) if each.trace_id == span.trace_id]
        return sorted(found, key=lambda each: each.start_time_unix_nano)

    def runs(self, *jobs):
        """Return the spans of the runs of these jobs, the oldest first."""
        spans = [span for span in tuple(self.spans) if span.kind == Span.SPAN_KIND_CONSUMER]
        spans = [span for span in spans if attributes(span).get("messaging.message.id") in jobs]
        return sorted(spans, key=lambda each: each.start_time_unix_nano)

    def has_runs_of(self, *jobs):
        """Whether each of these jobs has a run. A second message of a job may make another one."""
        return {attributes(run)["messaging.message.id"] for run in self.runs(*jobs)} == set(jobs)


def attributes(span):
    return {each.key: each.value.string_value for each in span.attributes}


@pytest.fixture(scope="session")
def collector():
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def tracing(collector):
    """For stacks: a function that gives a project the extra, and returns its variables."""

    def add(project):
        pyproject = project.read("pyproject.toml")
        extra = re.search(r"^tracing = \[.*\n((?:    .+\n)+)", pyproject, re.M)[1]
        project.edit("pyproject.toml", r"^dependencies = \[\n", rf"\g<0>{extra}")
        project.append("config/settings.py", "DJANGO_STRUCTLOG_TRUST_UPSTREAM_REQUEST_ID = True\n")
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
            "OTEL_BSP_SCHEDULE_DELAY": 200,  # milliseconds
        }

    return add


def post(stack, path, request_id, **data):
    """Send a POST with the id of a request. Return the id in the answer."""
    return stack.post_to(path, {"X-Request-ID": request_id}, **data)


def root_of(collector, job):
    """Return the span of the request in which this job was enqueued, once it was exported."""
    [run, *_] = wait_for(lambda: collector.runs(job))

    def roots():
        return [span for span in collector.trace(run) if span.kind == Span.SPAN_KIND_SERVER]

    [root] = wait_for(roots)
    return root


def is_tree(spans):
    """Whether these spans have one root, and each other one has its parent among them."""
    ids = {span.span_id for span in spans}
    roots = [span for span in spans if not span.parent_span_id]
    return len(roots) == 1 and all(s.parent_span_id in ids for s in spans if s not in roots)


def wait_for_tree(collector, root):
    """Wait until the spans of a trace are a tree: each process exports its own at another time."""
    return wait_for(lambda: is_tree(spans := collector.trace(root)) and spans)


def ends(runs):
    """Return how these runs ended, without those of duplicate messages, which do nothing."""
    found = [run.status.message or attributes(run).get("celery.state") for run in runs]
    return [end for end in found if end != "IGNORED"]


@on_each_pool
def test_a_job_that_lost_its_worker_and_is_retried_is_one_tree(stack, collector, gate):
    """Web, a worker that is killed, Beat, another worker, a retry, and a job of the function."""
    stack.other.stop()
    data = {"task": "hold_then_retry", "args": [str(gate), "next"]}
    job = post(stack, "/faults/", "request-of-the-tree", **data)
    stack.wait_until_started(job)
    stack.worker.kill()
    stack.other.start()
    stack.wait_until_started(job, times=2)
    gate.touch()
    stack.wait_until_final(job)
    child = stack.ask("result = [str(j.pk) for j in Job.objects.filter(args=[job])][0]", job=job)
    stack.wait_until_final(child)
    root = root_of(collector, job)
    # The span of the first run was lost with its process.
    wait_for(lambda: len(ends(collector.runs(job))) == 2 and collector.runs(child))
    assert ends(collector.runs(job)) == ["RETRY", "SUCCESS"]
    spans = wait_for_tree(collector, root)
    assert {(span.kind, span.name.partition("/")[0]) for span in spans} == {
        (Span.SPAN_KIND_SERVER, "POST faults"),
        (Span.SPAN_KIND_PRODUCER, "apply_async"),
        (Span.SPAN_KIND_CONSUMER, "run"),
    }
    for words in "the function says", "task_started", "task_retrying":
        found = lines(stack, job, words) + lines(stack, child, words)
        assert found and all("request-of-the-tree" in line for line in found), words


def lines(stack, *words):
    """Return the lines of all logs that have these words."""
    texts = [log.read_text(errors="replace").splitlines() for log in stack.logs]
    return [line for text in texts for line in text if all(word in line for word in words)]


@on_each_pool
def test_what_starts_next_is_in_the_trace_of_the_request(stack, collector):
    """A chain, a chord and a batch with its two callbacks."""
    for number in range(3):
        name = f"request-{number}"
        post(stack, "/faults/batches/", name, key=f"{name}-{time.time()}", number=number)
        code = "jobs = Job.objects.all()\n"
        code += "result = [str(job.pk) for job in jobs if repr(name) in str(job.headers)]"
        wait_for(lambda code=code, name=name: len(stack.ask(code, name=name)) == STEPS)
        jobs = stack.ask(code, name=name)
        stack.wait_until_final(*jobs)
        wait_for(lambda jobs=jobs: collector.has_runs_of(*jobs))
        root = root_of(collector, jobs[0])
        assert {run.trace_id for run in collector.runs(*jobs)} == {root.trace_id}
        wait_for_tree(collector, root)


@on_prefork
def test_a_child_that_is_replaced_exports_its_spans(stack, collector):
    worker = stack.make_worker("replaced", "--queues test", **LATER)
    worker.command += ["--max-tasks-per-child", "1"]
    worker.start()
    jobs = [stack.enqueue("quick", queue="test") for _ in range(10)]
    stack.wait_until_final(*jobs)
    wait_for(lambda: collector.has_runs_of(*jobs))


@on_each_pool
def test_a_worker_that_ends_exports_its_spans(stack, collector, gate):
    """Also with a task function that does not end in time."""
    worker = stack.make_worker("ending", "--queues test", **LATER).start()
    jobs = [stack.enqueue("quick", queue="test") for _ in range(10)]
    stack.wait_until_final(*jobs)
    stack.wait_until_started(stack.enqueue("hold", gate, queue="test"))
    assert collector.runs(*jobs) == []
    worker.stop()
    wait_for(lambda: collector.has_runs_of(*jobs))


@on_prefork
def test_a_worker_ends_in_time_although_nothing_takes_its_spans(stack):
    variables = {**LATER, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    worker = stack.make_worker("alone", "--queues test", **variables).start()
    jobs = [stack.enqueue("quick", queue="test") for _ in range(10)]
    stack.wait_until_final(*jobs)
    assert worker.stop() == 0


@on_prefork
def test_a_killed_child_is_logged_with_the_id_of_its_request(stack):
    job = post(stack, "/faults/", "request-of-the-dead", task="die", args=[])
    wait_for(lambda: lines(stack, job, "lost its worker"))
    failed = wait_for(lambda: lines(stack, job, "task_failed"))
    assert [line for line in failed if "request-of-the-dead" not in line] == []


@on_each_plain_pool
def test_a_trace_goes_from_the_request_to_each_run_of_its_plain_task(stack, collector):
    _, _, answer = stack.request("/api/trials/", {"task": "fail_twice", "args": []})
    task = answer["id"]
    wait_for(lambda: len(collector.runs(task)) == 3)
    assert ends(collector.runs(task)) == ["RETRY", "RETRY", "SUCCESS"]
    spans = wait_for_tree(collector, root_of(collector, task))
    assert sorted((span.kind, span.name.partition("/")[0]) for span in spans) == [
        (Span.SPAN_KIND_SERVER, "POST api"),
        *[(Span.SPAN_KIND_PRODUCER, "apply_async")] * 3,
        *[(Span.SPAN_KIND_CONSUMER, "run")] * 3,
    ]


@on_each_plain_pool
def test_a_worker_of_plain_tasks_exports_its_spans_when_it_ends(stack, collector):
    stack.worker.stop()
    worker = stack.make_worker("ending", **LATER).start()
    tasks = [stack.send("quick") for _ in range(10)]
    stack.wait_until_started(*tasks)
    assert collector.runs(*tasks) == []
    worker.stop()
    wait_for(lambda: collector.has_runs_of(*tasks))


@on_each_plain_pool
def test_a_request_whose_plain_task_cannot_be_sent_is_not_the_parent_of_the_next(stack, collector):
    stack.broker.kill()
    data = {"task": "quick", "args": []}
    for _ in range(20):
        assert stack.request("/api/trials/", data)[0] == 503
    with stack.supervised(stack.worker):
        stack.broker.start()
        tasks = [stack.request("/api/trials/", data)[2]["id"] for n in range(20)]
        wait_for(lambda: collector.has_runs_of(*tasks))
    roots = [root_of(collector, task) for task in tasks]
    assert len({root.trace_id for root in roots}) == len(tasks)
    assert {root.parent_span_id for root in roots} == {b""}
