"""Limits: how many jobs with the same key run at once, and how many start in a period."""

import signal
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from asgiref.sync import async_to_sync
from celery import chain, chord, current_app, group, shared_task
from celery.beat import ScheduleEntry, Scheduler
from celery.exceptions import WorkerLostError
from django.core.exceptions import ImproperlyConfigured
from django.db import Error, connection
from django.db.models import F
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from test_jobs import CLAIM

from jobs import batches, lease, limits, messages, shutdown, sweep, turns, updates, worker
from jobs.beat import OncePerDueTime
from jobs.expressions import QUEUED
from jobs.models import Batch, Job, Pause, Start
from jobs.runs import Run, runs
from jobs.tasks import JobError, JobTask
from jobs.views import EnqueueMixin

try:
    from django.tasks import task
except ImportError:  # Django 5.2
    from django_tasks import task

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask, limit="tenant:{tenant}")
def call(tenant, number=0):
    return number


@shared_task(base=JobTask, limit="one")
def alone(number=0):
    return number


@shared_task(base=JobTask, limit="api")
def ask(number=0):
    return number


@task(celery={"limit": "tenant:{tenant}"})
def django_call(tenant, number=0):
    return number


@task(takes_context=True, celery={"limit": "tenant:{tenant}"})
def context_call(context, tenant, number=0):
    return number


@shared_task(base=JobTask, bind=True, limit="tenant:{tenant}", autoretry_for=(OSError,))
def bound_call(self, tenant, number=0):
    return number


@shared_task(base=JobTask, limit="tenant:{tenant}")
async def async_call(tenant, number=0):
    return number


@shared_task(base=JobTask, limit="tenant:{row[tenant]}:{row[kind]}:{number}")
def import_row(row, number=0):
    return row


@shared_task(base=JobTask)
def free(number=0):
    return number


@pytest.fixture
def sent(monkeypatch):
    """The ids of the jobs whose messages were sent. No worker takes them."""
    ids = []
    monkeypatch.setattr(messages, "send_one", lambda job, *args, **options: ids.append(job.pk))
    monkeypatch.setattr(sweep, "messages_in", lambda *args: len(ids))
    return ids


def start(job):
    """Claim a job as a worker does. Returns its Run."""
    run = Run(job.pk, task=call, limit_key=job.limit_key, **CLAIM)
    assert run.claim()
    return run


def end(run, result=None):
    with run:
        run.succeed(result)


def held(key="one"):
    return Job.objects.filter(held_by=key).count()


def test_a_job_over_its_limit_is_held(sent, commit):
    with commit():
        jobs = [call.enqueue(7) for _ in range(3)]
        other = call.enqueue(8)
    assert sent == [jobs[0].pk, jobs[1].pk, other.pk]
    jobs[2].refresh_from_db()
    assert (jobs[2].held_by, jobs[2].sweep_at, jobs[2].times_sent) == ("tenant:7", None, 0)
    assert jobs[2].state == "queued" and jobs[2].limit_key == "tenant:7"


def test_a_run_hands_its_place_to_the_oldest_job(sent, commit):
    with commit():
        jobs = Job.objects.enqueue_many(alone, [[number] for number in range(3)])
    for number, job in enumerate(jobs):
        assert sent == [each.pk for each in jobs[: number + 1]]
        with commit():
            end(start(job))
    assert not held()


def test_a_failed_run_and_a_retry_hand_over_the_place(sent, commit):
    with commit():
        jobs = Job.objects.enqueue_many(alone, [[number] for number in range(3)])
    run = start(jobs[0])
    with commit(), run:
        try:
            raise JobError("no")
        except JobError:
            run.fail()
    run = start(jobs[1])
    run.retry = {"delay": 60, "args": [], "kwargs": {}, "retries": 1}
    with commit(), run:
        run.try_again()
    assert sent == [job.pk for job in jobs]
    jobs[1].refresh_from_db()
    assert (jobs[1].state, jobs[1].held_by, jobs[1].sweep_at) == ("queued", "one", None)
    assert jobs[1].due_at > timezone.now() + timedelta(seconds=50)


