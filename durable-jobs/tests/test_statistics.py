"""Each end of a job is counted once, whatever happens, and /metrics shows the counts."""

import itertools
import threading
from datetime import datetime, timedelta

import pytest
from django.db import connection
from django.db.models.functions import Now
from django.utils import timezone
from helpers import explain, greet, kinds, queries, rows_read, scrape

from durable_jobs import admission, conf
from durable_jobs.actions import run_again
from durable_jobs.beat import purge, statistics
from durable_jobs.beat.purge import Purge
from durable_jobs.models import Job, Sweep, Tally

pytestmark = pytest.mark.django_db

START = timezone.now() - timedelta(minutes=2)


def seconds(number):
    return timedelta(seconds=number)


@pytest.fixture(autouse=True)
def row(db):
    """The row of a Beat that counted until START."""
    return Sweep.objects.create(pk=1, ended_at=START, counted_until=START)


def end(at=0, state="succeeded", ran=4, waited=3, **changes):
    """Store a job that ended `at` seconds after START, or at this time."""
    finished_at = START + seconds(at) if not isinstance(at, datetime) else at
    times = {"started_at": finished_at - seconds(ran), "finished_at": finished_at}
    times["due_at"] = times["started_at"] - seconds(waited)
    fields = {"task": greet.name, "queue": "celery", "state": state, **times, **changes}
    return Job.objects.create(**fields)


def counts(label="task", name=greet.name):
    row = Tally.objects.filter(label=label, name=name).first()
    return row.counts if row else {}


def ended():
    return counts().get("succeeded", 0)


# What is counted


def test_the_metrics_have_counters_and_histograms(staff_api):
    end()
    end(ran=20, waited=0.05, retries=2)
    end(state="failed", crashes=3, ran=9999)
    end(state="cancelled", started_at=None)
    end(state="cancelled", retries=1)
    statistics.count_ended()
    task, queue = "helpers.greet", "celery"
    assert {n: v for n, v in scrape(staff_api).items() if "sweep" not in n and "beat" not in n} == {
        f"durable_jobs_ended_total succeeded {task}": 2,
        f"durable_jobs_ended_total failed {task}": 1,
        f"durable_jobs_ended_total cancelled {task}": 2,
        f"durable_jobs_crashes_total {task}": 3,
        f"durable_jobs_retries_total {task}": 3,
        **{f"durable_jobs_run_seconds_bucket {le} {task}": 1 for le in ("5.0", "10.0")},
        **{f"durable_jobs_run_seconds_bucket {le} {task}": 2 for le in statistics.LABELS[5:-1]},
        f"durable_jobs_run_seconds_bucket +Inf {task}": 3,
        f"durable_jobs_run_seconds_count {task}": 3,
        f"durable_jobs_run_seconds_sum {task}": 10023,
        **{f"durable_jobs_wait_seconds_bucket {le} {queue}": 1 for le in ("0.1", "0.5", "1.0")},
        **{f"durable_jobs_wait_seconds_bucket {le} {queue}": 3 for le in statistics.LABELS[3:]},
        f"durable_jobs_wait_seconds_count {queue}": 3,
        f"durable_jobs_wait_seconds_sum {queue}": pytest.approx(6.05),
    }


def test_each_task_and_each_queue_has_its_own_counts():
    for task, queue in ("a", "x"), ("a", "y"), ("b", "x"):
        end(task=task, queue=queue)
    statistics.count_ended()
    found = {(row.label, row.name): row.counts["5.0"] for row in Tally.objects.all()}
    assert found == {("task", "a"): 2, ("task", "b"): 1, ("queue", "x"): 2, ("queue", "y"): 1}


@pytest.mark.parametrize("size", [*range(len(statistics.BUCKETS))])
def test_a_bucket_has_the_durations_up_to_its_own(size):
    limit, label, next_label = statistics.BUCKETS[size], *statistics.LABELS[size : size + 2]
    end(ran=limit)
    end(ran=limit + 0.000001)
    statistics.count_ended()
    assert (counts()[label], counts()[next_label]) == (1, 1)


def test_a_job_that_never_ran_or_has_no_due_time_is_in_no_histogram():
    end(state="failed", started_at=None)  # the broker refused it
    end(due_at=None)  # a row of the first version
    statistics.count_ended()
    assert counts() == {"failed": 1, "succeeded": 1, "seconds": 4, "5.0": 1}
    assert counts("queue", "celery") == {}


def test_a_duration_is_never_negative():
    end(ran=-5, waited=-5)
    end(ran=1)
    statistics.count_ended()
    assert counts() == {"succeeded": 2, "seconds": 1, "0.1": 1, "1.0": 1}


