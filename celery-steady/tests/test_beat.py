"""Beat starts with any file, and is as patient as a worker."""

import shelve

import pytest

from celery_steady import Celery
from celery_steady.beat import Scheduler


@pytest.fixture
def app():
    app = Celery(broker="memory://", set_as_current=False)
    app.conf.beat_schedule = {"each hour": {"task": "task", "schedule": 3600}}
    return app


@pytest.fixture
def file(tmp_path):
    return tmp_path / "schedule"


def open_schedule(app, file):
    """Start Beat with this file, and return the names of its schedule."""
    beat = app.Beat(schedule=str(file))
    service = beat.Service(app, schedule_filename=beat.schedule, scheduler_cls=beat.scheduler_cls)
    scheduler = service.scheduler
    assert isinstance(scheduler, Scheduler)
    names = set(scheduler.schedule)
    scheduler.close()
    return names


def test_beat_makes_a_file(app, file):
    assert "each hour" in open_schedule(app, file)
    assert list(file.parent.glob("schedule*"))


def test_beat_keeps_the_times_of_the_last_runs(app, file):
    scheduler = Scheduler(app, schedule_filename=str(file))
    scheduler.reserve(scheduler.schedule["each hour"])
    scheduler.close()
    again = Scheduler(app, schedule_filename=str(file))
    assert again.schedule["each hour"].total_run_count == 1
    again.close()


@pytest.mark.parametrize(
    "pickled", [b"cgone\nSchedule\n.", b"ccelery.schedules\ngone\n.", b"no pickle", b""]
)
def test_beat_starts_over_if_its_file_cannot_be_read(app, file, pickled):
    with shelve.open(str(file)) as opened:
        opened["entries"] = {}
        opened.dict[b"entries"] = pickled
    assert "each hour" in open_schedule(app, file)
    assert "each hour" in open_schedule(app, file)


def test_an_error_of_a_setting_keeps_the_file(app, file):
    open_schedule(app, file)
    before = [each.read_bytes() for each in file.parent.iterdir()]
    app.conf.beat_schedule["new"] = {"task": "task", "schedulee": 3600}
    with pytest.raises(TypeError):
        Scheduler(app, schedule_filename=str(file))
    assert [each.read_bytes() for each in file.parent.iterdir()] == before


def test_beat_starts_over_if_its_file_is_no_database(app, file):
    file.write_bytes(b"something else")
    assert "each hour" in open_schedule(app, file)


def test_beat_waits_for_its_broker_without_end(app, file):
    Scheduler(app, schedule_filename=str(file)).close()
    assert app.conf.broker_connection_max_retries is None