def test_a_cancelled_body_keeps_its_place(sent, commit):
    with commit():
        first, second = Job.objects.enqueue_many(alone, [[1], [2]])
    run = start(first)
    with commit():
        first.cancel()
    assert sent == [first.pk]
    with pytest.raises(ValueError, match="its body still runs"):
        Job.objects.get(pk=first.pk).run_again()
    with commit(), run:
        assert not run.write(updates.finish, run.row, "failed")
    assert sent == [first.pk, second.pk]
    with commit():
        Job.objects.get(pk=first.pk).run_again()
    assert held() == 1


def test_a_rate_counts_starts_in_the_period(sent, commit):
    with commit():
        jobs = Job.objects.enqueue_many(ask, [[number] for number in range(5)])
    assert len(sent) == 3
    for job in jobs[:3]:
        end(start(job))
    assert Start.objects.count() == 3
    sweep.send_due()
    assert len(sent) == 3
    Start.objects.update(started_at=F("started_at") - timedelta(hours=1))
    sweep.send_due()
    assert sent == [job.pk for job in jobs]


def test_the_sweep_lets_held_jobs_go(sent):
    jobs = Job.objects.enqueue_many(call, [[7, number] for number in range(4)])
    sweep.send_due()
    assert sent == [job.pk for job in jobs[:2]]
    sweep.send_due()
    assert sent == [job.pk for job in jobs[:2]]


def test_jobs_run_in_tests_whatever_their_limits_say(run_jobs, commit):
    with commit():
        first = Job.objects.enqueue_many(ask, [[number] for number in range(10)])
    assert not Job.objects.exclude(state="succeeded").exists()
    Job.objects.enqueue_many(ask, [[number] for number in range(10)])
    run_jobs()
    assert Job.objects.filter(state="succeeded").count() == 20
    assert len(first) == 10


def test_a_paused_job_is_held_when_a_worker_claims_it(sent, commit):
    with commit():
        job = Job.objects.enqueue("x" and alone, [1], queue="io")
    Pause.objects.pause("io", "SMTP is down")
    run = Run(job.pk, task=alone, limit_key="one", **CLAIM)
    assert not run.claim()
    run.hold_if_paused()
    job.refresh_from_db()
    assert (job.held_by, job.sweep_at, job.times_sent) == ("pause:io", None, 0)
    assert turns.reasons([job])[job.pk].endswith(": SMTP is down")
    sent.clear()
    with commit():
        Pause.objects.resume("io")
    sweep.send_due()
    sweep.send_due()
    assert sent == [job.pk]


# Each way to enqueue a job


def in_view():
    view = EnqueueMixin()
    view.request, view.job_id = SimpleNamespace(user=None, headers={}), uuid.uuid4()
    view.enqueue(call, [7])


def in_open_batch():
    with Batch.objects.open() as batch:
        batch.enqueue(call, [7])


def in_chain():
    end(start_any(chain(free.si(1), call.si(7)).apply_async()))


def with_then():
    run = start_any(free.enqueue())
    run.next_steps.append([batches.step(call, [7])])
    end(run)


def start_any(job):
    run = Run(getattr(job, "pk", None) or Job.objects.get(task=free.name).pk, task=free, **CLAIM)
    assert run.claim()
    return run


def by_beat():
    beat = SimpleNamespace(app=current_app, scheduler=Scheduler(current_app, lazy=True))
    entry = ScheduleEntry("call", call.name, schedule=timedelta(hours=1), args=[7], app=current_app)
    with patch("jobs.beat.close_old_connections"):
        OncePerDueTime(beat).apply_async(entry)


def fail_and_run_again(again):
    job = call.enqueue(7)
    updates.finish(Job.objects.filter(pk=job.pk), "failed")
    again(Job.objects.get(pk=job.pk))


