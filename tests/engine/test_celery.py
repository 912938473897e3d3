"""Calls from Celery's documentation, made with jobs: each one works or is refused."""

import uuid
from contextlib import suppress
from datetime import UTC, date, datetime
from decimal import Decimal
from unittest.mock import Mock

import pytest
from celery import chain, chord, group, shared_task
from celery import current_app as app
from celery.backends.cache import CacheBackend
from celery.contrib.django.task import DjangoTask
from celery.result import AsyncResult
from django.apps import apps
from django.core.checks import run_checks
from django.db import transaction
from test_jobs import CLAIM

from jobs import updates
from jobs.models import Job
from jobs.publish import publish
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
def retry_once(self, *args):
    if not self.request.retries:
        raise self.retry()
    return [type(arg).__name__ for arg in args]


@shared_task(base=JobTask)
def enqueue_another():
    Job.objects.enqueue(add, [1, 2])


@shared_task(base=JobTask)
def fail_with_text(text):
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
        lambda: add.map([1, 2]).apply_async(),
        lambda: add.starmap([(1, 2)]).delay(),
        lambda: add.chunks([(1, 2), (3, 4)], 1)(),
    ],
)
def test_a_job_is_refused_in_a_canvas_and_as_a_callback(mode, send):
    with pytest.raises(TypeError, match="part of a group, chain or chord"):
        send()
    assert not Job.objects.exists()


def test_plain_tasks_can_still_be_combined(mode):
    chord([plain.si(), plain.si()])(plain.si())
    plain.apply_async(link=plain.si(), link_error=plain.si())
    plain.starmap([()]).delay()
    plain.chunks([()], 1)()


def test_send_task_knows_the_tasks_of_celery_imports(monkeypatch, tmp_path):
    """In every process that Django has set up, as a worker does."""
    (tmp_path / "listed.py").write_text(
        "from celery import shared_task\nfrom jobs.tasks import JobTask\n"
        "@shared_task(base=JobTask)\ndef task():\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(app.loader, "default_modules", ("listed",))
    apps.get_app_config("jobs").ready()
    app.send_task("listed.task")
    assert Job.objects.get().task == "listed.task"


def test_send_task_sends_a_plain_task():
    app.conf.task_always_eager = False
    assert app.send_task(plain.name).state == "PENDING"


@pytest.fixture
def in_a_worker():
    """Run a task as a worker does that gets the message of another app, without our headers."""

    def run(task, *args, **options):
        options = {"task_id": str(uuid.uuid4()), **options}
        DjangoTask.apply(task, args, throw=True, **options)
        return Job.objects.get(pk=options["task_id"])

    return run


def test_a_message_that_another_app_has_sent_becomes_a_job(in_a_worker):
    job = in_a_worker(add, 1, 2)
    assert (job.task, job.args, job.state, job.result) == (add.name, [1, 2], "succeeded", 3)


def test_a_message_that_another_app_has_sent_twice_is_one_job(in_a_worker):
    job = in_a_worker(add, 1, 2)
    finished_at = job.finished_at
    in_a_worker(add, 3, 4, task_id=str(job.pk))
    job.refresh_from_db()
    assert (job.result, job.finished_at) == (3, finished_at)


def test_a_message_of_another_app_with_wrong_arguments_fails(in_a_worker):
    with pytest.raises(TypeError, match="missing 1 required"):
        in_a_worker(add, 1)
    assert not Job.objects.exists()


def test_a_task_that_is_called_has_no_row():
    assert add(1, 2) == 3
    assert not Job.objects.exists()


@pytest.mark.parametrize("revoke", [lambda pk: AsyncResult(pk).revoke(), app.control.revoke])
def test_a_revoke_cancels_a_job_although_no_worker_runs(mode, revoke):
    job, other = [Job.objects.enqueue(add, [1, 2]) for _ in range(2)]
    revoke(str(job.pk))
    assert list(Job.objects.filter(state="cancelled")) == [job]
    app.control.revoke([str(other.pk), "not a job"], terminate=True)
    assert Job.objects.filter(state="cancelled").count() == 2


def test_a_revoke_cancels_a_job_although_the_broker_is_down(monkeypatch):
    monkeypatch.setattr(app.control, "broadcast", Mock(side_effect=ConnectionError))
    job = Job.objects.enqueue(add, [1, 2])
    with pytest.raises(ConnectionError):
        AsyncResult(str(job.pk)).revoke()
    assert Job.objects.get().state == "cancelled"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "enqueue",
    [
        lambda: add.delay_on_commit(1, y=2),
        lambda: add.apply_async_on_commit([1], {"y": 2}, queue="celery"),
    ],
)
def test_on_commit_stores_a_job_in_the_transaction(enqueue):
    """A crash between the commit and an INSERT after it would lose the job."""
    with transaction.atomic():
        enqueue()
        assert Job.objects.get().state == "queued"
    assert Job.objects.get().result == 3
    with suppress(ZeroDivisionError), transaction.atomic():
        enqueue()
        1 / 0  # noqa: B018
    assert Job.objects.count() == 1


