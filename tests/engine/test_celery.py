"""What Celery's documentation has for tasks, typed with jobs: it works, or is refused."""

import uuid
from datetime import UTC, date, datetime
from decimal import Decimal
from unittest.mock import Mock

import pytest
from celery import chain, chord, group, shared_task
from celery import current_app as app
from celery.backends.cache import CacheBackend
from celery.result import AsyncResult
from django.core.checks import run_checks
from test_jobs import CLAIM

from jobs.models import Job, publish
from jobs.tasks import JobError, JobTask

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask)
def add(x, y):
    return x + y


@shared_task(base=JobTask, bind=True)
def update(self):
    self.update_state(state="PROGRESS", meta={"done": 1})


@shared_task(base=JobTask)
def name_types(*args):
    return [type(arg).__name__ for arg in args]


@shared_task(base=JobTask, bind=True)
def come_back(self, *args):
    if not self.request.retries:
        raise self.retry()
    return [type(arg).__name__ for arg in args]


@shared_task(base=JobTask)
def enqueue_another():
    Job.objects.enqueue(add, [1, 2])


@shared_task(base=JobTask)
def blame(text):
    raise JobError(text)


@shared_task
def plain():
    pass


@shared_task
def fail():
    1 / 0  # noqa: B018


@pytest.fixture(params=[True, False], ids=["eager", "broker"])
def mode(request, eager):
    app.conf.task_always_eager = request.param
    yield
    app.conf.task_always_eager = True


@pytest.mark.parametrize(
    "send",
    [
        lambda: chord([plain.si(), plain.si()])(add.si(1, 2)),
        lambda: chord([plain.si(), add.si(1, 2)])(plain.si()),
        lambda: chain(add.si(1, 2), plain.si())(),
        lambda: chain(plain.si(), add.si(1, 2))(),
        lambda: chain(plain.si(), group(plain.si(), add.si(1, 2)))(),
        lambda: group(plain.si(), add.si(1, 2))(),
        lambda: plain.apply_async(link=add.si(1, 2)),
        lambda: plain.apply_async(link_error=[plain.si(), add.si(1, 2)]),
        lambda: plain.si().on_error(add.si(1, 2)).apply_async(),
        lambda: add.apply_async([1, 2], link=plain.si()),
    ],
)
def test_a_job_is_no_part_of_another_task(mode, send):
    with pytest.raises(TypeError, match="joins no group, chain or chord"):
        send()
    assert not Job.objects.exists()


def test_plain_tasks_are_combined_as_ever(mode):
    chord([plain.si(), plain.si()])(plain.si())
    plain.apply_async(link=plain.si(), link_error=plain.si())


def test_a_plain_task_is_sent_by_its_name():
    app.conf.task_always_eager = False
    assert app.send_task(plain.name).state == "PENDING"


def test_a_job_says_its_progress_with_report_only():
    job = Job.objects.enqueue(update)
    publish([job])
    job.refresh_from_db()
    assert "call self.report(" in job.error


def test_a_job_is_known_by_its_id_alone():
    job = Job.objects.enqueue(add, [1, 2])
    app.conf.task_always_eager = False
    for result in AsyncResult(str(job.pk)), app.AsyncResult(str(job.pk)):
        assert result.state == "PENDING"
    assert AsyncResult(str(uuid.uuid4())).state == "PENDING"
    app.conf.task_always_eager = True
    publish([job])
    for result in AsyncResult(str(job.pk)), app.AsyncResult(str(job.pk)):
        assert (result.state, result.get()) == ("SUCCESS", 3)


def test_who_waits_for_a_job_by_its_id_waits_for_its_row(monkeypatch):
    """Redis' backend, for one, would wait for a message that no job sends."""
    monkeypatch.setattr(CacheBackend, "wait_for_pending", Mock(), raising=False)
    job = Job.objects.enqueue(add, [1, 2])
    assert AsyncResult(str(job.pk)).get(timeout=10) == 3
    CacheBackend.wait_for_pending.assert_not_called()