def batch_again():
    batch = Batch.objects.enqueue(call, [[7]])
    updates.finish(batch.jobs.all(), "failed")
    batches.end(batch.pk)
    batch.run_failed_again()


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
    "unique": lambda: Job.objects.enqueue(call, [7], unique="x", idempotency_key="y"),
    "enqueue_many": lambda: Job.objects.enqueue_many(call, [[7]]),
    "Django": lambda: django_call.enqueue(7),
    "context": lambda: context_call.enqueue(7),
    "bound": lambda: bound_call.delay(7),
    "async": lambda: async_call.delay(7),
    "send_task": lambda: current_app.send_task(call.name, [7]),
    "Beat": by_beat,
    "EnqueueMixin": in_view,
    "run_again": lambda: fail_and_run_again(lambda job: job.run_again()),
    "queryset": lambda: fail_and_run_again(lambda job: Job.objects.all().run_again()),
    "batch": lambda: Batch.objects.enqueue(call, [[7]]),
    "Batch.enqueue": lambda: Batch.objects.enqueue(call, []) and in_open_batch(),
    "run_failed_again": batch_again,
    "chain": in_chain,
    "group": lambda: group([call.si(7), free.si()]).apply_async(),
    "chord": lambda: chord([call.si(7)], free.si())(),
    "then": with_then,
}


@pytest.mark.parametrize("door", DOORS)
def test_each_way_to_enqueue_a_job_obeys_its_limit(sent, door):
    DOORS[door]()
    job = Job.objects.exclude(limit_key=None).get()
    assert (job.limit_key, job.held_by, job.sweep_at) == ("tenant:7", "tenant:7", None)
    assert (job.times_sent, job.state) == (0, "queued")


def test_a_message_of_an_app_that_does_not_know_the_job_obeys_its_limit(sent, settings):
    """tasks.__call__ stores the job. Its run counts as a start, and hands its place over."""
    settings.JOB_LIMITS = {**settings.JOB_LIMITS, "tenant": "1, 5/h"}
    first, held_back = str(uuid.uuid4()), str(uuid.uuid4())
    for id in first, held_back:
        request = {"id": id, "hostname": "test", "called_directly": False, "headers": {}}
        if id == held_back:
            Job.objects.filter(pk=first).update(state="queued", finished_at=None, sweep_at=Now())
        call.push_request(**request)
        try:
            call(7)
        except Exception as error:
            assert id == held_back, error
        finally:
            call.pop_request()
    assert Job.objects.get(pk=held_back).held_by == "tenant:7"
    assert Start.objects.get().key == "tenant:7"


# A limit that was added, changed or removed since


@pytest.mark.parametrize(
    "limit, key", [(None, None), ("one", "one"), ("tenant:{number}", "tenant:0")]
)
def test_a_job_runs_again_with_the_limit_that_its_task_has_now(sent, monkeypatch, limit, key):
    jobs = [call.enqueue(7), call.enqueue(8)]
    updates.finish(Job.objects.all(), "failed")
    monkeypatch.setattr(current_app.tasks[call.name], "limit", limit)
    Job.objects.get(pk=jobs[0].pk).run_again()
    Job.objects.filter(pk=jobs[1].pk).run_again()
    assert set(Job.objects.values_list("limit_key", "held_by")) == {(key, key)}


def test_a_job_that_had_no_limit_runs_again_with_one(sent, monkeypatch):
    job = free.enqueue()
    updates.finish(Job.objects.all(), "failed")
    monkeypatch.setattr(current_app.tasks[free.name], "limit", "one")
    Job.objects.get(pk=job.pk).run_again()
    assert Job.objects.get().held_by == "one"


def test_a_queryset_runs_the_others_again_if_the_key_of_one_has_no_value(sent, monkeypatch):
    call.enqueue(7)
    second = call.enqueue({"tenant": 8})
    updates.finish(Job.objects.all(), "failed")
    monkeypatch.setattr(current_app.tasks[call.name], "limit", "tenant:{tenant[tenant]}")
    assert Job.objects.all().run_again() == [second]


def test_a_step_that_an_older_version_has_stored_has_no_limit(sent):
    run = start_any(free.enqueue())
    step = batches.step(call, [7])
    del step["limit_key"]
    run.next_steps.append([step])
    end(run)
    job = Job.objects.get(task=call.name)
    assert (job.limit_key, job.held_by) == (None, None) and job.sweep_at


