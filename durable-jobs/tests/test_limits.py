"""Limits: which key a job has, however it is enqueued, and which settings are valid."""

import sys
import uuid
from datetime import timedelta
from decimal import Decimal
from functools import wraps
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from asgiref.sync import async_to_sync
from celery import current_app, shared_task
from celery.beat import ScheduleEntry, Scheduler
from django.apps import apps
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db.models import F
from django.utils import timezone
from helpers import alone, ask, call, end, finish, free, receive, run_of, start, sweeper

from durable_jobs import admission, batches, limits
from durable_jobs.actions import run_again, run_all_again
from durable_jobs.api.views import EnqueueMixin
from durable_jobs.beat.schedule import OncePerDueTime
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.models import Job, Key
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db


@shared_task(
    base=JobTask, bind=True, limit=lambda tenant, **_: f"tenant:{tenant}", autoretry_for=(OSError,)
)
def bound_call(self, tenant, number=0):
    return number


@shared_task(base=JobTask, limit=lambda tenant, **_: f"tenant:{tenant}")
async def async_call(tenant, number=0):
    return number


@shared_task(base=JobTask, limit=lambda row, number=0: f"tenant:{row['tenant']}:{number}")
def import_row(row, number=0):
    return row


# Each way to enqueue a job


def in_view():
    view = EnqueueMixin()
    view.request, view.job_id = SimpleNamespace(user=None, headers={}), uuid.uuid4()
    view.enqueue(call.s(7))


def in_open_batch():
    with batches.open_batch() as batch:
        batches.add(batch, call.s(7))


def start_any(job):
    run = run_of(job if isinstance(job, Job) else Job.objects.get(task=free.name))
    assert run.claim()
    return run


def with_next():
    run = start_any(free.enqueue())
    run.next_jobs.append(batches.planned(call.s(7)))
    end(run)


def by_beat():
    beat = SimpleNamespace(app=current_app, scheduler=Scheduler(current_app, lazy=True))
    entry = ScheduleEntry("call", call.name, schedule=timedelta(hours=1), args=[7], app=current_app)
    with patch("durable_jobs.beat.schedule.close_old_connections"):
        OncePerDueTime(beat).apply_async(entry)


def fail_and_run_again(again):
    job = call.enqueue(7)
    finish(Job.objects.filter(pk=job.pk), "failed")
    again(Job.objects.get(pk=job.pk))


def batch_again():
    batch = batches.enqueue([call.s(7)])
    finish(batch.jobs.all(), "failed")
    batches.end(batch.pk)
    batches.run_failed_again(batch)


DOORS = {
    "delay": lambda: call.delay(7),
    "keyword": lambda: call.delay(tenant=7),
    "apply_async": lambda: call.apply_async((7,)),
    "delay_on_commit": lambda: call.delay_on_commit(7),
    "signature": lambda: call.s(7).delay(),
    "countdown": lambda: call.apply_async((7,), countdown=60),
    "eta": lambda: call.using(eta=timezone.now() + timedelta(hours=1)).enqueue(7),
    "using": lambda: call.using(label="x", queue="io").enqueue(7),
    "aenqueue": lambda: async_to_sync(call.aenqueue)(7),
    "unique": lambda: enqueue(call, [7], unique="x", idempotency_key="y"),
    "enqueue_many": lambda: enqueue_many([call.s(7)]),
    "bound": lambda: bound_call.delay(7),
    "async": lambda: async_call.delay(7),
    "send_task": lambda: current_app.send_task(call.name, [7]),
    "Beat": by_beat,
    "EnqueueMixin": in_view,
    "run_again": lambda: fail_and_run_again(lambda job: run_again(job)),
    "queryset": lambda: fail_and_run_again(lambda job: run_all_again(Job.objects.all())),
    "batch": lambda: batches.enqueue([call.s(7)]),
    "Batch.enqueue": in_open_batch,
    "run_failed_again": batch_again,
    "enqueue_next": with_next,
}


@pytest.mark.parametrize("door", DOORS)
def test_each_way_to_enqueue_a_job_obeys_its_limit(sent, door):
    DOORS[door]()
    job = Job.objects.exclude(limit_key=None).get()
    assert (job.limit_key, job.blocked_by, job.send_at) == ("tenant:7", "tenant:7", None)
    assert (job.times_sent, job.state) == (0, "queued")


