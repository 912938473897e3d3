"""Enqueueing: what a job's row holds, what is refused at once, and the options of each way."""

import uuid
from datetime import datetime, timedelta
from math import nan
from types import SimpleNamespace

import pytest
from asgiref.sync import async_to_sync
from celery import shared_task
from django.db import IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django.utils.functional import SimpleLazyObject
from helpers import add, alone, plain, seconds_until_due, sweeper

from durable_jobs import batches, compiler
from durable_jobs.actions import run_again
from durable_jobs.api.views import EnqueueMixin
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.models import Job, Sweep
from durable_jobs.pools import pool
from durable_jobs.publish import publish
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask)
def double(n):
    return 2 * n


def enqueue_in_view(user, options):
    view = EnqueueMixin()
    view.request, view.job_id = SimpleNamespace(user=user, headers={}), uuid.uuid4()
    return view.enqueue(double.using(**options).s(8))


def enqueue_in_batch(calls):
    with batches.open_batch() as batch:
        return batches.add_many(batch, calls)


DOORS = {
    "enqueue": lambda user, options: enqueue(double, [8], **options),
    "enqueue_many": lambda user, options: enqueue_many([double.using(**options).s(8)])[0],
    "EnqueueMixin": enqueue_in_view,
    "JobTask": lambda user, options: double.using(**options).enqueue(8),
    "async JobTask": lambda user, options: async_to_sync(double.using(**options).aenqueue)(8),
}
LATER = timezone.now() + timedelta(hours=1)
OPTIONS = {
    "owner": None,  # the user of the test
    "label": "March",
    "queue": "cpu",
    "headers": {"source": "mail"},
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


def test_a_job_runs_when_its_transaction_commits(commit):
    with commit():
        job = enqueue(add, [1], {"y": 2})
        assert job.state == "queued"
    job.refresh_from_db()
    assert (job.state, job.result) == ("succeeded", 3)


def test_a_rollback_leaves_neither_row_nor_message(commit, published):
    with commit(), pytest.raises(ZeroDivisionError), transaction.atomic():
        enqueue(add, [1, 2])
        raise ZeroDivisionError
    assert not Job.objects.exists()
    assert published == []


@pytest.mark.parametrize(
    "task, args",
    [(add, [1]), (add, [1, 2, 3]), (add, [1, object()]), (add, [1, nan]), (plain, []), (len, [])],
    ids=["too few arguments", "too many", "not JSON", "NaN", "a task that is no job", "no task"],
)
def test_a_job_that_cannot_run_is_refused_when_it_is_enqueued(task, args):
    with pytest.raises(TypeError):
        enqueue(task, args)
    assert not Job.objects.exists()


@pytest.mark.parametrize("args, kwargs", [(12, {}), ("12", {}), ({1: 2}, {}), ([], [1, 2])])
def test_arguments_must_be_a_list_and_a_dictionary(args, kwargs):
    with pytest.raises(TypeError, match="args must be a list"):
        enqueue(add, args, kwargs)
    assert not Job.objects.exists()


def test_arguments_that_are_too_large_are_refused():
    enqueue(add, ["x" * 59_980, 1])
    with pytest.raises(ValueError, match="60,013 bytes, more than 60,000: pass an id"):
        enqueue(add, ["x" * 60_000, 1])


@pytest.mark.parametrize("option", ["unique", "idempotency_key", "queue"])
@pytest.mark.parametrize("text", ["x" * 256, 7, "\0"])
def test_a_text_that_does_not_fit_into_its_column_is_refused(option, text):
    """Else PostgreSQL's error would end the caller's transaction."""
    with pytest.raises(ValueError, match="1 to 255 characters|the database cannot store"):
        enqueue(add, [1, 2], **{option: text})


UNSTORABLE = ["\0", "a\\\0", "\ud83d", "\ude00a", "\ud83d\ud83d\ude00", "\ud83d\\\ude00"]


@pytest.mark.parametrize("text", UNSTORABLE, ids=ascii)
@pytest.mark.parametrize("field", ["args", "kwargs", "label", "unique", "idempotency_key"])
def test_a_text_that_postgresql_cannot_store_is_refused_at_once(text, field):
    values = {"args": [text, 1], "kwargs": {"y": {text: 1}}}
    call = {"args": [1, 2], field: values.get(field, text)}
    with CaptureQueriesContext(connection) as captured:
        with pytest.raises((TypeError, ValueError), match=r"cannot store the character \\u"):
            enqueue(add, **call)
    assert not captured.captured_queries
    if field == "label":
        with pytest.raises(ValueError, match="cannot store"):
            enqueue_many([add.using(label=text).s(1, 2)])


@pytest.mark.parametrize("text", ["é😀", "\\u0000", "\\\\ud800", "\x01\x7f"], ids=ascii)
def test_any_other_text_is_stored(text):
    texts = {"unique": text, "label": text, "idempotency_key": text}
    job = enqueue(add, [text, {text: 1}], **texts)
    job.refresh_from_db()
    assert job.args == [text, {text: 1}]
    assert [job.unique_key, job.label, job.idempotency_key] == [text] * 3


def test_a_label_is_kept_and_cut_to_its_column():
    """It is cut to the length of its column, because the name of a file may be long."""
    jobs = enqueue_many([add.using(label="many" * 100).s(1, 2)])
    publish(jobs)
    jobs[0].refresh_from_db()
    assert jobs[0].label == run_again(jobs[0]).label == "many" * 63 + "man"
    assert enqueue(add, [1, 2], label="one" * 100).label == "one" * 85


@pytest.mark.parametrize("options", [{"countdown": 1.7e12}, {"queue": "cpu", "countdown": 1e9}])
def test_a_countdown_of_more_than_ten_years_is_refused(options):
    with pytest.raises(ValueError, match="it is in seconds"):
        enqueue(add, [1, 2], **options)


def test_a_job_goes_to_the_queue_that_its_decorator_names(monkeypatch):
    monkeypatch.setattr(add, "queue", "mail", raising=False)
    assert enqueue(add, [1, 2]).queue == "mail"
    assert enqueue(add, [1, 2], queue="cpu").queue == "cpu"


@pytest.mark.parametrize("owned", [True, False])
def test_an_owner_uses_an_idempotency_key_once(user, owned):
    owner = user if owned else None
    enqueue(add, [1, 2], owner=owner, idempotency_key="key")
    with transaction.atomic():
        with pytest.raises(IntegrityError, match="used before: idempotency_key='key'"):
            enqueue(add, [3, 4], owner=owner, idempotency_key="key")
        assert Job.objects.count() == 1  # the caller's transaction is not aborted


def test_two_owners_may_use_the_same_idempotency_key(user, admin_user):
    enqueue(add, [1, 2], owner=user, idempotency_key="key")
    enqueue(add, [1, 2], owner=admin_user, idempotency_key="key")
    assert Job.objects.filter(idempotency_key="key").count() == 2


def test_enqueue_many_stores_and_sends_all_jobs_together(commit, published, user):
    with CaptureQueriesContext(connection) as captured, commit():
        jobs = enqueue_many(
            [add.using(owner=user, queue="cpu").s(*args) for args in [[1, 2], [3, 4], [5, 6]]]
        )
        assert published == []
    assert len([query for query in captured if query["sql"].startswith("INSERT")]) == 1
    assert [(job.args, job.owner, job.queue) for job in Job.objects.order_by("created_at")] == [
        ([number, number + 1], user, "cpu") for number in (1, 3, 5)
    ]
    assert len({job.created_at for job in jobs}) == 3  # pages are ordered by it
    assert published == [str(job.pk) for job in jobs]
    assert all(seconds_until_due(job) == pytest.approx(30, abs=5) for job in jobs)


def test_enqueue_many_runs_all_jobs(commit):
    with commit():
        enqueue_many(add.s(number, 1) for number in range(3))
    assert [job.result for job in Job.objects.order_by("created_at")] == [1, 2, 3]


def test_enqueue_many_stores_all_jobs_or_none(commit, published):
    with commit(), pytest.raises(TypeError):
        enqueue_many([add.s(1, 2), add.s(3)])
    with commit(), pytest.raises(ZeroDivisionError), transaction.atomic():
        enqueue_many([add.s(1, 2), add.s(3, 4)])
        raise ZeroDivisionError
    assert not Job.objects.exists()
    assert published == []


@pytest.mark.parametrize("door", [enqueue_many, enqueue_in_batch])
def test_the_sweeper_sends_most_of_many_jobs_in_their_order(commit, published, monkeypatch, door):
    monkeypatch.setattr("durable_jobs.enqueue.SENT_IMMEDIATELY", 2)
    sweeper.store_round()
    with commit():
        jobs = door([add.s(number, 1) for number in range(50)])
    assert published == [str(job.pk) for job in jobs[:2]]
    sweeper.sender.send_due(resend=False)
    assert published == [str(job.pk) for job in jobs]


@pytest.mark.parametrize("age", [60, None])
def test_many_jobs_do_not_wait_for_a_sweeper_that_does_not_run(commit, published, monkeypatch, age):
    monkeypatch.setattr("durable_jobs.enqueue.SENT_IMMEDIATELY", 2)
    if age:
        sweeper.store_round()
        Sweep.objects.update(ended_at=Now() - timedelta(seconds=age))
    with commit():
        jobs = enqueue_many([add.s(number, 1) for number in range(5)])
    assert published == [str(job.pk) for job in jobs]


def test_the_sweeper_sends_no_job_of_many_before_its_countdown(commit, published, monkeypatch):
    monkeypatch.setattr("durable_jobs.enqueue.SENT_IMMEDIATELY", 0)
    sweeper.store_round()
    with commit():
        [later] = enqueue_many([add.using(countdown=60).s(1, 2)])
    assert seconds_until_due(later) == pytest.approx(60, abs=5)
    sweeper.sender.send_due(resend=False)
    assert published == []


def test_enqueue_many_accepts_an_empty_list(commit):
    with commit():
        assert enqueue_many([]) == []


# Each way to enqueue


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_in_the_row(door, option, user):
    options = {option: OPTIONS[option] or user}
    if option in NOT_TAKEN.get(door, []):
        with pytest.raises(TypeError, match=f"this job does not take {option}"):
            DOORS[door](user, options)
        return
    job = DOORS[door](user, options)
    job.refresh_from_db()
    owner = user if option == "owner" or door == "EnqueueMixin" else None
    assert (job.args, job.kwargs, job.state, job.owner) == ([8], {}, "queued", owner)
    assert job.label == options.get("label", "")
    assert job.queue == options.get("queue", "celery")
    assert job.headers == options.get("headers", {})
    assert (job.unique_key, job.idempotency_key) == (
        options.get("unique"),
        options.get("idempotency_key"),
    )
    is_late = option in ("countdown", "eta")
    assert job.times_sent == (0 if is_late else 1)
    # LATER is an hour after this file was imported, and all tests together take minutes.
    due_at = LATER if option == "eta" else job.created_at + timedelta(hours=is_late)
    assert abs(job.due_at - due_at) < timedelta(seconds=60)


@pytest.mark.parametrize("task", [add, alone])
@pytest.mark.parametrize("countdown", [None, 60])
def test_a_new_job_has_the_times_of_its_row(task, countdown, published):
    names = "created_at", "due_at", "send_at"
    job = enqueue(task, [1, 2] if task == add else [1], countdown=countdown)
    row = Job.objects.values(*names).get()
    assert {name: getattr(job, name) for name in names} == row
    assert (row["send_at"] is None) == (task == alone)
    assert row["due_at"] - row["created_at"] > timedelta(seconds=(countdown or 0) - 1)


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
    with pytest.raises(TypeError, match="keyword argument 'ownr'|a job does not take ownr"):
        DOORS[door](user, {"ownr": user})


@pytest.mark.parametrize("name", ["using", "set"])
def test_a_misspelled_option_is_refused_when_a_signature_gets_it(name):
    with pytest.raises(TypeError, match="a job does not take lable. See the options of using"):
        getattr(double.s(8), name, double.using)(lable="March")


@pytest.mark.parametrize("option", ["countdown", "eta"])
@pytest.mark.parametrize("value", ["5", timedelta(5)])
def test_a_time_of_a_wrong_type_is_refused(door, user, option, value):
    with pytest.raises(TypeError, match=f"{option}= must be a (number of seconds|datetime), not"):
        DOORS[door](user, {option: value})
    assert not Job.objects.exists()


def test_a_label_may_be_any_object_with_a_text(user):
    assert enqueue(double, [8], label=user).label == "user@example.com"
    assert enqueue(double, [8], label=None).label == ""


def test_a_coroutine_enqueues_in_the_transaction_of_its_caller(user, commit):
    with commit() as callbacks:
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            DOORS["async JobTask"](user, {})
            raise ZeroDivisionError
        assert not Job.objects.exists()
        with transaction.atomic():
            DOORS["async JobTask"](user, {})
    assert Job.objects.get().state == "succeeded" and len(callbacks) == 1


def test_a_coroutine_gets_the_errors_of_enqueue(user):
    DOORS["async JobTask"](user, {"idempotency_key": "two"})
    with pytest.raises(IntegrityError), transaction.atomic():
        DOORS["async JobTask"](user, {"idempotency_key": "two"})


def test_a_coroutine_does_not_load_a_lazy_user(user):
    """As `request.user` is in an async view: Django refuses queries in its thread."""
    lazy = SimpleLazyObject(lambda: type(user).objects.get(pk=user.pk))

    async def view():
        return await double.using(owner=lazy).aenqueue(8)

    assert async_to_sync(view)().owner == user


@pytest.mark.django_db(transaction=True)
def test_a_coroutine_enqueues_a_job_that_runs_after_its_commit():
    async def view():
        return [await double.aenqueue(8), await double.s(4).aenqueue()]

    jobs = pool.run_coroutine(view)
    for job in jobs:
        job.refresh_from_db()
    assert [job.result for job in jobs] == [16, 8]


def test_a_wrong_clock_of_this_process_shifts_no_time(door, user, monkeypatch):
    """Only that of the database counts."""
    wrong = timezone.now() + timedelta(minutes=10)
    monkeypatch.setattr(timezone, "now", lambda: wrong)
    job = DOORS[door](user, {"eta": LATER})
    job.refresh_from_db()
    assert abs(job.due_at - LATER) < timedelta(milliseconds=1)


@pytest.mark.parametrize("moment", [datetime(2020, 1, 1), timezone.now() - timedelta(hours=1)])  # noqa: DTZ001
def test_a_job_whose_time_has_passed_starts_at_once(door, user, moment):
    assert DOORS[door](user, {"eta": moment}).times_sent == 1


def test_many_jobs_are_stored_like_few(user, monkeypatch):
    """On PostgreSQL, many are a COPY."""
    texts = ["", "\t", "\n", "\\N", "\\", '"', "é€😀"] * 3
    calls = [
        double.using(owner=user, label=text, headers={"a": text}, countdown=9).s([text, None, 1.5])
        for text in texts
    ]

    def stored(many):
        monkeypatch.setattr(compiler, "MANY", many)
        with CaptureQueriesContext(connection) as captured:
            jobs = enqueue_many(calls)
        is_copied = any(query["sql"].startswith("COPY") for query in captured)
        assert is_copied == (many == 1 and connection.vendor == "postgresql")
        assert all(job.pk and not job._state.adding for job in jobs)
        rows = Job.objects.filter(pk__in=[job.pk for job in jobs], cursor__isnull=True)
        rows = rows.order_by("created_at").values()
        differ = {"id", "created_at", "due_at", "send_at"}
        return [{name: row[name] for name in row.keys() - differ} for row in rows]

    assert stored(many=1) == stored(many=1000) and len(stored(many=1)) == len(texts)
