"""AsyncResult and GroupResult read rows: of a job, and of steps that are not stored yet."""

import pickle
import uuid
from unittest.mock import Mock

import pytest
from celery import chain, chord, group, shared_task
from celery import current_app as app
from celery.backends.cache import CacheBackend
from celery.exceptions import TaskError, TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult, result_from_tuple
from django.db import connection
from django.test.utils import CaptureQueriesContext
from helpers import act, add, echo, retry_once, total

from durable_jobs import batches, transitions
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Batch, Job
from durable_jobs.publish import publish
from durable_jobs.tasks import JobError, JobTask

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask)
def fail(*args):
    raise JobError("no")


def test_an_async_result_finds_a_job_by_its_id():
    job = enqueue(add, [1, 2])
    app.conf.task_always_eager = False
    for result in AsyncResult(str(job.pk)), app.AsyncResult(str(job.pk)):
        assert result.state == "PENDING"
    assert AsyncResult(str(uuid.uuid4())).state == "PENDING"
    app.conf.task_always_eager = True
    publish([job])
    for result in AsyncResult(str(job.pk)), app.AsyncResult(str(job.pk)):
        assert (result.state, result.get()) == ("SUCCESS", 3)


def test_get_waits_for_the_row_of_a_job(monkeypatch):
    """A result backend such as Redis would wait for a message that no job sends."""
    monkeypatch.setattr(CacheBackend, "wait_for_pending", Mock(), raising=False)
    job = enqueue(add, [1, 2])
    assert AsyncResult(str(job.pk)).get(timeout=10) == 3
    CacheBackend.wait_for_pending.assert_not_called()


@pytest.mark.filterwarnings("error::RuntimeWarning")  # Celery's warning about results in eager mode
def test_get_returns_a_result_in_eager_mode():
    assert add.delay(1, 2).get(timeout=10) == 3
    assert retry_once.delay(1).get(timeout=10) == ["int"]


@pytest.mark.parametrize(
    ("state", "error", "expected"),
    [
        ("failed", "ValueError: no", ("FAILURE", "TaskError('ValueError: no')")),
        ("cancelled", "", ("REVOKED", "TaskRevokedError('')")),
    ],
)
def test_an_async_result_says_how_a_job_ended(state, error, expected):
    result = add.delay(1, 2)
    transitions.finish(Job.objects.all(), state, error=error)
    assert (result.state, repr(result.result)) == expected


# Of a canvas. Celery's result backends know only ids.


# How each result sees the canvas: Celery's result backends know only ids.
VIEWS = {
    "as returned": lambda result: result,
    "pickled": lambda result: pickle.loads(pickle.dumps(result)),
    "as tuple": lambda result: result_from_tuple(result.as_tuple()),
}


@pytest.fixture(params=VIEWS.values(), ids=VIEWS)
def view(request, monkeypatch):
    """A result that reads rows, though Celery's result backend waits for messages."""
    monkeypatch.setattr(CacheBackend, "wait_for_pending", Mock(), raising=False)
    yield request.param
    CacheBackend.wait_for_pending.assert_not_called()


def test_get_returns_the_value_of_a_step_that_is_not_stored(view):
    assert view(chain(add.s(1, 1), add.s(1), add.s(1))()).get() == 4
    assert view(chord([add.s(1, 1), chain(add.s(2, 2), add.s(1))])(total.s())).get() == 7


@pytest.mark.parametrize(
    "send",
    [
        lambda: chain(add.s(1, 1), add.s(1), add.s(1))(),
        lambda: chord([chain(add.s(2, 2), add.s(1)), add.s(1, 1)])(total.s()),
        lambda: chord([chord([add.s(1, 1)], total.s())])(total.s()),
        lambda: group(chain(add.s(2, 2), add.s(1)), add.s(1, 1))(),
    ],
)
def test_get_polls_the_rows_of_a_step_that_is_not_stored(view, no_eager, send):
    """A result backend such as Redis would wait for a message that no job sends."""
    with pytest.raises(CeleryTimeout):
        view(send()).get(timeout=0.01, interval=0.01)