def test_update_state_is_refused_in_a_job():
    job = Job.objects.enqueue(update)
    publish([job])
    job.refresh_from_db()
    assert "call self.report(" in job.error


def test_an_async_result_finds_a_job_by_its_id():
    job = Job.objects.enqueue(add, [1, 2])
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
    job = Job.objects.enqueue(add, [1, 2])
    assert AsyncResult(str(job.pk)).get(timeout=10) == 3
    CacheBackend.wait_for_pending.assert_not_called()


def test_send_task_enqueues_a_job(run_jobs):
    result = app.send_task(add.name, [1, 2], countdown=60)
    assert Job.objects.get().args == [1, 2]
    run_jobs()
    assert result.get() == 3


TYPES = [datetime(2026, 1, 2, tzinfo=UTC), date(2026, 1, 2), uuid.UUID(int=1), Decimal("1.10")]


@pytest.mark.parametrize("task", [name_types, retry_once])
def test_a_body_gets_its_arguments_with_the_types_that_celery_keeps(run_jobs, task):
    job = Job.objects.enqueue(task, TYPES)
    run_jobs()
    job.refresh_from_db()
    again = job.run_again()
    run_jobs()
    again.refresh_from_db()
    assert job.result == again.result == ["datetime", "date", "UUID", "Decimal"], job.error


@pytest.mark.filterwarnings("error::RuntimeWarning")  # Celery's warning about results in eager mode
def test_get_returns_a_result_in_eager_mode():
    assert add.delay(1, 2).get(timeout=10) == 3
    assert retry_once.delay(1).get(timeout=10) == ["int"]


def test_run_jobs_also_runs_jobs_that_a_body_enqueues(run_jobs):
    Job.objects.enqueue(enqueue_another)
    run_jobs()
    assert list(Job.objects.values_list("state", flat=True)) == ["succeeded"] * 2


def test_run_jobs_returns_although_the_broker_is_down(run_jobs, broker_down):
    Job.objects.enqueue(add, [1, 2])
    run_jobs()
    assert Job.objects.get().state == "queued"


def test_an_error_of_a_plain_task_is_raised_in_eager_mode():
    with pytest.raises(ZeroDivisionError):
        fail.delay()


@pytest.mark.parametrize(("state", "ends"), [("queued", True), ("running", False)])
def test_flower_is_told_that_a_cancelled_job_has_ended(monkeypatch, state, ends):
    """If another run has the job, no event is sent: that run reports how the job ends."""
    sent = []
    monkeypatch.setattr(JobTask, "send_event", lambda self, name, **fields: sent.append(name))
    monkeypatch.setitem(app.conf, "worker_send_task_events", True)
    job = Job.objects.enqueue(add, [1, 2])
    if ends:
        Job.objects.filter(pk=job.pk).cancel()
    else:
        updates.claim(Job.objects, id=job.pk, run_token=uuid.uuid4(), **CLAIM)
    publish([job])
    assert sent == (["task-revoked"] if ends else [])


def test_a_label_is_kept_and_cut_to_its_column():
    """It is cut to the length of its column, because the name of a file may be long."""
    jobs = Job.objects.enqueue_many(add, [[1, 2]], label="many" * 100)
    publish(jobs)
    jobs[0].refresh_from_db()
    assert jobs[0].label == jobs[0].run_again().label == "many" * 63 + "man"
    assert Job.objects.enqueue(add, [1, 2], label="one" * 100).label == "one" * 85


def test_an_owner_reads_only_the_text_of_a_job_error(api, user):
    for task, args, shown in [(fail_with_text, ["Row 17"], "Row 17"), (add, [1, "2"], "It failed")]:
        job = Job.objects.enqueue(task, args, owner=user, label="Import")
        publish([job])
        seen = api.get(f"/api/jobs/{job.pk}/").json()
        assert (seen["label"], seen["state"], seen["error"]) == ("Import", "failed", shown)


def test_staff_reads_the_text_of_every_exception(staff_api):
    job = Job.objects.enqueue(add, [1, "2"])
    publish([job])
    assert "TypeError" in staff_api.get(f"/api/jobs/{job.pk}/").json()["error"]


def found_by_checks():
    return {message.id for message in run_checks() if message.id.startswith("jobs.")}


def test_the_checks_find_a_queue_without_workers(monkeypatch):
    assert found_by_checks() == set()
    monkeypatch.setattr(add, "queue", "other", raising=False)
    assert found_by_checks() == {"jobs.W005"}


def test_the_checks_find_a_rate_that_each_worker_counts_for_itself(monkeypatch):
    monkeypatch.setattr(app.tasks["test_celery.plain"], "rate_limit", "5/s")
    assert found_by_checks() == set()
    monkeypatch.setattr(add, "rate_limit", "5/s")
    assert found_by_checks() == {"jobs.W008"}
