"""The sweeper sends each job whose message is missing, once, and no job or queue stops it."""

import itertools
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from celery import current_app as app
from django.db import OperationalError, connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from helpers import (
    add,
    claim,
    enqueue_and_publish,
    lapse,
    messages_unless,
    requeue,
    seconds_until_due,
    seconds_waited,
    sweeper,
)

from durable_jobs import admission, messages, publish
from durable_jobs.beat import republish
from durable_jobs.beat import sweeper as sweeper_module
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.models import Job, Sweep

pytestmark = pytest.mark.django_db


# What is due, and what is lost


def test_a_job_with_a_countdown_is_not_published_before_it_is_due(commit, published):
    with commit():
        job = enqueue(add, [1, 2], countdown=60)
    sweeper.sender.send_due()
    assert published == []
    assert seconds_until_due(job) == pytest.approx(60, abs=5)
    lapse(job)
    sweeper.sender.send_due()
    assert published == [str(job.pk)]


def test_a_job_that_was_never_sent_is_sent_whatever_the_broker_has(published):
    enqueue_and_publish(3)
    unsent = enqueue(add, [1, 2], countdown=1)
    lapse(unsent)
    sweeper.sender.send_due()
    assert published[3:] == [str(unsent.pk)]


def test_a_job_is_not_sent_again_while_the_broker_has_its_message(published):
    lapse(*enqueue_and_publish(3))
    sweeper.sender.send_due()
    assert len(published) == 3


def test_lost_messages_are_published_again_oldest_first(published):
    jobs = enqueue_and_publish(4)
    lapse(*jobs)
    del published[:2]
    sweeper.sender.send_due()
    assert published[2:] == [str(job.pk) for job in jobs[:2]]


def test_the_pause_before_a_lost_message_is_sent_again_doubles(published, settings):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"RESEND_SECONDS": 10}
    [job] = enqueue_and_publish(1)
    for wait in 20, 40, 80:
        published.clear()
        lapse(job)
        sweeper.sender.send_due()
        assert published == [str(job.pk)]
        assert seconds_until_due(job) == pytest.approx(wait, abs=5)


def test_sending_a_job_again_does_not_reset_its_waiting_time(published, monkeypatch):
    job = enqueue(add, [1, 2], countdown=60)
    assert seconds_waited(job) == pytest.approx(-60, abs=5)
    Job.objects.filter(pk=job.pk).update(due_at=Now() - timedelta(seconds=500))
    for _ in range(2):  # the second time because the message was lost
        lapse(job)
        sweeper.sender.send_due()
        published.clear()
        assert seconds_waited(job) == pytest.approx(500, abs=5)
    monkeypatch.setattr(republish, "send", lambda jobs: 1 / 0)
    lapse(job)
    sweeper.sender.send_due()
    assert seconds_waited(job) == pytest.approx(500, abs=5)
    assert seconds_until_due(job) <= 30  # due again, because sending failed


def test_two_concurrent_sweeps_send_each_job_once(monkeypatch):
    jobs = [enqueue(add, [1, 2], countdown=1) for _ in range(3)]
    lapse(*jobs)
    sent = []

    def publish(job, producer, **options):
        sent.append(str(job.pk))
        if len(sent) == 1:
            sweeper.sender.send_due()  # the second sweeper, when the first one has read all three jobs

    monkeypatch.setattr(messages, "send_one", publish)
    monkeypatch.setattr(republish, "messages_in", lambda queue, broker: 0)
    sweeper.sender.send_due()
    assert sorted(sent) == sorted(str(job.pk) for job in jobs)


def test_the_sweeper_at_first_sends_only_jobs_that_were_never_sent(published):
    """It does so until workers have had time to repeat claims that a database crash has lost."""
    enqueue_and_publish(1)
    published.clear()
    new = enqueue(add, [1, 2], countdown=1)
    lapse(*Job.objects.all())
    sweeper.sender.send_due(resend=False)
    assert published == [str(new.pk)]
    sweeper.sender.send_due()
    assert len(published) == 2


def test_the_sweeper_counts_the_messages_in_a_queue():
    broker = app.connection_for_write("memory://")
    assert messages.messages_in("new", broker) == 0
    queue = app.amqp.queues["new"]  # messages_in() has created its binding
    broker.Producer().publish("message", queue.routing_key, exchange=queue.exchange.name)
    assert messages.messages_in("new", broker) == 1


# Rounds