def test_known_tasks_and_queues_have_counters_before_their_first_job_ends(staff_api):
    """Prometheus does not see the first increase of a counter that was missing before."""
    shown = staff_api.get("/metrics").content.decode()
    for state in "succeeded", "failed", "cancelled":
        assert f'durable_jobs_ended_total{{state="{state}",task="{greet.name}"}} 0.0' in shown
    assert f'durable_jobs_crashes_total{{task="{greet.name}"}} 0.0' in shown
    assert 'durable_jobs_wait_seconds_count{queue="io"} 0.0' in shown


# Each end is counted once


def test_the_first_round_counts_no_old_jobs(row):
    row.delete()
    statistics.count_ended()  # Beat has not stored its row yet
    Sweep.objects.create(pk=1, ended_at=START)
    end()
    statistics.count_ended()
    assert not counts()
    Sweep.objects.update(counted_until=START)
    statistics.count_ended()
    assert ended() == 1


def test_an_end_is_counted_ten_seconds_later(monkeypatch):
    """Its transaction may commit late."""
    end(timezone.now() - seconds(5))
    end(timezone.now() - seconds(11))
    statistics.count_ended()
    assert ended() == 1
    monkeypatch.setattr(statistics, "LAG", seconds(4))
    statistics.count_ended()
    assert ended() == 2


WHOLE = START.replace(microsecond=0) + seconds(20)


@pytest.mark.parametrize("border", [WHOLE, WHOLE + seconds(0.25), WHOLE + seconds(0.123456)])
def test_borders_are_exact(monkeypatch, border):
    """Also on SQLite, which compares times as text of different lengths."""
    Sweep.objects.update(counted_until=border - statistics.PIECE)
    for step in range(-2, 3):
        end(border + step * timedelta.resolution)
    for text in "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M:%S.%f":
        pk = end(border).pk.hex
        if connection.vendor == "sqlite":  # as Now() and Clock() write it
            with connection.cursor() as cursor:
                sql = "UPDATE durable_jobs_job SET finished_at = %s WHERE id = %s"
                cursor.execute(sql, [border.strftime(text)[:23], pk])
    total, found = Job.objects.count(), []
    while statistics.count_piece():
        found.append(ended())
    assert Sweep.objects.get().counted_until > border
    assert found[0] >= 2 and ended() == total


def test_two_beats_count_each_end_once(transactional_db, monkeypatch):
    """Both read the same jobs before one of them adds the numbers."""
    end()
    end(1)
    numbers, barrier = statistics.numbers, threading.Barrier(2)

    def read(*interval):
        new = numbers(*interval)
        barrier.wait(20)
        return new

    monkeypatch.setattr(statistics, "numbers", read)
    threads = [threading.Thread(target=count_in_thread) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert barrier.n_waiting == 0 and ended() == 2


def count_in_thread():
    try:
        statistics.count_piece()
    finally:
        connection.close()


def test_a_beat_that_is_killed_at_any_point_loses_and_repeats_nothing(transactional_db):
    class Killed(BaseException):
        pass

    def count_and_die(after):
        """Run `after` statements, then die. Returns whether it died."""
        left = after

        def execute(execute, sql, params, many, context):
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            return execute(sql, params, many, context)

        try:
            with connection.execute_wrapper(execute):
                statistics.count_piece()
        except Killed:
            return True
        return False

    for point in range(20):
        end(point)
        start = START + seconds(point)
        Sweep.objects.update(counted_until=start)
        if not count_and_die(point):
            break
        assert (ended(), Sweep.objects.get().counted_until) == (point, start)
        statistics.count_ended()
        assert ended() == point + 1
    assert point >= 5 and ended() == point + 1


def test_a_beat_that_was_stopped_counts_what_it_has_missed(settings, monkeypatch):
    Sweep.objects.update(counted_until=START - timedelta(minutes=10))
    for minute in range(10):
        end(-60 * minute - 30)
    intervals, numbers = [], statistics.numbers
    monkeypatch.setattr(
        statistics, "numbers", lambda *interval: intervals.append(interval) or numbers(*interval)
    )
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"SWEEP_SECONDS": 0}
    statistics.count_ended()
    assert (len(intervals), ended()) == (1, 1)  # a round is short
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"SWEEP_SECONDS": 60}
    statistics.count_ended()
    assert ended() == 10
    assert max(end - start for start, end in intervals) == timedelta(minutes=1)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(intervals))


def test_a_clock_that_is_set_back_a_little_changes_no_count():
    now = timezone.now()
    Sweep.objects.update(counted_until=now - seconds(5))  # when it was 5 s later
    end(now - seconds(12))  # it was counted
    statistics.count_ended()
    assert not counts() and Sweep.objects.get().counted_until == now - seconds(5)


def test_a_clock_that_is_set_back_by_hours_does_not_stop_the_count():
    Sweep.objects.update(counted_until=timezone.now() + timedelta(hours=5))
    statistics.count_ended()
    counted_until = Sweep.objects.get().counted_until
    assert timezone.now() - seconds(12) < counted_until < timezone.now()
    end(counted_until)
    Sweep.objects.update(counted_until=counted_until - seconds(1))
    statistics.count_ended()
    assert ended() == 1


