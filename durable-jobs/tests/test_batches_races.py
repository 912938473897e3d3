"""Batches end exactly once, whatever happens at the same moment: threads, real transactions.

More rounds: ROUNDS=3000 (the default is 150).
"""

import random
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import timedelta

import pytest
from celery import shared_task
from celery.exceptions import Ignore
from django.db import connection, transaction
from django.utils import timezone
from helpers import ROUNDS, fail_run, finish, in_thread, race, run_of, run_while_open, succeed_run

from durable_jobs import batches, messages
from durable_jobs.beat import purge
from durable_jobs.enqueue import insert_many, new_fields
from durable_jobs.models import Batch, Job
from durable_jobs.states import UNFINISHED
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db(transaction=True)


@shared_task(base=JobTask)
def step(*args):
    pass


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has one transaction at a time: set DATABASE_URL=postgres://…")
    monkeypatch.setattr(messages, "send_one", lambda *args, **options: None)


def store(rounds, members, steps=None):
    """Store batches quickly. Each has this many members; the first has a next job if `steps`.

    Returns the batches and, for each one, the Runs of its members, which have claimed them.
    """
    new = [Batch(on_success=batches.planned(step.si())) for _ in range(rounds)]
    Batch.objects.bulk_create(new)
    fields = new_fields(step, [], None, timezone.now())
    jobs = [Job(**fields, batch=batch) for batch in new for _ in range(members)]
    insert_many(fields["due_at"], jobs)
    runs = list(map(started, jobs))
    for run in runs[::members] if steps else ():
        run.next_jobs = [batches.planned(step.si())]
    return new, [runs[start : start + members] for start in range(0, len(runs), members)]


def started(job):
    run = run_of(job)
    assert run.claim()
    return run


def end_all_members(batch):
    while queued := list(batch.jobs.filter(state="queued")):
        for job in queued:
            succeed_run(started(job))


def assert_ended_once(new):
    """Each of these batches has ended. Each that succeeded has started its callback, once."""
    states = dict(Batch.objects.filter(pk__in=[each.pk for each in new]).values_list("pk", "state"))
    assert "open" not in states.values(), Counter(states.values())
    callbacks = Counter(Job.objects.filter(follows__in=states).values_list("follows", flat=True))
    assert callbacks == Counter(pk for pk, state in states.items() if state == "succeeded")
    assert not Job.objects.filter(UNFINISHED, batch__in=states).exists()


SLOW_COMMIT = """
CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_sleep(0.005); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER pause AFTER UPDATE ON durable_jobs_job DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION pause()
"""


@pytest.fixture
def slow_commit():
    """Let each commit take some milliseconds: then all ends of a round are uncommitted at once."""
    connection.cursor().execute(SLOW_COMMIT)
    yield
    connection.cursor().execute("DROP FUNCTION pause CASCADE")


# The last jobs end


@pytest.mark.parametrize("second", [succeed_run, fail_run])
def test_the_last_two_jobs_end_at_the_same_moment(second):
    new, runs = store(ROUNDS, 2)
    race(ROUNDS, lambda n: succeed_run(runs[n][0]), lambda n: second(runs[n][1]))
    assert_ended_once(new)


def test_the_last_three_jobs_end_while_none_has_committed(slow_commit):
    new, runs = store(50, 3)
    race(50, *(lambda n, index=index: succeed_run(runs[n][index]) for index in range(3)))
    assert_ended_once(new)