def test_a_job_is_enqueued_by_the_name_of_its_task(run_jobs):
    result = app.send_task(add.name, [1, 2], countdown=60)
    assert Job.objects.get().args == [1, 2]
    run_jobs()
    assert result.get() == 3


TYPES = [datetime(2026, 1, 2, tzinfo=UTC), date(2026, 1, 2), uuid.UUID(int=1), Decimal("1.10")]


@pytest.mark.parametrize("task", [name_types, come_back])
def test_a_body_gets_the_types_that_celery_sends(run_jobs, task):
    job = Job.objects.enqueue(task, TYPES)
    run_jobs()
    job.refresh_from_db()
    again = job.run_again()
    run_jobs()
    again.refresh_from_db()
    assert job.result == again.result == ["datetime", "date", "UUID", "Decimal"], job.error


@pytest.mark.filterwarnings("error::RuntimeWarning")  # Celery's, of results in eager mode
def test_what_a_test_asks_for_is_there():
    assert add.delay(1, 2).get(timeout=10) == 3
    assert come_back.delay(1).get(timeout=10) == ["int"]


def test_what_a_body_enqueues_runs_too(run_jobs):
    Job.objects.enqueue(enqueue_another)
    run_jobs()
    assert list(Job.objects.values_list("state", flat=True)) == ["succeeded"] * 2


def test_a_broker_that_takes_nothing_keeps_no_test(run_jobs, broker_down):
    Job.objects.enqueue(add, [1, 2])
    run_jobs()
    assert Job.objects.get().state == "queued"


def test_a_plain_task_that_fails_fails_its_test():
    with pytest.raises(ZeroDivisionError):
        fail.delay()


@pytest.mark.parametrize(("state", "ends"), [("queued", True), ("running", False)])
def test_flower_sees_that_a_cancelled_job_ends(monkeypatch, state, ends):
    """A run drops its job in silence if another run has it: that one says how it ends."""
    sent = []
    monkeypatch.setattr(JobTask, "send_event", lambda self, name, **fields: sent.append(name))
    monkeypatch.setitem(app.conf, "worker_send_task_events", True)
    job = Job.objects.enqueue(add, [1, 2])
    if ends:
        Job.objects.filter(pk=job.pk).cancel()
    else:
        Job.objects.claim(id=job.pk, run=uuid.uuid4(), **CLAIM)
    publish([job])
    assert sent == (["task-revoked"] if ends else [])


def test_a_label_stays_with_its_job():
    """As much of it as its column holds: a file's name may be long."""
    jobs = Job.objects.enqueue_many(add, [[1, 2]], label="many" * 100)
    publish(jobs)
    jobs[0].refresh_from_db()
    assert jobs[0].label == jobs[0].run_again().label == "many" * 63 + "man"
    assert Job.objects.enqueue(add, [1, 2], label="one" * 100).label == "one" * 85


def test_an_owner_reads_what_a_job_error_says(api, user):
    for task, args, shown in [(blame, ["Row 17"], "Row 17"), (add, [1, "2"], "It failed")]:
        job = Job.objects.enqueue(task, args, owner=user, label="Import")
        publish([job])
        seen = api.get(f"/api/jobs/{job.pk}/").json()
        assert (seen["label"], seen["state"], seen["error"]) == ("Import", "failed", shown)


def test_staff_reads_what_an_exception_says(staff_api):
    job = Job.objects.enqueue(add, [1, "2"])
    publish([job])
    assert "TypeError" in staff_api.get(f"/api/jobs/{job.pk}/").json()["error"]


def found():
    return {message.id for message in run_checks() if message.id.startswith("jobs.")}


def test_a_queue_that_no_worker_takes_from_is_found(monkeypatch):
    assert found() == set()
    monkeypatch.setattr(add, "queue", "other", raising=False)
    assert found() == {"jobs.W005"}


def test_a_schedule_of_no_task_is_found(monkeypatch):
    entry = {"task": "no.such.task", "schedule": 60}
    monkeypatch.setitem(app.conf, "beat_schedule", {"daily": entry})
    assert found() == {"jobs.W006"}
