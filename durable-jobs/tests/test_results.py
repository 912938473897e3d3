"""AsyncResult reads the row of a job."""

import uuid
from unittest.mock import Mock

import pytest
from celery import current_app as app
from celery.backends.cache import CacheBackend
from celery.result import AsyncResult
from celery_steady import results
from helpers import add, finish, queries, run

from durable_jobs.celery import Celery
from durable_jobs.enqueue import enqueue
from durable_jobs.exceptions import JobError
from durable_jobs.models import Job
from durable_jobs.publish import publish

pytestmark = pytest.mark.django_db


class TwoTexts(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def test_an_async_result_finds_a_job_by_its_id():
    job = enqueue(add, [1, 2])
    for result in AsyncResult(str(job.pk)), app.AsyncResult(str(job.pk)):
        assert result.state == "PENDING"
    assert AsyncResult(str(uuid.uuid4())).state == "PENDING"
    publish([job])
    for result in AsyncResult(str(job.pk)), app.AsyncResult(str(job.pk)):
        assert (result.state, result.get()) == ("SUCCESS", 3)


def test_an_async_result_reads_progress_as_that_of_a_plain_task():
    seen = []

    def function(task):
        Job.objects.update(progress=25, message="Row 1")  # as report() stores it
        result = AsyncResult(task.request.id)
        seen.append((result.state, result.info))

    run(function)
    assert seen == [("PROGRESS", {"done": 25, "total": 100, "message": "Row 1"})]


@pytest.mark.parametrize(
    "error",
    [
        JobError("Row 7"),
        ValueError("no"),
        KeyError(3),
        Job.DoesNotExist("no row"),
        TwoTexts("a", "b"),
    ],
    ids=repr,
)
def test_get_raises_the_exception_of_the_job(error):
    def function(task):
        raise error

    result = AsyncResult(str(run(function).pk))
    with pytest.raises(Exception) as raised:
        result.get()
    expected = Exception if isinstance(error, TwoTexts) else type(error)  # as in Celery
    assert type(raised.value) is expected and str(error).strip("'") in str(raised.value)
    assert "in function" in result.traceback


def test_a_poll_of_a_plain_task_costs_one_query_by_primary_key():
    result = AsyncResult(str(uuid.uuid4()))
    [sql] = queries(lambda: result.state)
    assert "WHERE durable_jobs_job.id IN" in sql


def test_a_backend_that_celery_steady_has_replaced_reads_jobs_too(monkeypatch):
    other = Celery("other", set_as_current=False, backend="redis://localhost/1")
    results.prepare(other, None)
    assert isinstance(other.backend, results.KeepsResults)
    assert other.backend.connparams["db"] == 1
    result = add.delay(1, 2)
    assert other.AsyncResult(result.id).state == "PENDING"


@pytest.mark.filterwarnings("error::RuntimeWarning")  # Celery's, about results in eager mode
def test_get_waits_for_the_row_of_a_job(monkeypatch):
    """A result backend such as Redis would wait for a message that no job sends."""
    monkeypatch.setattr(CacheBackend, "wait_for_pending", Mock(), raising=False)
    job = enqueue(add, [1, 2])
    publish([job])
    assert AsyncResult(str(job.pk)).get(timeout=10) == 3
    CacheBackend.wait_for_pending.assert_not_called()


@pytest.mark.parametrize(
    ("state", "error", "expected"),
    [
        ("failed", "The broker refused it", ("FAILURE", "TaskError('The broker refused it')")),
        ("cancelled", "", ("REVOKED", "TaskRevokedError('')")),
    ],
)
def test_an_async_result_says_how_a_job_ended(state, error, expected):
    result = add.delay(1, 2)
    finish(Job.objects.all(), state, error=error)
    assert (result.state, repr(result.result)) == expected