@pytest.mark.parametrize(
    # Nothing is recovered in the first half of a lease, nor in half a lease after 30 s.
    ("lease", "stands_still", "expected"),
    [(30, 0, [20, 30, 50, 60]), (30, 45, [20, 50, 60]), (10, 0, [10, 20, 30, 40, 50, 60])],
    ids=["database_away", "machine_stands_still", "short_lease"],
)
def test_the_sweeper_lets_workers_renew_leases_first(
    monkeypatch, settings, lease, stands_still, expected
):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LEASE_SECONDS": lease}
    recovered, resent, clock = [], [], itertools.count(0, 10)  # seconds
    now = [next(clock)]

    def wall_clock():
        return 1e9 + now[0] + stands_still * (now[0] >= 30)

    def sleep(seconds):
        now[0] = next(clock)
        if now[0] > 60:
            raise SystemExit

    def recover():
        recovered.append(now[0])
        if now[0] == 30:
            raise OperationalError("the database is away")

    clocks = {"monotonic": lambda: now[0], "time": wall_clock, "sleep": sleep}
    monkeypatch.setattr(sweeper_module, "time", SimpleNamespace(**clocks))
    monkeypatch.setattr(sweeper_module, "recover_lapsed", recover)
    monkeypatch.setattr(sweeper_module, "connection", database := Mock())
    monkeypatch.setattr(
        sweeper.sender, "send_due", lambda resend: resent.append(now[0]) if resend else None
    )
    with pytest.raises(SystemExit):
        sweeper.run()
    assert recovered == resent == expected
    assert database.close.called == (30 in expected)  # then the database was unavailable


@pytest.mark.parametrize(("countdown", "pause"), [(60, 5), (3, 3), (0.1, 0.5)])
def test_the_sweeper_wakes_up_when_a_countdown_ends(published, countdown, pause):
    """And needs no extra query to know when. The others ask for pauses, slots and blocked jobs."""
    enqueue(add, [1, 2])  # due for a check of its message in 30 s
    enqueue(add, [1, 2], countdown=countdown)
    with CaptureQueriesContext(connection) as captured:
        assert sweeper.sender.send_due() == pytest.approx(pause, abs=0.3)
    assert len(captured) == 3


def test_the_sweeper_stops_sending_in_time_to_check_leases(published, monkeypatch):
    now = itertools.count(0, 2)  # seconds; a round may take 5
    monkeypatch.setattr(republish, "time", SimpleNamespace(monotonic=lambda: next(now)))
    lapse(*(enqueue(add, [1, 2], countdown=1, queue=queue) for queue in "abcdef"))
    assert sweeper.sender.send_due() == 0
    assert 0 < len(published) < 6


@pytest.mark.parametrize("error, rounds", [(None, 1), (OperationalError("away"), 0)], ids=str)
def test_a_round_of_the_sweeper_stores_its_time(broker_down, monkeypatch, error, rounds):
    """Also without a broker, but not if the database fails during the round."""
    lapse(enqueue(add, [1, 2], countdown=1))
    monkeypatch.setattr(republish, "messages_in", lambda queue, broker: 0)
    monkeypatch.setattr(sweeper_module, "connection", Mock())
    if error:
        monkeypatch.setattr(sweeper.sender, "send_due", Mock(side_effect=error))
    monkeypatch.setattr(sweeper_module, "touch_liveness_file", Mock(side_effect=[None, SystemExit]))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for _ in range(2):  # rounds, for example of two Beats
        with pytest.raises(SystemExit):
            sweeper.run()
        sweeper_module.touch_liveness_file.side_effect = [None, SystemExit]
    assert Sweep.objects.filter(ended_at__lte=timezone.now()).count() == rounds
    assert error or broker_down


def test_a_sweeper_that_finds_the_broker_down_stops_and_changes_nothing(broker_down, monkeypatch):
    answers = [0]

    def messages_in(queue, broker):
        return answers.pop()  # the second time it raises IndexError

    monkeypatch.setattr(republish, "messages_in", messages_in)
    jobs = [enqueue(add, [1, 2], countdown=1) for _ in range(3)]
    lapse(*jobs)
    sweeper.sender.send_due()
    assert len(broker_down) == 2  # all three, and the first one alone
    assert all(seconds_until_due(job) <= 0 for job in jobs)
    assert not Job.objects.exclude(times_sent=0)


# What cannot be sent


