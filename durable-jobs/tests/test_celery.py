"""Calls from Celery's documentation, made with jobs: each one works or is refused."""

import uuid
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from celery import Task, chain, chord, group, shared_task
from celery import current_app as app
from celery.contrib.django.task import DjangoTask
from celery.result import AsyncResult
from celery.schedules import crontab
from django.db import transaction
from django.utils import timezone
from helpers import add, deliver, echo, plain, receive, retry_once
from kombu.exceptions import EncodeError

from durable_jobs.actions import run_again
from durable_jobs.beat.entries import check_entry
from durable_jobs.celery import Celery
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from durable_jobs.publish import publish
from durable_jobs.tasks import JobTask, job

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask, bind=True)
def update(self):
    self.update_state(state="PROGRESS", meta={"done": 1})


@shared_task(base=JobTask)
def name_types(*args):
    return [type(arg).__name__ for arg in args]


@pytest.fixture(params=[True, False], ids=["eager", "broker"])
def mode(request):
    """How plain tasks are sent."""
    app.conf.task_always_eager = request.param


SOURCES = {
    "a module": lambda other, **conf: other.config_from_object(
        SimpleNamespace(**{f"CELERY_{name.upper()}": value for name, value in conf.items()}),
        namespace="CELERY",
    ),
    "update": lambda other, **conf: other.conf.update(conf),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_project_may_replace_the_defaults_of_jobs(source):
    other = Celery("other", set_as_current=False)
    SOURCES[source](other, broker_url="memory://", beat_scheduler="own:Scheduler")
    assert other.conf.broker_url == "memory://"
    assert other.conf.beat_scheduler == "own:Scheduler"
    assert other.conf.worker_consumer == "durable_jobs.worker.consumer:Consumer"
    other = Celery("other", set_as_current=False)
    SOURCES[source](other, worker_consumer="own:Consumer")
    assert other.conf.worker_consumer == "own:Consumer"
    assert other.conf.beat_scheduler == "celery_steady.beat:Scheduler"


def test_the_consumer_of_celery_steady_is_replaced_by_that_of_jobs():
    other = Celery("other", set_as_current=False)
    SOURCES["a module"](other, worker_consumer="celery_steady.consumer:Consumer")
    assert other.conf.worker_consumer == "durable_jobs.worker.consumer:Consumer"


def test_delay_enqueues_a_job():
    result = add.delay(1, y=2)
    [job] = Job.objects.all()
    assert (result.id, job.args, job.kwargs, job.owner) == (str(job.pk), [1], {"y": 2}, None)
    assert result.state == "PENDING"
    deliver(job)
    assert (result.state, add.AsyncResult(result.id).result) == ("SUCCESS", 3)
    assert [add.AsyncResult(pk).state for pk in ("another", str(uuid.uuid4()))] == ["PENDING"] * 2


def test_apply_async_accepts_options_that_a_job_supports():
    pk, eta = uuid.uuid4(), timezone.now() + timedelta(hours=1)
    add.apply_async([1, 2], task_id=str(pk), queue="cpu", countdown=60)
    add.s(1, 2).apply_async(eta=eta)
    first, second = Job.objects.order_by("send_at")
    assert (first.pk, first.queue, first.times_sent, second.times_sent) == (pk, "cpu", 0, 0)
    assert abs(second.send_at - eta) < timedelta(seconds=5)


@pytest.mark.parametrize("immutable", [False, True])
def test_a_signature_merges_arguments_and_options_as_celery_does(immutable):
    """Those of the call come first, as the results of a batch do. set() changes the signature."""
    call = (echo.si if immutable else echo.s)(1, x=2)
    assert call.set(queue="io") is call
    for send in call.enqueue, call.delay, lambda *args, **kw: call.apply_async(args, kw):
        send(3, x=4, y=5)
    celery = app.signature("echo", [1], {"x": 2}, immutable=immutable)
    celery = celery.clone([3], {"x": 4, "y": 5})
    stored = {"args": list(celery.args), "kwargs": celery.kwargs, "queue": "io"}
    assert list(Job.objects.values(*stored)) == [stored] * 3


def test_apply_async_refuses_an_id_that_is_no_uuid():
    with pytest.raises(ValueError, match="must be a UUID, not 'daily'"):
        add.apply_async([1, 2], task_id="daily")


@pytest.mark.parametrize(
    "send",
    [
        lambda: add.apply_async([1, 2], expires=5),
        lambda: add.apply_async([1, 2], link=add.s(3)),
        lambda: add.apply_async([1, 2], priority=5),
        lambda: add.apply_async([1, 2], MessageGroupId="customer"),
        lambda: add.apply_async([1, 2], time_limit=5),
        lambda: add.s(1, 2).apply_async(expires=5),
        lambda: add.signature((1, 2), priority=5).delay(),
    ],
)
def test_apply_async_refuses_options_that_a_job_does_not_support(send):
    with pytest.raises(TypeError, match="a job does not take|part of a chain"):
        send()
    assert not Job.objects.exists()


@pytest.mark.filterwarnings("ignore::celery.exceptions.CDeprecationWarning")
@pytest.mark.parametrize("option", ["before_start", "exchange", "expires", "routing_key"])
def test_a_task_with_an_attribute_that_jobs_do_not_support_is_refused(option):
    class Task(JobTask):
        name = "bad"

    setattr(Task, option, "5")
    with pytest.raises(TypeError, match=f"bad: a job cannot have {option}"):
        Task.bind(app)


def test_a_time_limit_of_0_is_refused():
    class Task(JobTask):
        name = "bad"
        time_limit = 0

    with pytest.raises(TypeError, match="bad: time_limit must be greater than 0"):
        Task.bind(app)


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
        lambda: add.apply_async([1, 2], link=plain.si()),
        lambda: (add.s(1, 2) | add.s(3))(),
        lambda: group(add.s(1, 2), add.s(3, 4))(),
        lambda: chain(add.s(1, 2), add.s(3))(),
        lambda: chord([add.s(1, 2)])(add.s()),
        lambda: chord([add.s(1, 2)], plain.s())(),
        lambda: add.map([1, 2]).apply_async(),
        lambda: add.starmap([(1, 2)]).delay(),
        lambda: add.chunks([(1, 2), (3, 4)], 1)(),
    ],
)
def test_a_job_is_refused_in_a_canvas_and_as_a_callback(mode, send):
    with pytest.raises((TypeError, EncodeError), match="part of a chain, group or chord"):
        send()
    assert not Job.objects.exists()