def test_a_key_cannot_depend_on_the_result_of_the_step_before():
    with pytest.raises(TypeError, match="cannot depend on the result of the step before"):
        chain(free.si(), call.s()).apply_async()
    chain(free.si(), import_row.si({"tenant": 1, "kind": 2})).apply_async()


# Keys


ID = uuid.UUID(int=7)
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    "value, text",
    [(7, "7"), ("é", "é"), (None, "None"), (True, "True"), (ID, str(ID)), (1.5, "1.5"),
     (Decimal("1.50"), "1.50"), (NOON, "2026-01-02 12:00:00+00:00")],
)  # fmt: skip
def test_a_key_is_the_same_when_the_job_runs_again(sent, value, text):
    job = call.enqueue(value)
    assert job.limit_key == f"tenant:{text}"
    updates.finish(Job.objects.all(), "failed")
    Job.objects.get().run_again()
    assert Job.objects.get().limit_key == f"tenant:{text}"


@pytest.mark.parametrize(
    "args, kwargs, key",
    [([{"tenant": 1, "kind": "a"}], {}, "tenant:1:a:0"),
     ([{"tenant": 1, "kind": "a"}, 5], {}, "tenant:1:a:5"),
     ([], {"row": {"tenant": 1, "kind": "a"}, "number": 6}, "tenant:1:a:6")],
)  # fmt: skip
def test_a_key_may_use_defaults_keywords_and_items(args, kwargs, key):
    assert Job.objects.enqueue(import_row, args, kwargs).limit_key == key


@pytest.mark.parametrize(
    "row, error",
    [({"tenant": "x" * 250, "kind": 1}, "at most 255 characters"), ({"tenant": 1}, "has no value"),
     ([1], "list indices|has no value"), (None, "not subscriptable|has no value"),
     ({"tenant": "\0", "kind": 1}, "cannot be stored")],
)  # fmt: skip
def test_a_key_that_cannot_be_made_is_refused(row, error):
    with pytest.raises((TypeError, ValueError), match=error):
        import_row.delay(row)
    assert not Job.objects.exists()


@pytest.mark.parametrize(
    "limit, error",
    [("tenant:{tenat}", "no argument 'tenat'"), ("{tenant}", "must begin with a name"),
     ("ten{tenant}:x", "must begin with a name"), (7, "must be a text"), ("", "must be a text"),
     ("tenant:{}", "no argument ''"), ("tenant:{0}", "no argument '0'")],
)  # fmt: skip
def test_a_wrong_limit_of_a_task_is_refused_at_its_import(limit, error):
    def wrong(tenant):
        pass

    name = f"wrong {limit!r}"
    with pytest.raises(TypeError, match=error):
        current_app.task(wrong, base=JobTask, name=name, limit=limit).name  # noqa: B018
    current_app.tasks.pop(name, None)


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
BAD = ["0", "-1", "5/", "60/month", "5,6", "5 /min, 3/h", 2.5, None, True, "", ",", "/min", "0/min",
       "5/0min", "5/-1min", "1e3", "five", "5/ms", "5/hs", "5/min/h", "5,", "9" * 20,
       "5/" + "9" * 20 + "d", [5], "5 per min"]  # fmt: skip


@pytest.mark.parametrize("text", GOOD, ids=repr)
def test_a_limit_is_read(text):
    limit = limits.parse(str(text))
    assert (limit.running, limit.starts, limit.period.total_seconds()) == GOOD[text]


@pytest.mark.parametrize("text", BAD, ids=repr)
def test_a_wrong_limit_stops_the_start(settings, text):
    settings.JOB_LIMITS = {"openai": text}
    with pytest.raises(ImproperlyConfigured, match=r"JOB_LIMITS\['openai'\]: .* no limit: write"):
        limits.check_settings([])