def test_a_message_of_an_app_that_does_not_know_the_job_obeys_its_limit(sent, commit, settings):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {
        "LIMITS": {**settings.DURABLE_JOBS["LIMITS"], "tenant": "1, 5/h"}
    }
    first, blocked = str(uuid.uuid4()), str(uuid.uuid4())
    for id in first, blocked:
        with commit():
            assert receive(call, {"id": id}, [7]).info.state == "IGNORED"
    assert [str(pk) for pk in sent] == [first]
    assert Job.objects.get(pk=blocked).blocked_by == "tenant:7"
    assert Key.objects.get().key == "tenant:7"


def test_jobs_run_in_tests_whatever_their_limits_say(run_jobs):
    enqueue_many([ask.s(number) for number in range(10)])
    run_jobs()
    assert Job.objects.filter(state="succeeded").count() == 10


# A limit that was added, changed or removed since


@pytest.mark.parametrize(
    "limit, key",
    [(None, None), ("one", "one"), (lambda number=0, **_: f"tenant:{number}", "tenant:0")],
)
def test_a_job_runs_again_with_the_limit_that_its_task_has_now(sent, monkeypatch, limit, key):
    jobs = [call.enqueue(7), call.enqueue(8)]
    finish(Job.objects.all(), "failed")
    monkeypatch.setattr(current_app.tasks[call.name], "limit", limit)
    run_again(Job.objects.get(pk=jobs[0].pk))
    run_all_again(Job.objects.filter(pk=jobs[1].pk))
    assert set(Job.objects.values_list("limit_key", "blocked_by")) == {(key, key)}


def test_a_job_that_had_no_limit_runs_again_with_one(sent, monkeypatch):
    job = free.enqueue()
    finish(Job.objects.all(), "failed")
    monkeypatch.setattr(current_app.tasks[free.name], "limit", "one")
    run_again(Job.objects.get(pk=job.pk))
    assert Job.objects.get().blocked_by == "one"


def test_a_queryset_runs_the_others_again_if_the_key_of_one_has_no_value(sent, monkeypatch):
    _, second = call.enqueue(7), call.enqueue(8)
    finish(Job.objects.all(), "failed")
    monkeypatch.setattr(
        current_app.tasks[call.name], "limit", lambda tenant, **_: {8: "tenant:8"}[tenant]
    )
    assert run_all_again(Job.objects.all()) == [second]


def test_the_key_of_a_callback_cannot_depend_on_results():
    with pytest.raises(ValueError, match="missing 1 required positional argument: 'tenant'"):
        batches.enqueue([free.s(1)], on_success=call.s())
    batches.enqueue([free.s(1)], on_success=import_row.si({"tenant": 1}))


def test_no_job_of_a_removed_limit_starts_and_a_check_counts_them(sent, commit, settings):
    """Here or in another process with older settings, as in a deploy."""
    with commit():
        jobs = enqueue_many([alone.s(number) for number in range(3)])
    run = start(jobs[0])
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"tenant": "2"}}
    Job.objects.filter(pk=jobs[1].pk).update(due_at=F("due_at") - timedelta(days=1))
    with commit():
        end(run)
    admission.admit(["one"])
    sweeper.sender.send_due()
    assert sent == [jobs[0].pk]
    call.enqueue(7)
    [warning] = run_checks(databases=["default"], tags=["database"])
    assert warning.id == "durable_jobs.W009" and warning.msg.startswith(
        "2 jobs wait for the limit 'one'"
    )


# Keys


ID = uuid.UUID(int=7)


@pytest.mark.parametrize(
    "value, text",
    [(7, "7"), ("é", "é"), (None, "None"), (True, "True"), (ID, str(ID)), (1.5, "1.5"),
     (Decimal("1.50"), "1.50")],
)  # fmt: skip
def test_a_key_is_the_same_when_the_job_runs_again(sent, value, text):
    job = call.enqueue(value)
    assert job.limit_key == f"tenant:{text}"
    finish(Job.objects.all(), "failed")
    run_again(Job.objects.get())
    assert Job.objects.get().limit_key == f"tenant:{text}"


@pytest.mark.parametrize(
    "args, kwargs, key",
    [([{"tenant": 1}], {}, "tenant:1:0"), ([{"tenant": 1}, 5], {}, "tenant:1:5"),
     ([], {"row": {"tenant": 1}, "number": 6}, "tenant:1:6")],
)  # fmt: skip
def test_a_function_gets_the_arguments_by_name(args, kwargs, key):
    assert enqueue(import_row, args, kwargs).limit_key == key


