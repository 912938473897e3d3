"""Never more than N task functions of a key, and no slot stays empty: threads, real transactions.

More rounds: ROUNDS=3000 (the default is 150).
"""

import itertools
import random
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from queue import Empty, Queue

import pytest
from celery import shared_task
from celery.exceptions import Ignore
from django.db import connection, transaction
from django.db.models import Count, Q
from helpers import ROUNDS as MANY_ROUNDS
from helpers import fail_run, in_thread, race, run_of, succeed_run, sweeper

from durable_jobs import admission, enqueue, pauses, publish
from durable_jobs.actions import cancel, run_again
from durable_jobs.beat import republish
from durable_jobs.database import Now, skip_locked
from durable_jobs.models import Job, Key
from durable_jobs.states import ADMITTED, HAS_SLOT, LEASED, STILL_RUNNING, UNFINISHED
from durable_jobs.tasks import JobTask
from durable_jobs.worker import lease
from durable_jobs.worker.runs import Run

pytestmark = pytest.mark.django_db(transaction=True)

ROUNDS = MANY_ROUNDS // 3


@shared_task(base=JobTask, limit=lambda key: f"alone:{key}")
def alone(key):
    pass


@pytest.fixture(autouse=True)
def messages(monkeypatch, settings):
    """The messages that were sent. No worker takes them, except in work()."""
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has one transaction at a time: set DATABASE_URL=postgres://…")
    sent = Queue()

    def send(jobs):
        for job in jobs:
            sent.put(job)

    monkeypatch.setattr(publish, "send", send)
    monkeypatch.setattr(republish, "send", send)
    monkeypatch.setattr(republish, "messages_in", lambda *args: sent.qsize())
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"alone": "1"}}
    return sent


def store(keys, each, started=1):
    """Store jobs, `each` for each key. Returns the Runs of the first ones, and the other jobs."""
    runs, rest = [], []
    for key in range(keys):
        fields = [enqueue.new_fields(alone, [key], None, Now()) for _ in range(each)]
        jobs = [Job.objects.create(**field) for field in fields]
        for job in jobs[:started]:
            Job.objects.filter(pk=job.pk).update(blocked_by=None, send_at=Now())
            runs.append(run_of(job))
            assert runs[-1].claim()
        rest.append(jobs[started:])
    return runs, rest


def end(run, outcome=succeed_run):
    with run, suppress(Ignore):
        outcome(run)


def retry(run):
    run.retry = {"delay": 3600, "args": [0], "kwargs": {}, "retries": 1}
    run.try_again()


def used_and_blocked():
    """Return {key: (slots in use, blocked jobs that are due)}."""
    used, blocked = ADMITTED | LEASED, Q(blocked_by__isnull=False, due_at__lte=Now())
    rows = Job.objects.filter(limit_key__isnull=False).order_by().values_list("limit_key")
    rows = rows.annotate(used=Count("pk", filter=used), blocked=Count("pk", filter=blocked))
    return {key: counts for key, *counts in rows}


def assert_full(number=1):
    """No key uses more slots than `number`, nor fewer while jobs of it wait."""
    wrong = {
        key: (used, blocked)
        for key, (used, blocked) in used_and_blocked().items()
        if used > number or (blocked and used < number)
    }
    assert not wrong, (len(wrong), wrong)


# No slot stays empty, without the sweeper


@pytest.mark.parametrize("outcome", [succeed_run, fail_run, retry, Run.release])
def test_a_job_is_stored_while_the_last_one_ends(outcome):
    runs, _ = store(ROUNDS, 1)
    race(ROUNDS, lambda n: end(runs[n], outcome), lambda n: alone.enqueue(n))
    assert_full()


@pytest.mark.parametrize("number", [2, 3])
def test_runs_of_a_key_end_while_jobs_are_stored(settings, number):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"alone": str(number)}}
    runs, _ = store(ROUNDS, number + 1, started=number)
    ends = [
        lambda n, slot=slot: end(runs[number * n + slot], random.choice([succeed_run, fail_run]))
        for slot in range(number)
    ]
    race(ROUNDS, *ends, lambda n: alone.enqueue(n), lambda n: alone.enqueue(n))
    assert_full(number)


def test_an_admission_meets_a_hand_over(settings):
    """N was raised: admit() must not choose the job that the run has chosen, nor one too many."""
    runs, _ = store(ROUNDS, 4)
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"alone": "2"}}
    key = "alone:{}".format
    race(ROUNDS, lambda n: end(runs[n]), *[lambda n: admission.admit([key(n)])] * 2)
    assert_full(2)


def test_a_lowered_number_holds_while_runs_end(settings):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"alone": "3"}}
    runs, _ = store(ROUNDS, 6, started=3)
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"alone": "2"}}
    race(ROUNDS, *(lambda n, slot=slot: end(runs[3 * n + slot]) for slot in range(3)))
    assert_full(2)


def test_the_next_job_is_cancelled_while_the_one_before_ends():
    runs, rest = store(ROUNDS, 3)
    race(ROUNDS, lambda n: end(runs[n]), lambda n: cancel(rest[n][0]))
    assert_full()