@pytest.mark.parametrize(
    "value, error",
    [(["one"], "write {"), ({"pause": "5"}, "cannot be the name"), ({"a:b": "5"}, "cannot be"),
     ({"": "5"}, "cannot be"), ({7: "5"}, "cannot be"),
     ({}, "test_limits.alone has the limit 'one'")],
)  # fmt: skip
def test_settings_without_sense_stop_the_start(settings, value, error):
    settings.JOB_LIMITS = value
    with pytest.raises(ImproperlyConfigured, match=error):
        limits.check_settings([alone])


# Places


def run_of(job, **fields):
    return start(Job.objects.get(pk=job.pk))


@pytest.mark.parametrize("end_body", ["lease", "child"])
def test_a_body_of_a_cancelled_job_that_dies_frees_its_place(sent, commit, monkeypatch, end_body):
    with commit():
        first, second = Job.objects.enqueue_many(alone, [[1], [2]])
    run = start(first)
    token, _ = run.token, first.cancel()
    if end_body == "lease":
        sweep.send_due()
        assert sent == [first.pk]  # its lease has not lapsed
        Job.objects.filter(pk=first.pk).update(sweep_at=Now() - timedelta(seconds=1))
        sweep.send_due()
        assert sent == [first.pk]  # a worker gets time to renew it
        sweep.recover_lapsed()
        sweep.send_due()
    else:
        monkeypatch.setattr(worker, "in_thread", lambda update, *args, delay: update(*args))
        headers = {"run_token": token, "limit": "one", "crashes": 0}
        sender = SimpleNamespace(request=SimpleNamespace(headers=headers))
        worker.recover_job_of_dead_child(sender, first.pk, WorkerLostError())
    assert sent == [first.pk, second.pk]
    assert Job.objects.get(pk=first.pk).sweep_at is None


@pytest.mark.parametrize("renew", ["process", "children"])
def test_a_cancelled_body_renews_the_lease_of_its_place(sent, commit, monkeypatch, renew):
    with commit():
        job = alone.enqueue()
    run = start(job)
    job.cancel()
    Job.objects.update(sweep_at=Now() + timedelta(seconds=1))
    if renew == "process":
        lease.renew_cancelled([run])
    else:
        request = SimpleNamespace(id=str(job.pk), request_dict={"run_token": run.token})
        monkeypatch.setattr(worker.state, "active_requests", [request])
        monkeypatch.setattr(worker, "connection", SimpleNamespace(close=lambda: None))
        sleeps = iter([None])
        monkeypatch.setattr(worker.time, "sleep", lambda seconds: next(sleeps))
        with pytest.raises(StopIteration):
            worker.renew_leases_of_children()
    assert Job.objects.filter(sweep_at__gt=Now() + timedelta(seconds=20)).exists()


def test_a_run_that_was_overtaken_frees_no_place_of_the_newer_one(sent, commit):
    """The newer run was cancelled, and its body still runs."""
    with commit():
        first, _ = Job.objects.enqueue_many(alone, [[1], [2]])
    old = start(first)
    Job.objects.filter(pk=first.pk).update(crashes=1, run_token=uuid.uuid4())
    first.cancel()
    with commit(), old:
        assert not old.write(updates.finish, old.row, "failed")
    assert Job.objects.get(pk=first.pk).sweep_at
    assert sent == [first.pk]


def test_a_lowered_limit_lets_no_job_go_until_enough_have_ended(sent, commit, settings):
    with commit():
        jobs = Job.objects.enqueue_many(call, [[7, number] for number in range(4)])
    first, second = map(start, jobs[:2])
    settings.JOB_LIMITS = {**settings.JOB_LIMITS, "tenant": "1"}
    with commit():
        end(first)
    assert len(sent) == 2
    with commit():
        end(second)
    assert len(sent) == 3


def test_a_raised_limit_holds_at_the_next_round(sent, commit, settings):
    with commit():
        jobs = Job.objects.enqueue_many(call, [[7, number] for number in range(4)])
    settings.JOB_LIMITS = {"tenant": "4"}
    sweep.send_due()
    assert sent == [job.pk for job in jobs]


