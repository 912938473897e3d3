"""Beat: each job of the schedule is stored once per due time, and errors are refused or logged."""

import json
import time
import uuid
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from unittest.mock import Mock
from zoneinfo import ZoneInfo

import pytest
from celery import current_app as app
from celery import shared_task
from celery.beat import BeatLazyFunc, Scheduler, Service
from celery.schedules import crontab, schedule
from django.core.checks import run_checks
from django.db import IntegrityError, OperationalError, connection
from django_celery_beat.models import (
    ClockedSchedule,
    CrontabSchedule,
    IntervalSchedule,
    PeriodicTask,
)
from django_celery_beat.schedulers import DatabaseScheduler
from django_tasks import task

from durable_jobs import transitions
from durable_jobs.beat.schedule import OncePerDueTime
from durable_jobs.beat.sweeper import Sweeper
from durable_jobs.models import Job
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db(transaction=True)  # Beat closes old connections


@shared_task(base=JobTask)
def add(x, y):
    return x + y


@shared_task
def plain(x, y):
    pass


@task
def function(x, y):
    return x + y


@pytest.fixture(params=[Scheduler, DatabaseScheduler])
def scheduler(request):
    """The scheduler of a Beat that has just started: `periodic_tasks=code` and `=admin`."""
    return beat(request.param).scheduler


def beat(scheduler_cls):
    service = Service(app, scheduler_cls=scheduler_cls)
    OncePerDueTime(service).start()
    return service


def tick(scheduler, due=None, since=None, name="add", **options):
    """Have Beat start the job of a schedule entry, whose last start was at `since`."""
    since = since or datetime.now(UTC) - timedelta(hours=1)
    if isinstance(scheduler, DatabaseScheduler):
        entry = row(due, name=name, last_run_at=since, **options)
        entry = scheduler.Entry(PeriodicTask.objects.get(pk=entry.pk), app=app)
    else:
        entry = scheduler.Entry(
            name, add.name, since, schedule=due or crontab(), args=[1, 2], options=options, app=app
        )
        scheduler.schedule[name] = entry
    scheduler.apply_entry(entry)


def every_minute():
    return CrontabSchedule.objects.get_or_create(minute="*", hour="*")[0]


def row(due=None, **fields):
    """Store an entry of the schedule, as the admin does."""
    if isinstance(due, timedelta):
        interval, _ = IntervalSchedule.objects.get_or_create(
            every=due.total_seconds(), period=IntervalSchedule.SECONDS
        )
        kind = {"interval": interval}
    else:
        kind = {"crontab": every_minute()}
    name = fields.pop("name", "add")
    defaults = {"task": add.name, "args": json.dumps([1, 2]), **kind, **fields}
    return PeriodicTask.objects.update_or_create(defaults=defaults, name=name)[0]


@pytest.mark.parametrize("due", [crontab(), timedelta(minutes=1)], ids=["crontab", "interval"])
def test_beat_stores_a_job_with_the_arguments_and_the_queue_of_its_entry(scheduler, due):
    tick(scheduler, due, queue="io")
    job = Job.objects.get()
    assert (job.task, job.args, job.kwargs, job.queue) == (add.name, [1, 2], {}, "io")


def test_a_schedule_starts_no_job_while_a_unique_one_is_active(published):
    scheduler = beat(Scheduler).scheduler
    for name in "first", "second":
        tick(scheduler, name=name, unique="add")
    assert Job.objects.get().unique_key == "add"


def test_a_function_in_the_schedule_is_called_when_its_job_is_due():
    scheduler = beat(Scheduler).scheduler
    x, y = BeatLazyFunc(lambda: 1), BeatLazyFunc(lambda: 2)
    scheduler.apply_entry(
        scheduler.Entry("add", add.name, schedule=crontab(), args=[x], kwargs={"y": y}, app=app)
    )
    job = Job.objects.get()
    assert (job.args, job.kwargs) == ([1], {"y": 2})


@pytest.mark.parametrize("due", [crontab(), timedelta(minutes=1)], ids=["crontab", "interval"])
@pytest.mark.parametrize("kind", [Scheduler, DatabaseScheduler])
def test_two_beats_start_one_job_for_each_tick(kind, due):
    beats = [beat(kind).scheduler, beat(kind).scheduler]
    today = datetime.now(UTC).replace(hour=0)  # Celery 5.6 rounds a day that has ended
    for minute in range(3):
        for index, scheduler in enumerate(beats):
            since = today.replace(minute=minute, second=10 + 20 * index)
            tick(scheduler, due, since)
            tick(scheduler, due, since, name="another")
    assert Job.objects.count() == 6


class FileScheduler(Scheduler):
    """Stores when its entry last started, as PersistentScheduler does in a file."""

    def sync(self):
        self.stored = self.schedule["add"].last_run_at