def test_many_jobs_end_in_many_threads():
    new, runs = store(5, 320)
    for each in runs:
        random.shuffle(each)
    race(200, *(lambda n, index=index: succeed_run(runs[n // 40][n % 40 * 8 + index])
                for index in range(8)))  # fmt: skip
    assert_ended_once(new)


def test_an_end_takes_no_lock_while_others_are_unfinished(caplog):
    """So thousands of jobs that end do not wait for each other."""
    [batch], [runs] = store(1, 3)
    with transaction.atomic():
        assert Batch.objects.select_for_update().get(pk=batch.pk)
        in_thread(lambda: succeed_run(runs[0]))
        in_thread(lambda: fail_run(runs[1]))
    assert not caplog.records  # end() waits for a second, then warns
    assert batch.jobs.filter(UNFINISHED).count() == 1


def test_the_end_waits_for_a_locked_batch_no_longer_than_a_second(caplog):
    [batch], [[run]] = store(1, 1)
    with transaction.atomic():
        assert Batch.objects.select_for_update().get(pk=batch.pk)
        in_thread(lambda: succeed_run(run))
    assert "has not ended yet" in caplog.text
    batches.end_all()  # as the sweeper does
    assert_ended_once([batch])


def test_a_step_of_a_chain_is_stored_while_another_job_ends():
    """The batch has an unfinished job at each moment: the first step, or the second one."""
    new, runs = store(ROUNDS, 2, steps=True)
    race(ROUNDS, lambda n: succeed_run(runs[n][0]), lambda n: succeed_run(runs[n][1]))
    assert not Batch.objects.exclude(ended_at=None).exists()
    assert Job.objects.filter(UNFINISHED).count() == ROUNDS
    for batch in new[:20]:
        end_all_members(batch)
    assert_ended_once(new[:20])


# A job is added


def test_a_job_is_added_while_the_last_one_ends():
    """It joins, and the batch waits for it, or enqueue() refuses it. The first two rounds are fixed."""
    new, runs = store(ROUNDS, 1)
    is_added, has_ended = threading.Event(), threading.Event()

    def end(number):
        if number == 0:
            is_added.wait(20)
        succeed_run(runs[number][0])
        if number == 1:
            has_ended.set()

    def add(number):
        if number == 1:
            has_ended.wait(20)
        try:
            with transaction.atomic():
                time.sleep(random.choice([0, 0, 0.002]))
                job = batches.add(new[number], step.s())
                time.sleep(random.choice([0, 0.002]))
            return job
        except ValueError:
            return None
        finally:
            is_added.set()

    _, added = race(ROUNDS, end, add)
    outcomes = Counter(bool(job) for job in added)
    assert outcomes[True] and outcomes[False], outcomes
    for batch, job in zip(new, added, strict=True):
        batch.refresh_from_db()
        assert bool(batch.ended_at) == (job is None)
        assert batch.jobs.filter(UNFINISHED).count() == (job is not None)
        end_all_members(batch)
    assert_ended_once(new)


def test_the_last_end_waits_for_a_transaction_that_adds_a_job():
    [batch], [[run]] = store(1, 1)
    run_while_open(lambda: batches.add(batch, step.s()), lambda: succeed_run(run))
    batch.refresh_from_db()
    assert batch.ended_at is None
    end_all_members(batch)
    assert_ended_once([batch])


def test_a_job_that_waits_for_the_end_of_the_batch_is_refused():
    [batch], [[run]] = store(1, 1)
    assert finish(run.row, "succeeded")
    with pytest.raises(ValueError, match="the batch has ended"):
        run_while_open(lambda: batches.end(batch.pk), lambda: batches.add(batch, step.s()))
    assert_ended_once([batch])


def test_many_transactions_add_jobs_at_once():
    [batch], [[run]] = store(1, 1)

    def add(number):
        with transaction.atomic():
            batches.add(batch, step.s())

    with transaction.atomic():  # an adding transaction that stays open delays no other
        batches.add(batch, step.s())
        race(20, add, add, add, add)
    succeed_run(run)
    assert batch.jobs.filter(UNFINISHED).count() == 81
    end_all_members(batch)
    assert_ended_once([batch])


# Cancelled, ended by the sweeper, deleted


@pytest.mark.parametrize("_", range(5))
def test_a_batch_is_cancelled_while_jobs_end_and_enqueue_the_next_ones(_):
    batch, stop = batches.enqueue([step.s()] * 24, on_success=step.si()), threading.Event()
    # No worker takes it, so the batch is open until it is cancelled.
    batches.add(batch, step.using(queue="io").s())

    def work(number):
        """Run what is queued, as a worker does."""
        while not stop.is_set():
            for job in batch_jobs.filter(state="queued").order_by("?")[:3]:
                run = run_of(job)
                if run.claim():
                    run.next_jobs = [batches.planned(step.si())] * random.randrange(2)
                    with suppress(Ignore):  # cancelled
                        succeed_run(run)

    def cancel(number):
        try:
            time.sleep(random.uniform(0, 0.1))
            return batches.cancel(batch)
        finally:
            stop.set()

    batch_jobs = Job.objects.exclude(batch=None).exclude(queue="io")
    *_, [count] = race(1, work, work, work, cancel)
    assert count and batch.state == "cancelled"
    assert not Batch.objects.filter(ended_at=None).exists()
    assert not Job.objects.filter(UNFINISHED).exists()


def test_a_batch_can_be_cancelled_while_a_long_transaction_adds_a_job():
    [batch], _ = store(1, 1)
    with transaction.atomic():
        batches.add(batch, step.s())
        assert in_thread(lambda: batches.cancel(Batch.objects.get())) == 1
    batch.refresh_from_db()
    assert batch.state == "open"
    end_all_members(batch)
    batch.refresh_from_db()
    assert batch.state == "cancelled"


def test_two_sweeps_and_an_end_at_once():
    new, runs = store(ROUNDS // 3, 1)
    for [run] in runs:
        assert finish(run.row, "succeeded")

    def end(number):
        batches.end(new[number].pk)

    def sweep(number):
        if number % 10 == 0:
            batches.end_all()

    race(len(new), end, end, sweep, sweep)
    assert_ended_once(new)
    before = list(Batch.objects.values("pk", "ended_at").order_by("pk"))
    for number in range(10):
        end(number)
    assert list(Batch.objects.values("pk", "ended_at").order_by("pk")) == before


@pytest.mark.parametrize("use", ["enqueue", "cancel", "nothing"])
def test_a_batch_leaves_no_setting_in_the_callers_transaction(use):
    """Else PostgreSQL would end the transaction of a caller that computes for ten seconds."""
    [batch], _ = store(1, 1)
    calls = {
        "enqueue": lambda: batches.add(batch, step.s()),
        "cancel": lambda: batches.cancel(batch),
        "nothing": lambda: batches.enqueue([]),
    }
    with transaction.atomic(), connection.cursor() as cursor:
        calls[use]()
        for name in "lock_timeout", "idle_in_transaction_session_timeout":
            cursor.execute(f"SHOW {name}")
            assert cursor.fetchall() == [("0",)]


def age(new, state):
    """Let all jobs of these batches have ended long ago, except those that run."""
    old = timezone.now() - timedelta(days=99)
    jobs = Job.objects.filter(batch__in=new, finished_at__isnull=False)
    jobs.update(finished_at=old, state=state)
    Batch.objects.filter(pk__in=[each.pk for each in new], ended_at__isnull=False).update(
        ended_at=old
    )


def test_a_purge_deletes_no_old_job_of_a_batch_that_ends():
    """What comes next reads the results of all jobs."""
    new, runs = store(ROUNDS, 2)
    for first, _ in runs:
        assert finish(first.row, "succeeded")
    age(new, "succeeded")

    def delete(number):
        purge.of_jobs().delete(Job.objects.filter(pk=runs[number][0].job_id))

    race(ROUNDS, lambda n: succeed_run(runs[n][1]), delete)
    assert_ended_once(new)
    assert Job.objects.filter(batch__in=new).count() == 2 * ROUNDS


def test_a_purge_deletes_no_job_of_a_batch_that_runs_again():
    new, runs = store(ROUNDS, 1)
    for run, *_ in runs:
        fail_run(run)
    assert_ended_once(new)
    age(new, "failed")

    def delete(number):
        purge.of_jobs().delete(Job.objects.filter(pk=runs[number][0].job_id))

    again, _ = race(ROUNDS, lambda n: batches.run_failed_again(new[n]), delete)
    for batch, jobs in zip(new, again, strict=True):
        assert batch.jobs.filter(state="queued").count() == len(jobs)
        batch.refresh_from_db()
        assert batch.state == ("open" if jobs else "failed")


# The answer of a COMMIT is lost


def test_a_step_is_stored_once_if_the_answer_of_the_commit_is_lost(lost_answers):
    new, [[run]] = store(1, 1, steps=True)
    lost_answers.append(True)
    with pytest.raises(Ignore):
        succeed_run(run)
    [following] = Job.objects.filter(follows=run.job_id)
    connection.close()
    succeed_run(started(following))
    assert_ended_once(new)


def test_a_batch_ends_once_if_the_answer_of_the_commit_is_lost(lost_answers):
    new, [[run]] = store(1, 1)
    lost_answers.append(True)
    succeed_run(run)
    connection.close()
    batches.end_all()
    assert_ended_once(new)