def test_a_job_that_the_broker_refuses_delays_no_other(monkeypatch):
    """For example because it is too large, or because its queue does not exist."""
    sent = []

    def send_one(job, producer, **options):
        if job.args == [0, 0]:
            raise ValueError("too large")
        sent.append(str(job.pk))

    monkeypatch.setattr(messages, "send_one", send_one)
    monkeypatch.setattr(republish, "messages_in", lambda queue, broker: 0)
    monkeypatch.setattr(publish, "PUBLISH_PAUSE", 0)
    refused = [enqueue(add, [0, 0], queue=queue, countdown=1) for queue in "ab"]
    others = [enqueue(add, [1, 2], queue=queue, countdown=1) for queue in "abc"]
    lapse(*refused, *others)
    for _ in range(6):
        sweeper.sender.send_due()
    ids = {str(job.pk) for job in others}
    assert sorted(pk for pk in sent if pk in ids) == sorted(ids)
    assert all(seconds_until_due(job) > 0 for job in refused)


@pytest.mark.parametrize("tries", [1, 2])
def test_a_job_that_is_retried_while_others_are_refused_keeps_its_countdown(monkeypatch, tries):
    """A worker can have its message although the broker's answer is an error."""
    first, second = jobs = [enqueue(add, [1, 2], countdown=1) for _ in range(2)]
    lapse(*jobs)
    sent = []

    def send_one(job, producer, **options):
        sent.append(job.pk)
        if job.pk == first.pk and len(sent) == tries:
            claim(first.pk)
            requeue(Job.objects.filter(pk=first.pk), 3600, retries=1)
        if job.pk == second.pk or tries == 2:
            raise ValueError("too large")

    monkeypatch.setattr(messages, "send_one", send_one)
    monkeypatch.setattr(republish, "messages_in", lambda queue, broker: 0)
    sweeper.sender.send_due()
    assert sent.count(first.pk) == tries
    assert seconds_until_due(first) == pytest.approx(3600, abs=10)


@pytest.mark.parametrize(
    ("waiting", "is_used", "state"),
    [(0, True, "failed"), (1, True, "queued"), (0, False, "queued")],
    ids=["refused", "full", "takes nothing"],
)
def test_a_job_that_is_refused_five_times_fails_if_its_queue_takes_others(
    monkeypatch, waiting, is_used, state
):
    def send_one(job, producer, **options):
        raise ValueError("too large")

    monkeypatch.setattr(messages, "send_one", send_one)
    monkeypatch.setattr(republish, "messages_in", lambda queue, broker: waiting)
    job = enqueue(add, [0, 0], countdown=1)
    if is_used:
        claim(enqueue(add, [1, 2]).pk)
    for _ in range(republish.REFUSALS):
        lapse(job)
        sweeper.sender.send_due()
        assert sweeper.sender.refused == {"celery": "ValueError('too large')"}
    job.refresh_from_db()
    assert job.state == state
    assert state == "queued" or job.error == (
        "The broker refused it 5 times: ValueError('too large')"
    )


def test_a_queue_that_fails_delays_no_other(published, monkeypatch):
    """For example because it exists with other arguments."""
    refuse = messages_unless("bad", ValueError("inequivalent arg 'x-max-priority'"))
    monkeypatch.setattr(republish, "messages_in", refuse)
    bad, good = (enqueue(add, [1, 2], countdown=1, queue=q) for q in ("bad", "good"))
    lapse(bad, good)
    for _ in range(9):  # the sweeper takes queues in random order
        sweeper.sender.send_due()
    assert published == [str(good.pk)]
    assert seconds_until_due(bad) <= 0


def test_a_queue_with_many_jobs_delays_no_other(published, monkeypatch):
    monkeypatch.setattr(admission, "BATCH_SIZE", 10)
    many = enqueue_many([add.using(countdown=1, queue="many").s(1, 2)] * 100)
    few = [enqueue(add, [1, 2], countdown=1, queue=queue) for queue in "abcdef"]
    lapse(*many, *few)
    assert sweeper.sender.send_due() == 5
    assert len(published) == 106
    assert max(published.index(str(job.pk)) for job in few) < 10 + len(few)


# Memory


def test_the_sweeper_updates_100_rows_with_one_statement(published, monkeypatch):
    """It keeps at most 100 jobs in memory at once."""
    in_memory = []
    monkeypatch.setattr(republish, "send", lambda jobs: in_memory.append(len(jobs)))
    enqueue_many([add.using(countdown=1).s(1, 2)] * 250)
    Job.objects.update(send_at=Now() - timedelta(seconds=1))
    with CaptureQueriesContext(connection) as captured:
        sweeper.sender.send_due()
    assert len([query for query in captured if query["sql"].startswith("UPDATE")]) == 3
    assert not any('"result"' in query["sql"] for query in captured)
    assert in_memory == [100, 100, 50]
    assert set(Job.objects.values_list("times_sent", flat=True)) == {1}
