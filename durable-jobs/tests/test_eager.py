"""CELERY_TASK_ALWAYS_EAGER: jobs run in the process that enqueues them. run_jobs() does so in any test runner."""

from collections import Counter
from unittest.mock import Mock

import pytest
from celery import current_app as app
from celery import shared_task, signals
from celery.exceptions import TimeoutError
from celery.fixups.django import DjangoWorkerFixup
from celery.result import AsyncResult
from celery_steady import django
from django.db import connection, transaction
from helpers import add, alone, ask, free, plain, retry_once, total

from durable_jobs import batches, messages, pauses
from durable_jobs.eager import run_jobs
from durable_jobs.enqueue import enqueue_many
from durable_jobs.models import Job
from durable_jobs.tasks import JobTask
from durable_jobs.worker import lease

IS_EAGER = messages.is_eager


@pytest.fixture(autouse=True)
def no_worker(worker, monkeypatch):
    """Neither a broker nor a worker, and no thread that renews leases."""
    monkeypatch.setattr(messages, "send_one", Mock(side_effect=AssertionError))
    monkeypatch.setattr(lease, "start_thread", Mock(side_effect=AssertionError))


@pytest.fixture
def eager(transactional_db, monkeypatch):
    monkeypatch.setattr(messages, "is_eager", IS_EAGER)  # the plugin of pytest has replaced it


def ends():
    return list(Job.objects.order_by("created_at").values_list("state", "result"))


@shared_task(base=JobTask, bind=True)
def enqueue_others(self):
    free.enqueue(1)
    self.enqueue_next(free.s(2))


@shared_task(base=JobTask)
def fail():
    1 / 0  # noqa: B018


def test_delay_runs_a_job_immediately(eager):
    assert add.delay(1, 2).get(timeout=1) == 3


@pytest.mark.parametrize("prepared", [False, True], ids=["web", "worker"])
def test_delay_keeps_the_connection_from_which_its_caller_reads(eager, prepared):
    add.delay(1, 2)
    connection.close_at, raw = 0, connection.connection  # as CONN_MAX_AGE = 0 does
    if prepared:
        signals.task_prerun.connect(django.check_connections)
    add.delay(1, 2)
    plain.apply()
    signals.task_prerun.disconnect(django.check_connections)
    assert connection.connection is raw


def test_a_job_runs_when_its_transaction_commits(eager):
    with transaction.atomic():
        job = add.enqueue(1, 2)
        assert ends() == [("queued", None)]
    assert AsyncResult(str(job.pk)).get(timeout=1) == 3
    with pytest.raises(KeyError), transaction.atomic():
        add.enqueue(3, 4)
        raise KeyError
    assert len(ends()) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: free.using(countdown=60).enqueue(),
        lambda: enqueue_many([free.using(countdown=60).s(0)] * 2),
        lambda: enqueue_many([alone.s(0)] * 3),
        lambda: enqueue_many([ask.s(0)] * 6),
        lambda: retry_once.enqueue(),
        lambda: enqueue_others.enqueue(),
        lambda: batches.enqueue([free.s(1), free.s(2)], on_success=total.s()),
    ],
    ids="countdown countdowns limit rate retry others batch".split(),
)
def test_an_eager_job_waits_for_nothing(eager, call):
    call()
    assert {state for state, _ in ends()} == {"succeeded"}


def test_the_error_of_an_eager_job_is_in_its_row(eager):
    result = fail.delay()
    assert Job.objects.get().error == "ZeroDivisionError: division by zero"
    assert result.state == "FAILURE"


def test_a_paused_job_stays_queued(eager):
    pauses.pause("celery")
    with pytest.raises(TimeoutError):
        free.delay().get(timeout=0.1)


@pytest.mark.django_db
@pytest.mark.parametrize("task", [free, retry_once])
def test_run_jobs_keeps_the_connection_of_a_test(task):
    """A worker that ran in this process has connected its receivers, which close connections."""
    fixup, receivers = DjangoWorkerFixup(app), [django.check_connections]
    receivers += [fixup.on_task_prerun, fixup.on_task_postrun]
    signals.task_prerun.connect(receivers[0])
    signals.task_prerun.connect(receivers[1])
    signals.task_postrun.connect(receivers[2])
    try:
        task.enqueue()
        run_jobs()
    finally:
        for receiver in receivers:
            signals.task_prerun.disconnect(receiver)
            signals.task_postrun.disconnect(receiver)
    assert [state for state, _ in ends()] == ["succeeded"]


@pytest.mark.django_db
def test_run_jobs_needs_no_pytest():
    enqueue_many([alone.using(countdown=60).s(*args) for args in [[1], [2]]])
    chosen = free.enqueue(3)
    run_jobs(Job.objects.filter(pk=chosen.pk))
    assert ends() == [("queued", None)] * 2 + [("succeeded", 3)]
    enqueue_others.enqueue()
    run_jobs()
    assert Counter(result for _, result in ends()) == Counter([1, 2, 3, None, 1, 2])