def test_jobs_of_a_removed_limit_go_after_ten_minutes(sent, commit, settings, caplog):
    """Until then, another process may have newer settings, as in a deploy that adds the limit."""
    with commit():
        jobs = Job.objects.enqueue_many(alone, [[number] for number in range(3)])
    settings.JOB_LIMITS = {}
    turns.grant(["one"])
    sweep.send_due()
    assert sent == [jobs[0].pk]
    Job.objects.update(due_at=F("due_at") - timedelta(minutes=11))
    sweep.send_due()
    assert sent == [job.pk for job in jobs]
    assert "there is no such limit in JOB_LIMITS" in caplog.text


def test_held_jobs_go_in_the_order_in_which_they_are_due(sent, commit):
    jobs = Job.objects.enqueue_many(alone, [[number] for number in range(4)])
    late, soon = jobs[0], jobs[3]
    Job.objects.filter(pk=late.pk).update(due_at=Now() - timedelta(seconds=1))
    Job.objects.filter(pk=soon.pk).update(due_at=Now() - timedelta(hours=1))
    for expected in [soon, late]:
        sweep.send_due()
        assert sent[-1] == expected.pk
        Job.objects.filter(pk=expected.pk).delete()


def test_a_countdown_of_a_held_job_takes_no_place_and_wakes_the_sweep(sent, commit):
    with commit():
        later, now = alone.using(countdown=3).enqueue(), alone.enqueue()
    assert sent == [now.pk]
    assert 2 < sweep.send_due() < 3
    assert turns.reasons([Job.objects.get(pk=later.pk)]) == {}


def test_a_queued_job_that_is_queued_again_keeps_its_place(sent, commit):
    """Its worker shuts down, or it must not run beside another suspect."""
    with commit():
        first, _ = Job.objects.enqueue_many(alone, [[1], [2]])
    updates.requeue(Job.objects.filter(QUEUED, pk=first.pk), 60)
    sweep.send_due()
    first.refresh_from_db()
    assert (first.held_by, first.times_sent) == (None, 0) and first.sweep_at
    assert sent == [first.pk] and held() == 1


def test_a_job_that_is_handed_back_is_the_next_one_again(sent, commit):
    """A deploy must not put it behind all jobs of its key."""
    with commit():
        first, _ = Job.objects.enqueue_many(alone, [[1], [2]])
    run = start(first)
    with run:
        run.hand_back()
    assert sent == [first.pk, first.pk] and held() == 1


def test_a_job_of_an_unknown_task_gives_its_place_to_the_next_one(sent, commit):
    with commit():
        first, second = Job.objects.enqueue_many(alone, [[1], [2]])
    worker.requeue_later(Job.objects.filter(QUEUED, pk=first.pk))
    first.refresh_from_db()
    assert first.held_by == "one" and first.due_at > timezone.now() + timedelta(seconds=50)
    assert sent == [first.pk, second.pk]


def test_a_message_that_cannot_be_sent_keeps_the_place(commit, broker_down):
    with commit():
        first, _ = Job.objects.enqueue_many(alone, [[1], [2]])
    first.refresh_from_db()
    assert (first.held_by, first.times_sent) == (None, 0) and first.sweep_at
    assert held() == 1


def test_a_worker_that_shuts_down_hands_limited_jobs_back_at_its_end(sent, commit, monkeypatch):
    """Until then their bodies run: the next job of the key must not start beside them."""
    with commit():
        first, other = alone.enqueue(), free.enqueue()
    states = []

    def look(_):
        states.append([Job.objects.get(pk=job.pk).state for job in (first, other)])

    monkeypatch.setattr("time.sleep", look)
    monkeypatch.setattr("os._exit", look)
    with start(first), start(other):
        shutdown.requeue_and_exit()
        for run in list(runs.values()):
            run.has_written = True
    assert states == [["running", "running"], ["running", "queued"], ["queued", "queued"]]


def test_a_grant_that_fails_is_left_to_the_sweep(sent, commit, monkeypatch, caplog):
    def refuse(*args):
        raise Error("no")

    with monkeypatch.context() as patch:
        patch.setattr(turns, "free_places", refuse)
        with commit():
            job = alone.enqueue()
    assert "the sweep will let jobs of one go" in caplog.text and not sent
    sweep.send_due()
    assert sent == [job.pk]


