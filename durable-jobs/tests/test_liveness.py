"""A Beat whose schedule hangs stops touching its liveness file, and its metrics say so."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from durable_jobs.beat import sweeper as sweeper_module
from durable_jobs.beat.schedule import watch_ticks
from durable_jobs.contrib.prometheus import Collector

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize("late, touched", [(-60, 1), (29, 1), (31, 0)])
def test_a_beat_that_hangs_does_not_touch_its_liveness_file(monkeypatch, late, touched):
    """Its sweeper continues, and stores how late the schedule is."""
    monkeypatch.setattr(sweeper_module, "touch_liveness_file", touch := Mock())
    monkeypatch.setattr("time.sleep", Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        sweeper_module.Sweeper(lambda: late).run()
    assert touch.call_count == touched
    *_, age, behind = [family.samples[0].value for family in list(Collector().collect())[-2:]]
    assert (age, behind) == (pytest.approx(0, abs=3), pytest.approx(max(late, 0), abs=3))


def test_beat_is_late_once_its_next_tick_is_overdue(monkeypatch):
    now = 100
    monkeypatch.setattr("durable_jobs.beat.schedule.time", SimpleNamespace(monotonic=lambda: now))
    scheduler = Mock(tick=Mock(return_value=5))
    late = watch_ticks(SimpleNamespace(scheduler=scheduler))
    now = 140
    assert late() == 40  # no tick has begun
    assert scheduler.tick() == 5 and late() == -5
    now = 146
    assert late() == 1