@pytest.mark.parametrize(
    "send",
    [
        lambda: plain.apply_async(link_error=[plain.si(), add.si(1, 2)]),
        lambda: plain.si().on_error(add.si(1, 2)).apply_async(),
    ],
)
def test_a_job_is_refused_as_the_callback_of_an_error(broker, send):
    with pytest.raises(EncodeError, match="part of a chain, group or chord"):
        send()


@shared_task(base=JobTask, bind=True, max_retries=2)
def try_twice(self, x):
    self.report(1, 2)
    if self.request.retries < 1:
        raise self.retry(countdown=60)
    return x, self.request.retries


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (lambda: add.apply([1], {"y": 2}), 3),
        (lambda: try_twice.apply([5], throw=False), (5, 1)),
    ],
)
def test_apply_runs_the_function_in_this_process_without_a_job(mode, call, result):
    assert call().get() == result
    assert not Job.objects.exists()


def test_apply_returns_the_error_of_the_function():
    result = add.apply([1, "a"], throw=False)
    assert (result.state, type(result.result)) == ("FAILURE", TypeError)


def test_plain_tasks_can_still_be_combined(mode):
    chord([plain.si(), plain.si()])(plain.si())
    plain.apply_async(link=plain.si(), link_error=plain.si())
    plain.starmap([()]).delay()
    plain.chunks([()], 1)()