def test_deleted_jobs_free_their_places(sent, commit):
    with commit():
        first, second = Job.objects.enqueue_many(alone, [[1], [2]])
    Job.objects.filter(pk=first.pk).delete()
    sweep.send_due()
    assert sent == [first.pk, second.pk]


# Rates


def ask_and_start(count):
    for job in Job.objects.filter(task=ask.name, state="queued", sweep_at__isnull=False)[:count]:
        end(start(job))


def test_deleted_jobs_retries_and_hand_backs_count_for_the_rate(sent, commit):
    with commit():
        jobs = Job.objects.enqueue_many(ask, [[number] for number in range(5)])
    end(start(jobs[0]))
    Job.objects.filter(pk=jobs[0].pk).delete()
    retried, back = start(jobs[1]), start(jobs[2])
    retried.retry = {"delay": 0, "args": [], "kwargs": {}, "retries": 1}
    with commit(), retried:
        retried.try_again()
    with commit(), back:
        back.hand_back()
    sweep.send_due()
    assert len(sent) == 3 and Start.objects.count() == 3
    assert held("api") == 4


def test_jobs_that_were_let_go_but_have_not_started_count_for_the_rate(sent, commit):
    """Else they would all start at once when the workers come back."""
    Job.objects.enqueue_many(ask, [[number] for number in range(9)])
    for _ in range(3):
        sweep.send_due()
    assert len(sent) == 3
    Start.objects.bulk_create(Start(key="api") for _ in range(3))
    sweep.send_due()
    assert len(sent) == 3


def test_rates_with_different_periods_do_not_mix(sent, settings):
    settings.JOB_LIMITS = {"one": "2/min", "api": "2/h", "tenant": "2"}
    for name, count in {"one": 2, "api": 2}.items():
        Start.objects.bulk_create(Start(key=name) for _ in range(count))
    Start.objects.update(started_at=Now() - timedelta(minutes=2))
    minute, hour = alone.enqueue(), ask.enqueue()
    sweep.send_due()
    assert sent == [minute.pk]
    text = turns.reasons([Job.objects.get(pk=hour.pk)])
    assert text == {hour.pk: "Waits for its turn: api may start 2/h"}


@pytest.mark.parametrize("ago, seconds", [(36, 24), (None, 60)])
def test_the_sweep_wakes_when_the_rate_has_room(sent, settings, ago, seconds):
    """Also if the rate is not used up yet: the jobs that were just let go may do it at once."""
    settings.JOB_LIMITS, settings.JOB_SWEEP_SECONDS = {"api": "2, 3/min"}, 100
    if ago:
        now = Now() - timedelta(seconds=ago)
        Start.objects.bulk_create(Start(key="api") for _ in range(3))
        Start.objects.update(started_at=now)
    Job.objects.enqueue_many(ask, [[number] for number in range(5)])
    assert sweep.send_due() == pytest.approx(seconds, abs=5)


@pytest.mark.parametrize("turn, expected", [((9, 0.01), 0.1), ((0.01, 9), 0.5), ((9, 3), 3)])
def test_the_sweep_rests_between_two_turns(sent, monkeypatch, turn, expected):
    """A rate such as 5/s needs shorter rests than a countdown."""
    monkeypatch.setattr(turns, "let_due_go", lambda: turn)
    assert sweep.send_due() == expected


def test_starts_are_deleted_when_no_rate_counts_them(settings):
    settings.JOB_LIMITS = {"one": "2/min", "api": "3/h"}
    Start.objects.bulk_create(Start(key=key) for key in ["api", "one"])
    Start.objects.filter(key="one").update(started_at=Now() - timedelta(hours=25))
    turns.delete_old_starts()
    assert [each.key for each in Start.objects.all()] == ["api"]
    settings.JOB_LIMITS = {"api": "3/3d"}
    Start.objects.update(started_at=Now() - timedelta(days=2))
    turns.delete_old_starts()
    assert Start.objects.exists()