def test_a_killed_beat_has_stored_when_its_jobs_started():
    """With an older time, it would ask for the same id again, and start no job."""
    scheduler, old = beat(FileScheduler).scheduler, datetime.now(UTC) - timedelta(hours=1)
    entry = {"name": "add", "task": add.name, "schedule": crontab(), "args": [1, 2]}
    scheduler.schedule = {"add": scheduler.Entry(**entry, last_run_at=old, app=app)}
    scheduler.tick()
    assert Job.objects.count() == 1
    assert scheduler.stored > old


def test_django_celery_beat_has_stored_when_its_jobs_started():
    scheduler, old = beat(DatabaseScheduler).scheduler, datetime.now(UTC) - timedelta(hours=1)
    row(last_run_at=old)
    scheduler.tick()
    assert Job.objects.count() == 1
    assert PeriodicTask.objects.get(name="add").last_run_at > old


def test_a_one_off_entry_that_is_enabled_again_starts_another_job():
    scheduler = beat(DatabaseScheduler).scheduler
    at = ClockedSchedule.objects.create(clocked_time=datetime.now(UTC) - timedelta(hours=1))
    once = row(crontab=None, clocked=at, one_off=True)
    for count in 1, 2:
        once.save()  # as the admin does, with `enabled`
        scheduler.apply_entry(scheduler.Entry(PeriodicTask.objects.get(pk=once.pk), app=app))
        assert Job.objects.count() == count


@pytest.mark.parametrize(
    "due", [crontab(minute="*/10"), schedule(600)], ids=["crontab", "interval"]
)
def test_no_run_is_lost_when_the_clock_goes_back(monkeypatch, due):
    """The hour from 2 to 3 comes twice, and each time it has six runs of its own."""
    berlin, scheduler = ZoneInfo("Europe/Berlin"), beat(Scheduler).scheduler
    now = datetime(2026, 10, 25, 0, 5, tzinfo=berlin).timestamp()
    monkeypatch.setattr("durable_jobs.beat.schedule.time", SimpleNamespace(time=lambda: now))
    due.nowfun = lambda: datetime.fromtimestamp(now, berlin)
    last, runs = due.now(), 0
    for _ in range(6 * 4 * 60):  # four hours, in steps of ten seconds
        now += 10
        if due.is_due(last).is_due:
            tick(scheduler, due, last)
            last, runs = due.now(), runs + 1
    assert runs == Job.objects.count() == 24


@pytest.mark.parametrize("due", [crontab(), schedule(60)], ids=["crontab", "interval"])
def test_after_a_jump_back_an_entry_waits_until_the_time_of_its_last_start(due):
    last, due.nowfun = datetime(2026, 1, 1, 12, tzinfo=UTC), lambda: now
    now = last - timedelta(hours=1)
    assert not due.is_due(last).is_due
    now = last + timedelta(minutes=1)
    assert due.is_due(last).is_due


def test_beat_replaces_a_lost_connection():
    if connection.vendor == "sqlite":
        pytest.skip("only a connection to PostgreSQL can be lost: set DATABASE_URL=postgres://…")
    scheduler = beat(Scheduler).scheduler
    connection.ensure_connection()
    connection.connection.close()
    tick(scheduler)
    assert Job.objects.count() == 1


@pytest.mark.parametrize("embedded", [False, True])  # celery beat, celery worker --beat
def test_one_beat_has_one_sweeper(monkeypatch, embedded):
    sweeps = []
    monkeypatch.setattr(Sweeper, "start", lambda self: sweeps.append(1))
    monkeypatch.setattr("celery.platforms.set_process_title", lambda *args, **kwargs: None)
    service = Service(app, scheduler_cls=Scheduler)
    service._is_shutdown.set()  # it ends as soon as it has started
    service.start(embedded_process=embedded)
    assert sweeps == [1]


def test_a_tick_waits_for_an_unavailable_database(scheduler, monkeypatch):
    insert, errors = transitions.store, [OperationalError("away"), OperationalError("away")]

    def fail(job):
        if errors:
            raise errors.pop()
        return insert(job)

    monkeypatch.setattr(transitions, "store", fail)
    tick(scheduler)
    until = time.monotonic() + 60
    # Wait until the job has ended: otherwise its thread would continue without the fixtures.
    while not Job.objects.filter(state="succeeded").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert Job.objects.get().result == 3


# What Beat cannot start is logged


@pytest.fixture
def errors(caplog):
    """The errors that Beat and its scheduler log."""
    return lambda: [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]


def test_a_tick_that_cannot_be_stored_is_logged(scheduler, monkeypatch, errors):
    monkeypatch.setattr(transitions, "store", Mock(side_effect=IntegrityError("no such owner")))
    tick(scheduler)
    assert len(errors()) == 1 and "add: no such owner" in errors()[0]


