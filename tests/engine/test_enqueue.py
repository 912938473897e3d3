"""Each way to enqueue a job takes the same options, with the same meaning."""

import uuid
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
from asgiref.sync import async_to_sync
from celery import shared_task
from django.db import IntegrityError, transaction
from django.utils import timezone

from jobs.models import Job
from jobs.tasks import JobTask
from jobs.views import EnqueueMixin

try:
    from django.tasks import task
except ImportError:  # Django 5.2
    from django_tasks import task

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask)
def double(n):
    return 2 * n


@task
def half(n):
    return n / 2


def enqueue_in_view(user, options):
    view = EnqueueMixin()
    view.request, view.job_id = SimpleNamespace(user=user, headers={}), uuid.uuid4()
    return view.enqueue(double, [8], **options)


def enqueue_with_django(options, door):
    return Job.objects.get(pk=door(half.using(**options))(8).id)


DOORS = {
    "enqueue": lambda user, options: Job.objects.enqueue(double, [8], **options),
    "aenqueue": lambda user, options: async_to_sync(Job.objects.aenqueue)(double, [8], **options),
    "enqueue_many": lambda user, options: Job.objects.enqueue_many(double, [[8]], **options)[0],
    "EnqueueMixin": enqueue_in_view,
    "JobTask": lambda user, options: double.using(**options).enqueue(8),
    "async JobTask": lambda user, options: async_to_sync(double.using(**options).aenqueue)(8),
    "Django": lambda user, options: enqueue_with_django(options, lambda task: task.enqueue),
    "async Django": lambda user, options: enqueue_with_django(
        options, lambda task: async_to_sync(task.aenqueue)
    ),
}
LATER = timezone.now() + timedelta(hours=1)
OPTIONS = {
    "owner": None,  # the user of the test
    "label": "March",
    "queue": "cpu",
    "countdown": 3600,
    "eta": LATER,
    "unique": "one",
    "idempotency_key": "two",
}
NOT_TAKEN = {
    "enqueue_many": ["unique", "idempotency_key"],
    "EnqueueMixin": ["owner", "unique", "idempotency_key"],
}


@pytest.fixture(params=DOORS)
def door(request):
    return request.param


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_in_the_row(door, option, user):
    options = {option: OPTIONS[option] or user}
    if option in NOT_TAKEN.get(door, []):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            DOORS[door](user, options)
        return
    job = DOORS[door](user, options)
    job.refresh_from_db()
    owner = user if option == "owner" or door == "EnqueueMixin" else None
    assert (job.args, job.kwargs, job.state, job.owner) == ([8], {}, "queued", owner)
    assert job.label == options.get("label", "")
    assert job.queue == options.get("queue", "celery")
    assert (job.unique_key, job.idempotency_key) == (
        options.get("unique"),
        options.get("idempotency_key"),
    )
    is_late = option in ("countdown", "eta")
    assert job.times_sent == (0 if is_late else 1)
    # LATER is an hour after this file was imported, and all tests together take minutes.
    due_at = LATER if option == "eta" else job.created_at + timedelta(hours=is_late)
    assert abs(job.due_at - due_at) < timedelta(seconds=60)


def test_a_time_without_a_zone_is_utc(door, user, settings):
    """As in Celery, whatever the time zones of Celery and Django are."""
    settings.TIME_ZONE = "Asia/Tokyo"
    job = DOORS[door](user, {"eta": LATER.replace(tzinfo=None)})
    job.refresh_from_db()
    assert abs(job.due_at - LATER) < timedelta(seconds=60)


def test_two_times_are_refused(door, user):
    """Celery documents the same of apply_async(), and silently takes the countdown."""
    with pytest.raises(TypeError, match="give .*eta.*countdown|give countdown= or eta=, not both"):
        DOORS[door](user, {"countdown": 1, "eta": LATER})
    with pytest.raises(TypeError, match="give countdown= or eta=, not both"):
        double.apply_async([8], countdown=1, eta=LATER)
    assert not Job.objects.exists()


def test_an_unknown_option_is_refused(door, user):
    with pytest.raises(TypeError, match="unexpected keyword argument 'ownr'"):
        DOORS[door](user, {"ownr": user})


@pytest.mark.parametrize("task", [double, half], ids=["Celery", "Django"])
def test_using_refuses_an_unknown_option_when_it_is_called(task):
    with pytest.raises(TypeError, match="unexpected keyword argument 'ownr'"):
        task.using(ownr=1)


@pytest.mark.parametrize(
    "options",
    [
        {"queue": "cpu", "queue_name": "cpu"},
        {"eta": LATER, "run_after": LATER},
        {"countdown": 0, "run_after": LATER},
        {"countdown": 0, "eta": LATER},
    ],
)
def test_a_word_of_django_and_its_twin_are_refused(options):
    with pytest.raises(TypeError, match=" and | or ") as caught:
        half.using(**options)
    for word in options:
        assert f"{word}=" in str(caught.value)


def test_a_copy_of_a_task_of_django_keeps_its_options_until_they_are_replaced(user):
    march = half.using(owner=user, label="March", queue="cpu", countdown=60)
    april = march.using(label="April", eta=LATER)
    assert (april.owner, april.label, april.queue_name) == (user, "April", "cpu")
    assert (april.run_after, april.countdown) == (LATER, None)
    soon = april.using(countdown=60)
    assert (soon.run_after, soon.countdown, soon.label) == (None, 60, "April")
    assert (half.owner, half.label, half.countdown) == (None, "", None)


@pytest.mark.parametrize("name", ["aenqueue", "async JobTask", "async Django"])
def test_a_coroutine_enqueues_in_the_transaction_of_its_caller(name, user, commit):
    with commit() as callbacks:
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            DOORS[name](user, {})
            raise ZeroDivisionError
        assert not Job.objects.exists()
        with transaction.atomic():
            DOORS[name](user, {})
    assert Job.objects.get().state == "succeeded" and len(callbacks) == 1


@pytest.mark.parametrize("name", ["aenqueue", "async JobTask", "async Django"])
def test_a_coroutine_gets_the_errors_of_enqueue(name, user):
    DOORS[name](user, {"idempotency_key": "two"})
    with pytest.raises(IntegrityError), transaction.atomic():
        DOORS[name](user, {"idempotency_key": "two"})


@pytest.mark.django_db(transaction=True)
def test_a_coroutine_enqueues_a_job_that_runs_after_its_commit():
    async def view():
        return [await double.aenqueue(8), await Job.objects.aenqueue(double, [4])]

    jobs = async_to_sync(view)()
    for job in jobs:
        job.refresh_from_db()
    assert [job.result for job in jobs] == [16, 8]


@pytest.mark.parametrize("moment", [datetime(2020, 1, 1), timezone.now() - timedelta(hours=1)])  # noqa: DTZ001
def test_a_job_whose_time_has_passed_starts_at_once(door, user, moment):
    assert DOORS[door](user, {"eta": moment}).times_sent == 1