def test_send_task_knows_the_tasks_of_celery_imports(monkeypatch, tmp_path):
    """In every process that Django has set up."""
    (tmp_path / "listed.py").write_text(
        "from celery import shared_task\nfrom durable_jobs.tasks import JobTask\n"
        "@shared_task(base=JobTask)\ndef task():\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(app.loader, "default_modules", ("listed",))
    monkeypatch.setattr(app.loader, "worker_initialized", False)
    app.send_task("listed.task")
    assert Job.objects.get().task == "listed.task"


def test_send_task_sends_a_plain_task(broker):
    assert app.send_task(plain.name).state == "PENDING"


def test_send_task_enqueues_a_job(run_jobs):
    result = app.send_task(add.name, [1, 2], countdown=60)
    assert Job.objects.get().args == [1, 2]
    run_jobs()
    assert result.get() == 3


TYPES = [datetime(2026, 1, 2, tzinfo=UTC), date(2026, 1, 2), uuid.UUID(int=1), Decimal("1.10")]


@pytest.mark.parametrize("task", [name_types, retry_once])
def test_a_task_function_gets_its_arguments_with_the_types_that_celery_keeps(run_jobs, task):
    job = enqueue(task, TYPES)
    run_jobs()
    job.refresh_from_db()
    again = run_again(job)
    run_jobs()
    again.refresh_from_db()
    assert job.result == again.result == ["datetime", "date", "UUID", "Decimal"], job.error


def test_update_state_is_refused_in_a_job():
    job = enqueue(update)
    publish([job])
    job.refresh_from_db()
    assert "call self.report(" in job.error


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


@pytest.mark.parametrize("signal", ["on_after_configure", "on_after_finalize"])
@pytest.mark.parametrize(
    ("call", "options"),
    [
        (add.s(1, y=2), {}),
        (add.si(1, y=2), {}),
        (add.s(1, y=2).set(queue="io"), {"queue": "io"}),
        (add.using(queue="io").s(1, y=2), {"queue": "io"}),
    ],
)
def test_a_job_is_scheduled_as_celery_documents_it(signal, call, options):
    other = Celery("other", set_as_current=False)

    def setup_periodic_tasks(sender, **kwargs):
        sender.add_periodic_task(crontab(hour=7), call, name="job")
        sender.add_periodic_task(60, plain.s())

    getattr(other, signal).connect(setup_periodic_tasks)
    other.finalize()
    other.close()  # otherwise it would get the shared tasks of later tests
    [first, second] = other.conf.beat_schedule.values()
    assert first["task"] == add.name and second["task"] == plain.name
    assert (first["args"], first["kwargs"], first["options"]) == ((1,), {"y": 2}, options)
    check_entry(*(first[name] for name in ("task", "args", "kwargs", "options")))


def test_an_error_of_a_handler_that_declares_periodic_tasks_is_logged(caplog):
    """Celery hides it, and its entry and all later ones of the handler would be missing without a word."""
    other = Celery("other", set_as_current=False)

    @other.on_after_finalize.connect
    def setup_periodic_tasks(sender, **kwargs):
        sender.add_periodic_task(60, chain(plain.s(), add.s(1, 2)))

    other.finalize()
    other.close()  # otherwise it would get the shared tasks of later tests
    [text] = [each.getMessage() for each in caplog.records if each.name == "durable_jobs.celery"]
    assert "setup_periodic_tasks() ended with TypeError" in text and "part of a chain" in text


# Base classes of a project


class Doubling(Task):
    """It prepares the arguments of each call, and changes its result."""

    abstract = True

    def __call__(self, x):
        self.id = self.request.id
        return [super().__call__(2 * int(x))]


class DoublingJob(Doubling, JobTask):
    abstract = True


class OnlyOnce(Task):
    def apply_async(self, *args, **kwargs):
        return super().apply_async(*args, **kwargs)


class WrongOrder(JobTask, Doubling):
    pass


@job(base=Doubling)
def mixed(self, x):
    return self.request.id, self.cursor, x


@job(base=DoublingJob)
def last(self, x):
    return self.request.id, self.cursor, x


@pytest.mark.parametrize("task", [mixed, last], ids=["added", "the last base"])
def test_the_call_of_a_base_class_runs_inside_its_job(task):
    stored = deliver(task.enqueue("4"))
    assert stored.result == [[str(stored.pk), None, 8]] and task.id == str(stored.pk)
    assert task(4) == [(None, None, 8)]
    failed = deliver(task.enqueue("four"))
    assert (failed.state, failed.error[:10]) == ("failed", "ValueError")


@pytest.mark.parametrize("base", [Task, DjangoTask, app.Task])
def test_a_base_class_of_celery_may_be_named(base):
    @job(base=base, name=f"of {base}")
    def of_celery(self):
        pass

    assert isinstance(app.tasks[of_celery.name], JobTask)


@pytest.mark.parametrize(
    ("base", "why"),
    [
        (WrongOrder, "JobTask must be the last base, as in class WrongOrder.Other, JobTask"),
        (OnlyOnce, "would not call your own apply_async.*before_task_publish"),
    ],
)
def test_a_base_class_whose_methods_would_not_be_called_is_refused(base, why):
    with pytest.raises(TypeError, match=why):
        job(base=base)


def test_a_function_without_self_is_refused():
    with pytest.raises(TypeError, match=r"the first parameter of .*ship\(\) must be self"):

        @job
        def ship(order_id):
            pass

    with pytest.raises(TypeError, match="must be self, the task"):
        job(lambda: None)

    @job(bind=False, name="without self")
    def without_self(x):
        return x

    assert deliver(without_self.enqueue(3)).result == 3


# A message of another app


@pytest.fixture
def in_a_worker(commit):
    """Run a task as a worker does that gets the message of another app, without our headers."""

    def run(task, *args, id=None, callbacks=()):
        id = id or str(uuid.uuid4())
        with commit():
            receive(task, {"id": id, "callbacks": callbacks}, args)
        return Job.objects.order_by("created_at").last()

    return run


def test_a_message_that_another_app_has_sent_becomes_a_job(in_a_worker):
    job = in_a_worker(add, 1, 2)
    assert (job.task, job.args, job.state, job.result) == (add.name, [1, 2], "succeeded", 3)


@pytest.mark.django_db(transaction=True)  # the second copy is an error of the database
def test_a_message_that_another_app_has_sent_twice_is_one_job(in_a_worker):
    job = in_a_worker(add, 1, 2)
    finished_at = job.finished_at
    in_a_worker(add, 3, 4, id=str(job.pk))
    job.refresh_from_db()
    assert (job.result, job.finished_at) == (3, finished_at)


def test_a_message_of_another_app_may_have_any_text_as_its_id(in_a_worker):
    assert in_a_worker(add, 1, 2, id="import-7").result == 3


def test_a_callback_that_another_app_gave_a_job_is_logged(in_a_worker, caplog):
    in_a_worker(add, 1, 2, callbacks=[plain.si()])
    assert "its callbacks will not run" in caplog.text


def test_a_message_of_another_app_with_wrong_arguments_fails(in_a_worker, caplog):
    assert in_a_worker(add, 1) is None
    assert "missing 1 required" in caplog.text


# Revoke


@pytest.mark.parametrize("revoke", [lambda pk: AsyncResult(pk).revoke(), app.control.revoke])
def test_a_revoke_cancels_a_job_although_no_worker_runs(mode, revoke):
    job, other = [enqueue(add, [1, 2]) for _ in range(2)]
    revoke(str(job.pk))
    assert list(Job.objects.filter(state="cancelled")) == [job]
    app.control.revoke([str(other.pk), "not a job"], terminate=True)
    assert Job.objects.filter(state="cancelled").count() == 2


def test_a_revoke_cancels_a_job_although_the_broker_is_down(monkeypatch):
    monkeypatch.setattr(app.control, "broadcast", Mock(side_effect=ConnectionError))
    job = enqueue(add, [1, 2])
    AsyncResult(str(job.pk)).revoke()  # so a view doesn't answer that it failed
    assert Job.objects.get().state == "cancelled"
    with pytest.raises(ConnectionError):
        AsyncResult(str(uuid.uuid4())).revoke()  # a plain task