def test_get_of_an_id_runs_what_comes_first(view):
    """A view stores the id, and a test of the view has nothing else."""
    pk = chord([add.s(1, 1), chain(add.s(2, 2), add.s(1))])(total.s()).id
    assert AsyncResult(pk).get() == 7
    assert add.AsyncResult(pk).ready()


@pytest.mark.parametrize(
    "send",
    [
        lambda: (add.s(1, 1) | fail.s() | add.s(1) | add.s(1))(),
        lambda: chord([add.s(1, 1), fail.s(), add.s(2, 2)])(total.s()),
        lambda: chord([add.s(1, 1), fail.s(), add.s(2, 2)])(total.s() | add.s(1)),
        lambda: (fail.s() | group(add.s(1), add.s(2)) | total.s())(),
        lambda: (group(fail.s(), fail.s()) | total.s() | group(add.s(1), add.s(2)))(),
    ],
)
def test_get_raises_the_error_of_an_earlier_step(view, send):
    with pytest.raises(TaskError, match="^no$"):
        view(send()).get(interval=0)


@pytest.mark.parametrize(
    "send",
    [
        lambda: chain(fail.s(), add.s(1), add.s(1))(),
        lambda: chord([add.s(1, 1), fail.s()])(total.s()),
        lambda: chord([add.s(1, 1), chain(fail.s(), add.s(1))])(total.s()),
        lambda: chord([add.s(1, 1), chord([fail.s()], total.s())])(total.s()),
        lambda: chord([chord([chain(fail.s(), add.s(1))], total.s() | add.s(1))])(total.s()),
    ],
)
def test_get_does_not_wait_for_what_never_starts(send):
    with pytest.raises((TaskError, TaskRevokedError), match="no"):
        send().get(interval=0)
    result = send()
    with pytest.raises(TaskRevokedError, match="It never starts: the (job|batch) .+ is failed. "):
        result.get(interval=0, follow_parents=False)
    result = send()
    assert isinstance(result.get(interval=0, propagate=False), TaskRevokedError)
    assert (result.state, result.ready(), result.successful()) == ("REVOKED", True, False)


def test_get_does_not_wait_for_the_body_of_a_cancelled_batch(no_eager):
    last = chord([add.s(1, 1), add.s(2, 2)])(total.s())
    assert not last.ready()
    batches.cancel(Batch.objects.get())
    with pytest.raises(TaskRevokedError, match="the batch .+ is cancelled"):
        last.get(follow_parents=False)


def test_get_does_not_wait_for_a_body_after_a_sibling_failed():
    """The header of the chord has all results, but its batch has one more job."""
    act.body = lambda self: batches.add(self.batch, fail) and None
    last = chord([add.s(1, 1), act.si()])(echo.s())
    with pytest.raises(TaskRevokedError, match="the batch .+ is failed. 1 failed of 3"):
        last.get(interval=0)


def test_a_group_of_which_one_fails():
    done = group(add.s(1, 1), chain(fail.s(), add.s(1)), fail.s())()
    with pytest.raises((TaskError, TaskRevokedError), match="no"):
        done.get(interval=0)
    values = done.get(propagate=False)
    assert [type(value) for value in values] == [int, TaskRevokedError, TaskError]
    assert (done.failed(), done.successful(), done.completed_count()) == (True, False, 1)


def test_a_chain_of_hundreds():
    last = chain([add.s(1, 1), *[add.s(1)] * 100])()
    with CaptureQueriesContext(connection) as queries:
        app.conf.task_always_eager = False
        assert not last.ready()
        with pytest.raises(CeleryTimeout):
            last.get(timeout=0)
    assert len(queries) < 20
    app.conf.task_always_eager = True
    assert last.get() == 102