def test_a_job_is_stored_while_the_one_with_the_slot_is_cancelled():
    _, rest = store(ROUNDS, 1, started=0)
    for [job] in rest:
        admission.admit([job.limit_key])
    race(ROUNDS, lambda n: cancel(rest[n][0]), lambda n: alone.enqueue(n))
    assert_full()


def test_a_job_is_cancelled_while_its_task_function_ends():
    runs, _ = store(ROUNDS, 3)

    def cancel_run(n):
        cancel(Job.objects.filter(pk=runs[n].job_id))

    race(ROUNDS, lambda n: end(runs[n]), cancel_run, lambda n: alone.enqueue(n))
    assert_full()


def test_a_job_is_recovered_while_another_one_is_stored():
    runs, _ = store(ROUNDS, 1)

    def recover(n):
        lease.recover(Job.objects.filter(pk=runs[n].job_id))

    race(ROUNDS, recover, lambda n: alone.enqueue(n))
    assert_full()


def test_a_cancelled_task_function_ends_while_a_job_is_stored_and_the_sweeper_looks():
    runs, rest = store(ROUNDS, 2)
    for run in runs:
        cancel(Job.objects.filter(pk=run.job_id))
    assert {used for used, blocked in used_and_blocked().values()} == {1}

    def look(n):
        if n % 10 == 0:
            admission.admit_due()

    race(ROUNDS, lambda n: end(runs[n]), lambda n: alone.enqueue(n), look)
    assert_full()


def test_a_job_runs_again_while_the_one_before_ends():
    runs, rest = store(ROUNDS, 2)
    for [job] in rest:
        cancel(job)
    race(ROUNDS, lambda n: end(runs[n]), lambda n: run_again(Job.objects.get(pk=rest[n][0].pk)))
    assert_full()


def test_two_sweepers_an_admission_and_an_end_at_once(settings):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"alone": "2"}}
    runs, _ = store(ROUNDS, 4)
    key = "alone:{}".format

    def look(n):
        if n % 10 == 0:
            admission.admit_due()

    race(ROUNDS, lambda n: end(runs[n]), lambda n: admission.admit([key(n)]), look, look)
    admission.admit_due()
    assert_full(2)


def test_a_rate_is_kept_while_jobs_start_and_others_are_stored(settings):
    """Both starts move the time of the next one, also the first ones of a key. None is overlooked."""
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"alone": "20/h"}}
    _, rest = store(ROUNDS, 5, started=0)
    runs = []
    for jobs in rest:
        Job.objects.filter(pk__in=[job.pk for job in jobs[:2]]).update(
            blocked_by=None, send_at=Now()
        )
        runs.append([run_of(job) for job in jobs[:2]])
    race(
        ROUNDS,
        lambda n: runs[n][0].claim() and end(runs[n][0]),
        lambda n: runs[n][1].claim() and end(runs[n][1]),
        lambda n: admission.admit([f"alone:{n}"]),
        lambda n: alone.enqueue(n),
    )
    admission.admit_due()
    assert {used for used, _ in used_and_blocked().values()} == {0}
    two_intervals = Now() + timedelta(seconds=2 * 3600 / 19 - 60)
    assert Key.objects.filter(next_at__gt=two_intervals).count() == ROUNDS


def test_a_pause_and_its_end_meet_claims():
    """A job runs, or is due when the pause has ended."""
    jobs = [alone.enqueue(n) for n in range(20)]
    Job.objects.filter(blocked_by__isnull=False).update(blocked_by=None, send_at=Now())
    runs = [run_of(job) for job in jobs]

    def claim(n):
        assert runs[n].claim() or runs[n].put_back_if_paused() or runs[n].claim()

    def pause(n):
        pauses.pause(alone.name)
        time.sleep(random.choice([0, 0.002]))
        pauses.resume(alone.name)

    race(20, claim, pause)
    admission.admit_due()
    assert Job.objects.filter(HAS_SLOT).count() == 20


# What is locked, or lost


def test_an_admission_waits_a_second_for_the_lock_and_leaves_the_rest_to_the_sweeper(caplog):
    _, [[job]] = store(1, 1, started=0)
    Key.objects.create(key=job.limit_key)
    with transaction.atomic():
        Key.objects.select_for_update().get()
        in_thread(lambda: admission.admit([job.limit_key]))
        assert "could not admit jobs of alone:0" in caplog.text
        in_thread(lambda: admission.admit_due())  # it does not wait
        assert len(caplog.records) == 1
        assert used_and_blocked() == {"alone:0": [0, 1]}
    admission.admit_due()
    assert_full()


def test_a_run_that_ends_leaves_out_a_locked_job():
    [run], [[first, second]] = store(1, 3)
    with transaction.atomic():
        Job.objects.select_for_update().get(pk=first.pk)
        in_thread(lambda: end(run))
    assert Job.objects.get(pk=second.pk).send_at