def test_a_job_that_runs_again_is_counted_at_each_of_its_ends():
    job = end(state="failed", retries=8)
    statistics.count_ended()
    job.refresh_from_db()
    run_again(job)
    later = {"finished_at": START + seconds(60), "sweep_at": None}
    Job.objects.update(state="succeeded", **later)
    Sweep.objects.update(counted_until=START + seconds(50))
    statistics.count_ended()
    assert (counts()["failed"], counts()["succeeded"], counts()["retries"]) == (1, 1, 8)


# What is deleted


def test_the_purge_deletes_no_job_that_is_not_counted(settings):
    second, kept = 1 / 24 / 3600, conf.RETENTION_DAYS
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"RETENTION_DAYS": second}
    end()
    purge = Purge(Job, "finished_at")
    purge.delete_page()
    assert Job.objects.count() == 1
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"RETENTION_DAYS": kept}
    statistics.count_ended()
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"RETENTION_DAYS": second}
    purge.delete_page()
    assert not Job.objects.exists() and ended() == 1


def test_the_purge_deletes_old_jobs_that_will_not_be_counted(settings):
    """Those that ended before the first round."""
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"RETENTION_DAYS": 1 / 24 / 3600}
    for _ in range(2):
        end()
        Sweep.objects.update(counted_until=None)
        Purge(Job, "finished_at").delete_page()
        assert not Job.objects.exists()
        Sweep.objects.all().delete()


def test_counts_that_have_not_changed_for_long_are_deleted(settings):
    """Names of queues may be those of tenants."""
    past = Now() - timedelta(days=conf.RETENTION_DAYS, seconds=1)
    for name in "old", "new", "again":
        Tally.objects.create(label="queue", name=name, counts={"1.0": 5}, updated_at=past)
    Tally.objects.filter(name="new").update(updated_at=Now())
    end(queue="again", task="old")  # the name of a task, too
    statistics.count_ended()
    assert {(t.label, t.name) for t in Tally.objects.all()} == {
        ("queue", "new"),
        ("queue", "again"),
        ("task", "old"),
    }
    assert counts("queue", "again") == {"1.0": 5, "5.0": 1, "seconds": 3}


def test_late_counts_are_not_deleted_as_old_ones(settings):
    """A Beat that was stopped for longer than DURABLE_JOBS['RETENTION_DAYS'] counts jobs that are older."""
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"RETENTION_DAYS": 1 / 24 / 3600}
    end()
    statistics.count_ended()
    assert ended() == 1


# What it costs, and what an error stops


@pytest.mark.parametrize("failing", ["count_ended", "delete_pages", "delete_old_starts"])
def test_an_error_stops_no_other_step(monkeypatch, caplog, failing):
    called = []

    def step(owner, name):
        def run(*args):
            called.append(name)
            if name == failing:
                raise OSError("no")

        run.__qualname__ = name
        monkeypatch.setattr(owner, name, run)

    step(statistics, "count_ended")
    step(Purge, "delete_pages")
    step(admission, "delete_old_starts")
    pauses = iter([None, None])
    monkeypatch.setattr("time.sleep", lambda _: next(pauses))
    with pytest.raises(StopIteration):
        purge.clean_forever()
    round_ = ["count_ended", "delete_pages", "delete_pages", "delete_old_starts"]
    assert called == round_ * 2
    assert f"{failing} failed, and is tried again" in caplog.text


def test_a_round_costs_few_queries_however_many_jobs_have_ended():
    Sweep.objects.update(counted_until=timezone.now() - seconds(12))
    # Beat's row, the jobs, Beat's row, rows of Tally that are old.
    assert kinds(queries(statistics.count_ended)) == ["SELECT", "SELECT", "UPDATE", "DELETE"]
    for number in range(50):
        end(timezone.now() - seconds(11), task=f"task{number % 7}", queue=f"queue{number % 9}")
    Sweep.objects.update(counted_until=timezone.now() - seconds(12))
    busy = ["SELECT", "SELECT", "UPDATE", "SELECT", "INSERT", "DELETE"]
    assert kinds(queries(statistics.count_ended)) == busy


def test_a_round_reads_only_the_jobs_that_it_counts(backlog):
    for _ in range(3):
        end()
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE durable_jobs_job")
    [sql] = queries(statistics.numbers, START - seconds(1), START + seconds(1))
    assert rows_read(sql) <= 3, explain(sql)


def test_the_purge_reads_only_old_jobs(backlog, settings):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"RETENTION_DAYS": 1 / 24 / 60}
    Sweep.objects.update(counted_until=Now())
    end()
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE durable_jobs_job")
    page = queries(Purge(Job, "finished_at").delete_page)[0]
    assert "job_finished" in explain(page) and rows_read(page) <= 1, explain(page)
