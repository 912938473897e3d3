"""Signals and hooks mean for a job what they mean for a task: each run, and how the job ended."""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from celery import Task, signals
from celery import current_app as app
from celery.app.trace import build_tracer
from celery.exceptions import TimeLimitExceeded, WorkerLostError
from celery.fixups.django import DjangoWorkerFixup
from celery_steady.django import check_connections
from django.db import connection
from django.db.backends.base.base import BaseDatabaseWrapper
from helpers import claim_and_lapse, deliver, receive

from durable_jobs import publish, transitions
from durable_jobs.actions import cancel
from durable_jobs.beat import republish
from durable_jobs.beat.sweeper import recover_lapsed
from durable_jobs.messages import message_of
from durable_jobs.models import Job
from durable_jobs.process import process
from durable_jobs.tasks import job
from durable_jobs.worker import children, startup
from durable_jobs.worker.execution import trace_jobs
from durable_jobs.worker.lease import recover
from durable_jobs.worker.runs import Run

pytestmark = pytest.mark.django_db(transaction=True)
NAMES = "prerun postrun success failure retry revoked".split()
notes = defaultdict(list)  # {id of a job: what was said of it}


class Noting(Task):
    def on_failure(self, error, id, args, kwargs, einfo):
        assert self.request.id == id and einfo.exception
        notes[id].append(f"on_failure({type(error).__name__})")

    def on_retry(self, error, id, args, kwargs, einfo):
        notes[id].append("on_retry")


@job(base=Noting)
def work(self, how="", x=None):
    if how == "retry" and not self.request.retries:
        self.retry(countdown=0)
    if how == "cancel":
        cancel(Job.objects.filter(pk=self.request.id))
    if how == "fail":
        raise ValueError(how)


def note(signal, sender=None, task_id=None, request=None, **kwargs):
    name = signal.name.removeprefix("task_")
    if name == "postrun":
        name += f"({kwargs['state']})"
    notes[task_id or (request or sender.request).id].append(name)


@pytest.fixture(autouse=True)
def noted():
    notes.clear()
    for name in NAMES:
        getattr(signals, f"task_{name}").connect(note)
    yield
    for name in NAMES:
        getattr(signals, f"task_{name}").disconnect(note)


def of(job):
    return notes[str(job.pk)]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("", "prerun success postrun(SUCCESS)"),
        ("fail", "prerun on_failure(ValueError) failure postrun(FAILURE)"),
        ("retry", "prerun on_retry retry postrun(RETRY) prerun success postrun(SUCCESS)"),
        ("cancel", "prerun revoked postrun(IGNORED)"),
    ],
)
def test_each_run_says_what_a_task_says(how, said):
    assert of(deliver(work.enqueue(how))) == said.split()


def test_a_claim_that_fails_is_tried_once(monkeypatch):
    claim = Mock(side_effect=ValueError)
    monkeypatch.setattr(Run, "claim", claim)
    job = work.enqueue()
    assert claim.call_count == 1
    assert of(job) == "prerun on_failure(ValueError) failure postrun(FAILURE)".split()


def test_a_second_copy_of_a_message_says_nothing():
    job = deliver(work.enqueue())
    notes.clear()
    publish.publish([job])
    assert not notes


def test_a_worker_sends_no_signal_for_a_message_that_starts_nothing():
    """It calls the task's __trace__, which Celery sets, and then worker/consumer.py."""
    job = deliver(work.enqueue())
    notes.clear()
    for task in app.tasks.values():
        task.__trace__ = build_tracer(task.name, task, app=app)
    trace_jobs(app)
    try:
        result = work.__trace__(str(job.pk), [], {}, message_of(job).headers)
    finally:
        for task in app.tasks.values():
            task.__trace__ = None
    assert result.info.state == "IGNORED" and not notes


def test_a_job_that_is_cancelled_before_it_runs_is_revoked_once(published):
    job = work.enqueue()
    assert cancel(job) == 1 and cancel(job) == 0
    assert deliver(job).state == "cancelled"
    assert of(job) == ["revoked"]


def test_a_dead_worker_says_that_its_job_is_retried_and_at_last_that_it_failed(published):
    job = work.enqueue(x=[1])
    for said in [["on_retry", "retry"]] * 2 + [["on_failure(WorkerLostError)", "failure"]]:
        claim_and_lapse(job)
        notes.clear()
        recover_lapsed()
        job.refresh_from_db()
        assert of(job) == said
    assert job.state == "failed"


def test_a_job_over_its_time_limit_says_that_it_failed(published):
    job = work.enqueue()
    claim_and_lapse(job, limit=0)
    transitions.renew(Job.objects.all())
    recover(Job.objects.all())
    assert of(job) == ["on_failure(TimeLimitExceeded)", "failure"]


def test_a_job_that_the_broker_refuses_says_that_it_failed(published):
    job = work.enqueue()
    republish.fail(job.pk, ValueError("too large"))
    assert of(job) == ["on_failure(ValueError)", "failure"]


@pytest.mark.parametrize("error", [WorkerLostError(), SystemExit(1), TimeLimitExceeded(1)])
def test_a_child_that_died_says_nothing_before_its_job_is_recovered(monkeypatch, published, error):
    monkeypatch.setattr(process, "is_prefork", True)
    recovered = Mock()
    monkeypatch.setattr(children, "recover_later", recovered)
    job = work.enqueue()
    headers, body = message_of(job).headers, ([], {}, {})
    message = Mock(headers=headers, payload=body, delivery_info={}, properties={})
    request = children.JobRequest(message, app=app)
    if isinstance(error, TimeLimitExceeded):
        request.on_timeout(False, 1)
    request.on_failure(SimpleNamespace(exception=error, traceback=""))
    assert not notes and recovered.called


@pytest.mark.parametrize("reuse", [None, 1000])
def test_a_job_costs_one_connection(monkeypatch, published, reuse):
    """Also with CONN_MAX_AGE = 0, and although Celery closes connections when a task starts and when it has ended."""
    opened, connect = [], BaseDatabaseWrapper.connect
    monkeypatch.setattr(
        BaseDatabaseWrapper, "connect", lambda self: opened.append(self) or connect(self)
    )
    monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", 0)
    fixup = DjangoWorkerFixup(app)
    fixup.db_reuse_max = reuse
    monkeypatch.setattr(app, "_fixups", [SimpleNamespace(worker_fixup=fixup), None])
    for signal in signals.task_prerun, signals.task_postrun:
        monkeypatch.setattr(signal, "receivers", [*signal.receivers])
    signals.task_prerun.connect(check_connections)
    signals.task_prerun.connect(fixup.on_task_prerun)
    signals.task_postrun.connect(fixup.on_task_postrun)
    startup.keep_connections(app)
    job = work.enqueue()
    connection.close()
    opened.clear()
    receive(work, message_of(job).headers)
    assert len(opened) == 1
    job.refresh_from_db()
    assert job.state == "succeeded"