def test_the_next_job_is_sent_if_the_answer_of_the_commit_is_lost(
    lost_answers,
    messages,
):
    [run], [[job]] = store(1, 2)
    lost_answers.append(True)
    end(run)
    connection.close()
    assert messages.get_nowait() == job
    assert_full()


def test_an_admission_leaves_no_setting_in_the_callers_transaction():
    with transaction.atomic(), connection.cursor() as cursor:
        job = alone.enqueue(1)
        admission.admit([job.limit_key])
        for name in "lock_timeout", "idle_in_transaction_session_timeout":
            cursor.execute(f"SHOW {name}")
            assert cursor.fetchall() == [("0",)]


# All at once


class Witness:
    """Counts the task functions of each key that run."""

    def __init__(self, number):
        self.number, self.lock, self.running, self.most = number, threading.Lock(), Counter(), 0

    def run(self, key):
        with self.lock:
            self.running[key] += 1
            count = self.running[key]
            self.most = max(self.most, count)
        time.sleep(random.uniform(0, 0.03))
        with self.lock:
            self.running[key] -= 1
        assert count <= self.number, key


def crash(run):
    """The worker dies: its lease lapses, whether its job runs or was cancelled."""
    is_own = Q(run_token=run.token) | STILL_RUNNING
    Job.objects.filter(is_own, pk=run.job_id).update(lease_ends_at=Now())


def retry_soon(run):
    run.retry = {"delay": 0, "args": [0], "kwargs": {}, "retries": run.request.retries + 1}
    run.try_again()


OUTCOMES = [succeed_run] * 4 + [fail_run, retry_soon, retry_soon, Run.release, crash]


@pytest.mark.parametrize("number", [1, 2])
def test_never_more_task_functions_than_the_limit_whatever_happens(
    messages, settings, monkeypatch, number
):
    changes = {"LIMITS": {"alone": str(number)}, "MAX_CRASHES": 100}
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | changes
    monkeypatch.setattr(lease, "RECOVERY_DELAY", 0)
    witness, keys, over, calm = Witness(number), 2, threading.Event(), threading.Event()

    def work(_):
        while not over.is_set():
            with suppress(Empty):
                run = run_of(messages.get(timeout=0.01))
                # As JobTask.__call__() does.
                if not run.claim() and (run.put_back_if_paused() or not run.claim()):
                    continue
                outcome = succeed_run if calm.is_set() else random.choice(OUTCOMES)
                if outcome is crash:
                    witness.run(run.limit_key)
                    crash(run)
                else:
                    with run, suppress(Ignore):
                        witness.run(run.limit_key)
                        outcome(run)

    def look(_):
        while not over.is_set():
            lease.recover(Job.objects.filter(lease_ends_at__lt=Now()))
            with suppress(ValueError):
                sweeper.sender.send_due(resend=False)
            time.sleep(0.002)

    def some(**fields):
        one = Job.objects.filter(**fields).order_by("?")[:1]
        return Job.objects.filter(pk__in=one.values("pk"))

    def disturb(n):
        kind = n % 8
        if kind < 5:
            alone.enqueue(random.randrange(keys))
        elif kind == 5:
            cancel(some(finished_at=None))
        elif kind == 6:
            for job in Job.objects.filter(state__in=["failed", "cancelled"]).order_by("?")[:2]:
                with suppress(ValueError):
                    run_again(job)
        elif n % 3:
            with transaction.atomic():
                skip_locked(some(state="queued").filter(state="queued")).delete()
        else:
            pauses.pause("celery")
            time.sleep(0.005)
            pauses.resume("celery")

    def disturb_all(_):
        for n in itertools.count():
            disturb(n)
            # A few rounds may be over before as many functions of a key have met.
            if over.is_set() or (n >= ROUNDS and witness.most == number):
                break
            assert n < 10 * ROUNDS, "the limit was never reached"
        calm.set()
        until = time.monotonic() + 120
        try:
            while Job.objects.filter(UNFINISHED).exists():
                assert time.monotonic() < until, used_and_blocked()
                time.sleep(0.02)
        finally:
            over.set()

    def or_end(function):
        def call(n):
            try:
                function(n)
            except BaseException:
                over.set()  # so that the other threads end
                raise

        return call

    race(1, *map(or_end, [work, work, work, work, look, look, disturb_all]))
    lease.recover(Job.objects.filter(lease_ends_at__lt=Now()))
    assert not Job.objects.filter(HAS_SLOT).exists()


def test_one_at_a_time_keeps_the_order(messages):
    """Many threads work, and the jobs start in the order in which they were stored."""
    with transaction.atomic():
        jobs = [alone.enqueue(1) for _ in range(60)]
    order, lock, until = [], threading.Lock(), time.monotonic() + 60

    def work(_):
        while len(order) < 60 and time.monotonic() < until:
            with suppress(Empty):
                run = run_of(messages.get(timeout=0.01))
                assert run.claim()
                with run:
                    with lock:
                        order.append(run.job_id)
                    succeed_run(run)

    race(1, *[work] * 4)
    assert order == [job.pk for job in jobs]