# For people


def test_a_held_job_says_what_it_waits_for(sent, commit, settings):
    with commit():
        *_, job = [call.enqueue(7) for _ in range(3)]
    job.refresh_from_db()
    text = "Waits for its turn: 2 of 2 of tenant 7 are running"
    assert turns.reasons(Job.objects.all()) == {job.pk: text}
    settings.JOB_LIMITS = {}
    assert turns.reasons([job]) == {job.pk: "Waits for its turn"}


def test_the_sweep_looks_again_when_a_rate_lets_more_jobs_go(sent):
    """Also after a round that let some go: when these have ended at once, nobody else looks."""
    jobs = Job.objects.enqueue_many(ask, [[number] for number in range(5)])
    assert turns.let_due_go()[1] == 3600
    for job in jobs[:2]:
        end(start(job))
    Start.objects.update(started_at=F("started_at") - timedelta(minutes=50))
    assert 590 < turns.let_due_go()[1] <= 600


# What a second reading has found


def test_a_claim_that_is_repeated_succeeds_although_a_pause_has_begun(sent, commit):
    """Its answer was lost: the run owns the job."""
    with commit():
        job = alone.enqueue()
    run = start(job)
    Pause.objects.pause("celery")
    assert run.claim()


def test_a_retry_at_once_waits_for_its_turn(sent, commit):
    with commit():
        first, second = Job.objects.enqueue_many(alone, [[1], [2]])
    run = start(first)
    run.retry = {"delay": 0, "args": [], "kwargs": {}, "retries": 1}
    with run:
        run.try_again()
    assert sent == [first.pk, second.pk]


def test_an_unknown_task_does_not_shorten_a_countdown(sent):
    job = alone.using(countdown=3600).enqueue()
    worker.requeue_later(Job.objects.filter(QUEUED, pk=job.pk))
    job.refresh_from_db()
    assert job.due_at > timezone.now() + timedelta(seconds=3500)


@pytest.mark.parametrize("signum, is_free", [(signal.SIGKILL, True), (signal.SIGUSR1, False)])
def test_a_revoke_frees_the_place_only_if_it_kills_the_body(
    sent, commit, monkeypatch, signum, is_free
):
    """SIGUSR1 is the soft time limit: the body may go on."""
    monkeypatch.setattr(shutdown, "is_prefork", True)
    monkeypatch.setattr(worker, "in_thread", lambda update, *args, delay: update(*args))
    with commit():
        job = alone.enqueue()
    start(job)
    job.cancel()
    request = SimpleNamespace(id=job.pk, headers={"limit": "one", "crashes": 0})
    worker.free_place_of_dead_child(request, terminated=True, signum=signum)
    assert (Job.objects.get(pk=job.pk).sweep_at is None) == is_free


def test_one_key_that_fails_holds_no_other(sent, monkeypatch, caplog):
    for tenant in 1, 2, 3:
        call.enqueue(tenant)
    take = turns.take

    def fail_for_one(key, *args, **options):
        if key == "tenant:2":
            raise Error("no")
        return take(key, *args, **options)

    monkeypatch.setattr(turns, "take", fail_for_one)
    sweep.send_due()
    assert len(sent) == 2 and "jobs of tenant:2 are held until the next round" in caplog.text


def test_only_old_jobs_of_an_unknown_limit_go(sent, settings):
    old, new = Job.objects.enqueue_many(alone, [[1], [2]])
    Job.objects.filter(pk=old.pk).update(due_at=F("due_at") - timedelta(minutes=11))
    settings.JOB_LIMITS = {}
    sweep.send_due()
    assert sent == [old.pk]


def test_paused_jobs_of_many_keys_are_held_in_one_go(sent):
    for tenant in range(30):
        call.enqueue(tenant)
    Pause.objects.pause(call.name)
    with CaptureQueriesContext(connection) as captured:
        sweep.send_due()
    assert Job.objects.filter(held_by=f"pause:{call.name}").count() == 30
    assert len([query for query in captured if "'pause:'" in query["sql"]]) == 1