@pytest.mark.parametrize(
    "row",
    [{"tenant": "x" * 250}, {"tenant": "7,api"}, {"tenant": "7 8"}, {"tenant": "7\n"}, {}, None],
)
def test_a_key_that_cannot_be_made_is_refused(row):
    with pytest.raises(ValueError, match="the limit of test_limits.import_row: "):
        import_row.delay(row)
    assert not Job.objects.exists()


def test_a_function_may_give_no_key_and_only_one_of_a_known_limit(monkeypatch):
    for given in 7, "", "unknown:7", "tenant:\0", "tenant:\ud800":
        monkeypatch.setattr(current_app.tasks[free.name], "limit", lambda given=given: given)
        with pytest.raises(ValueError, match="the limit of helpers.free: "):
            free.enqueue()
    monkeypatch.setattr(current_app.tasks[free.name], "limit", lambda: None)
    assert free.enqueue().limit_key is None


def decorator(function):
    @wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def async_decorator(function):
    @wraps(function)
    async def wrapper(*args, **kwargs):
        return await function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("decorator", [decorator, async_decorator])
@pytest.mark.parametrize("bind", [True, False])
def test_the_limit_of_a_decorated_function_gets_its_arguments(bind, decorator):
    def of_self(self, tenant, number=0): ...

    def of_none(tenant, number=0): ...

    async def async_of_self(self, tenant, number=0): ...

    async def async_of_none(tenant, number=0): ...

    if decorator is async_decorator:
        of_self, of_none = async_of_self, async_of_none
    function = decorator(of_self if bind else of_none)
    options = {"name": f"decorated {bind}", "limit": lambda tenant, **_: f"tenant:{tenant}"}
    task = shared_task(function, base=JobTask, bind=bind, **options)
    try:
        assert (
            enqueue(task, [7]).limit_key == enqueue(task, [], {"tenant": 7}).limit_key == "tenant:7"
        )
    finally:
        current_app.tasks.unregister(task.name)


def test_no_annotation_is_evaluated():
    """It may name what only type checkers import."""
    # Before 3.14, Python itself evaluates an annotation at once, unless it is a text.
    missing, names = "Missing" if sys.version_info >= (3, 14) else "'Missing'", {}
    exec(f"def typed(tenant: {missing}) -> {missing}: pass", names)  # noqa: S102
    typed = names["typed"]
    limit = lambda tenant: f"tenant:{tenant}"  # noqa: E731
    task = current_app.task(typed, base=JobTask, name="typed", limit=limit)
    try:
        assert task.enqueue(7).limit_key == "tenant:7"
    finally:
        current_app.tasks.pop("typed", None)


# Settings


GOOD = {
    5: (5, float("inf"), 0),
    "5": (5, float("inf"), 0),
    "60/min": (float("inf"), 60, 60),
    "5, 60/min": (5, 60, 60),
    " 60 / minutes ,5": (5, 60, 60),
    "3/s": (float("inf"), 3, 1),
    "3/10secs": (float("inf"), 3, 10),
    "2/h": (float("inf"), 2, 3600),
    "2/2days": (float("inf"), 2, 2 * 86400),
}


@pytest.mark.parametrize("text", GOOD, ids=repr)
def test_a_limit_is_read(settings, text):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"openai": text}}
    limit = limits.limit_of("openai:7")
    assert (limit.running, limit.starts, limit.period.total_seconds()) == GOOD[text]


BAD = ["0", "-1", "5/", "60/month", "5,6", "5 /min, 3/h", 2.5, None, True, "", ",", "/min", "0/min",
       "5/0min", "5/-1min", "1e3", "five", "5/ms", "5/hs", "5/min/h", "5,", "9" * 20,
       "5/" + "9" * 20 + "d", [5], "5 per min"]  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=repr)
def test_a_wrong_limit_is_refused_at_the_start(settings, text):
    """Workers and Beat do not stop for a failed check. Beat could then not admit any job."""
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"openai": text}}
    with pytest.raises(
        ImproperlyConfigured, match="LIMITS'\\]\\['openai'\\]: .* is not a valid limit"
    ):
        apps.get_app_config("durable_jobs").ready()


@pytest.mark.parametrize("limit", ["other", "", "one two", 7])
def test_a_wrong_limit_of_a_task_is_an_error_of_the_checks(monkeypatch, limit):
    monkeypatch.setattr(current_app.tasks[alone.name], "limit", limit)
    [error] = run_checks()
    assert error.id == "durable_jobs.E006" and error.msg.startswith("helpers.alone: ")