@pytest.mark.parametrize("kind", [Scheduler, DatabaseScheduler])
def test_an_option_that_a_job_cannot_have_is_logged(kind, errors):
    tick(beat(kind).scheduler, **{"expires" if kind is Scheduler else "expire_seconds": 60})
    assert len(errors()) == 1 and "a job does not take expires" in errors()[0]
    assert '"unique"' in errors()[0]
    assert not Job.objects.exists()


def test_a_task_that_no_longer_exists_is_logged(errors):
    """Celery sends its message, because another project's worker could know the task."""
    scheduler = beat(Scheduler).scheduler
    scheduler.send_task = Mock()
    scheduler.apply_entry(scheduler.Entry("old", "no.such.task", schedule=crontab(), app=app))
    assert errors() == ["old: this project has no task no.such.task"]
    assert scheduler.send_task.call_count == 1


def test_a_schedule_entry_with_a_task_id_is_logged(errors):
    """Its job would run once and never again."""
    tick(beat(Scheduler).scheduler, task_id=str(uuid.uuid4()))
    assert len(errors()) == 1 and "cannot have a task_id" in errors()[0]
    assert not Job.objects.exists()


# What Beat cannot start is refused before


REFUSED = {
    "a task that does not exist": {"task": "no.such.task"},
    "arguments that do not fit": {"args": [1]},
    "arguments of a plain task that do not fit": {"task": plain.name, "args": [1]},
    "arguments of a function that do not fit": {"task": f"{__name__}.function", "args": [1]},
    "arguments that are no list": {"args": {"x": 1, "y": 2}},
    "a job that expires": {"options": {"expires": 60}},
    "a job with a priority": {"options": {"priority": 3}},
}
ACCEPTED = {
    "a job": {},
    "a job with options": {
        "options": {"label": "Daily", "unique": "daily", "queue": "io", "countdown": 60}
    },
    "a plain task that expires": {"task": plain.name, "options": {"expires": 60}},
    "a function": {"task": f"{__name__}.function"},
}
ONLY_IN_CODE = {
    "a task_id": {"options": {"task_id": "daily"}},
    "no schedule": {"schedule": None},
    "a misspelled field": {"argument": [1, 2]},
    "an argument that is no JSON": {"args": [1, object()]},
}


def refused_by_the_check(monkeypatch, fields):
    entry = {"task": add.name, "schedule": crontab(), "args": [1, 2], **fields}
    monkeypatch.setitem(app.conf, "beat_schedule", {"daily": entry})
    return "durable_jobs.E003" in [message.id for message in run_checks()]


@pytest.mark.parametrize("fields", [REFUSED, ONLY_IN_CODE], ids=["anywhere", "code"])
def test_the_check_refuses_an_entry_that_beat_cannot_start(monkeypatch, fields):
    for name, entry in fields.items():
        assert refused_by_the_check(monkeypatch, entry), name


def test_the_check_accepts_what_beat_can_start(monkeypatch):
    for name, entry in ACCEPTED.items():
        assert not refused_by_the_check(monkeypatch, entry), name
    assert not refused_by_the_check(monkeypatch, {"args": [1, BeatLazyFunc(time.time)]})


def test_the_admins_action_runs_a_job_of_the_schedule(admin_client):
    data = {"action": "run_tasks", "_selected_action": [row(queue="io").pk]}
    admin_client.post("/admin/django_celery_beat/periodictask/", data)
    assert Job.objects.get().queue == "io"


WRONG_ROWS = {
    "priority": 3,
    "expire_seconds": 60,
    "exchange": "mail",
    "args": "[1]",
}


@pytest.mark.parametrize("field", WRONG_ROWS)
def test_a_row_that_beat_cannot_start_is_refused_in_the_admin(admin_client, field):
    url, name = "/admin/django_celery_beat/periodictask/add/", "PeriodicTask.name"
    data = {"name": name, "args": "[1, 2]", "kwargs": "{}", "headers": "{}"}
    data |= {"task": add.name, "crontab": every_minute().pk}
    answer = admin_client.post(url, data | {field: WRONG_ROWS[field]})
    why = "missing" if field == "args" else f"a job does not take {field}. See the options"
    assert why in answer.content.decode() and not PeriodicTask.objects.filter(name=name).exists()
    admin_client.post(url, data | {"task": plain.name, field: WRONG_ROWS[field]})
    admin_client.post(url, data | {"name": "right", "queue": "io"})
    assert PeriodicTask.objects.filter(name__in=[name, "right"]).count() == 2


@pytest.mark.parametrize("field", WRONG_ROWS)
def test_a_row_that_beat_cannot_start_is_found_by_a_check(field):
    row(name="right", queue="io")
    row(name="off", enabled=False, **{field: WRONG_ROWS[field]})
    row(name="plain", task=plain.name, **{field: WRONG_ROWS[field]})
    assert not run_checks(databases=["default"])
    row(name="wrong", **{field: WRONG_ROWS[field]})
    [warning] = run_checks(databases=["default"])
    assert warning.id == "durable_jobs.W010" and "the periodic task wrong: " in warning.msg
