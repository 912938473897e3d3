"""A job says what it waits for or why it does not move. The whole system does, too."""

from datetime import datetime, timedelta
from html import unescape

import pytest
from celery import shared_task
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from helpers import JOBS, add, claim, claim_and_lapse, in_thread, listed, messages_unless, sweeper

from durable_jobs import batches
from durable_jobs import diagnosis as module
from durable_jobs import publish as publishing
from durable_jobs.actions import cancel, run_again
from durable_jobs.beat import republish
from durable_jobs.beat.sweeper import recover_lapsed
from durable_jobs.diagnosis import NO_HEARTBEAT, reasons, span
from durable_jobs.enqueue import enqueue
from durable_jobs.exceptions import JobError
from durable_jobs.models import Job, Pause, Sweep, Worker
from durable_jobs.statistics import by_queue
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db

NOBODY = "No worker consumes the queue celery"
NO_BEAT = "Beat is down: last seen 2 min ago"


@shared_task(base=JobTask, bind=True, max_retries=7)
def look_up(self, error=None):
    self.report(30, message="Looked up 3 of 10")
    self.retry(countdown=60, exc=error and LOOKED_UP[error], throw=False)


LOOKED_UP = {
    "public": JobError("The service is down"),
    "secret": OSError("secret"),
    "blank": JobError(" "),
}


def problems():
    return module.problems(by_queue())


@pytest.fixture(autouse=True)
def beat(db):
    return sweeps()


def ago(seconds):
    return timezone.now() - timedelta(seconds=seconds)


def sweeps(seconds=1, refused=()):
    """The last round of the sweeper ended so long ago."""
    times = {"ended_at": ago(seconds), "tick_due_at": ago(seconds)}
    Sweep.objects.update_or_create({**times, "refused": dict(refused)}, pk=1)


def works(seconds=1, name="celery@one", queues=("celery",), slots=4, busy=0, started=3600):
    """A worker was seen so long ago."""
    fields = {"queues": list(queues), "slots": slots, "busy": busy, "pool": "threads"}
    Worker.objects.create(name=name, seen_at=ago(seconds), started_at=ago(started), **fields)


def waits(seconds=60, **fields):
    """Return a job that has been due for so long."""
    job = enqueue(add, [1, 2])
    Job.objects.filter(pk=job.pk).update(due_at=ago(seconds), **fields)
    return job


def runs(silence=105, **fields):
    """Return a running job whose lease ended so long ago."""
    job = waits()
    assert claim(job.pk)
    fields = {"worker": "celery@one", "started_at": ago(50), **fields}
    Job.objects.filter(pk=job.pk).update(lease_ends_at=ago(silence), **fields)
    return job


def publish(job):
    """Run a job once."""
    job.refresh_from_db()
    publishing.publish([job])


def why(job, **options):
    job.refresh_from_db()
    return reasons([job], **options).get(job.pk, "")


# Queued, and due


def test_a_job_that_waits_for_nothing_says_nothing():
    works()
    assert why(waits()) == ""
    assert reasons([enqueue(add, [1, 2])]) == {}


def test_no_worker_takes_from_its_queue():
    job = waits()
    works(queues=["io"])
    assert why(job) == NOBODY
    works(45.5, "celery@two", ["io", "celery"])  # it has died
    assert why(job) == NOBODY
    assert why(waits(5)) == ""  # too early to say so


def test_all_slots_of_its_queue_are_busy():
    works(slots=4, busy=4)
    works(name="celery@two", slots=2, busy=2)
    works(name="celery@three", queues=["io"], slots=2)
    works(60, name="celery@four", slots=2)
    assert why(waits()) == "Waiting for a free slot: 6 of 6 slots of the queue celery are taken"
    Worker.objects.filter(name="celery@two").update(busy=1)
    assert why(waits()) == ""


def test_the_broker_takes_no_message():
    works()
    sweeps(refused={"celery": "ConnectionError('refused')"})
    text = "The broker refuses messages for the queue celery"
    assert why(waits(times_sent=0)) == text
    assert why(waits(times_sent=0), for_staff=True) == f"{text}: ConnectionError('refused')"
    assert why(waits(times_sent=1)) == ""  # it was sent before
    sweeps(130, refused={"celery": "ConnectionError('refused')"})
    assert why(waits(times_sent=0)) == NO_BEAT  # the broker may run again
    assert problems() == [NO_BEAT]


def test_beat_does_not_run():
    works()
    sweeps(130)
    assert why(waits()) == NO_BEAT
    assert why(waits(queue="io")) == f"{NOBODY[:-6]}io. {NO_BEAT}"
    Sweep.objects.all().delete()
    assert why(waits()) == "Beat has never run"


def test_beat_and_all_workers_do_not_respond():
    works(120)
    sweeps(130)
    assert why(waits()) == NO_HEARTBEAT
    assert why(runs()) == f"Its worker hasn't responded for 2 min. {NO_HEARTBEAT}"


def test_a_limit_that_only_beat_can_fill_says_that_beat_does_not_run(settings):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"LIMITS": {"tenant": "2", "api": "2/h"}}
    sweeps(130)
    works()
    blocked = {"times_sent": 0, "send_at": None}
    free = waits(blocked_by="tenant:7", limit_key="tenant:7", **blocked)
    rated = waits(blocked_by="api", limit_key="api", **blocked)
    assert why(free) == f"Waiting: limit {free.limit_key}. {NO_BEAT}"
    assert why(rated) == f"Waiting: limit api allows at most 2/h. {NO_BEAT}"
    for _ in range(2):
        waits(limit_key="tenant:7")
    assert why(free) == f"Waiting: limit tenant:7 is full (2 of 2 slots taken). {NO_BEAT}"
    Worker.objects.all().delete()
    assert why(free) == why(rated) == NO_HEARTBEAT


def test_a_pause_says_for_how_long():
    Pause.objects.create(name="celery", reason="SMTP is down", since=ago(1250))
    Pause.objects.create(name=add.name, since=ago(8000))
    job = waits()
    assert why(job) == "Paused for 20 min: SMTP is down. Paused for 2 h"
    Pause.objects.filter(name="celery").delete()
    assert why(job) == "Paused for 2 h"


# Queued, for later


def test_a_countdown_has_only_its_time(api, user):
    job = enqueue(add, [1, 2], owner=user, countdown=3 * 86400)
    assert why(job) == ""
    shown = api.get(f"/api/jobs/{job.pk}/").json()
    job.refresh_from_db()
    assert (shown["reason"], datetime.fromisoformat(shown["due_at"])) == ("", job.due_at)


@pytest.mark.parametrize(
    "error, owner_reads, staff_reads",
    [
        ("public", ": The service is down", ": The service is down"),
        ("secret", "", ": OSError: secret"),
        ("blank", ":  ", ""),
        (None, "", ": The task called retry()"),
    ],
)
def test_a_retry_says_which_try_comes_and_why(error, owner_reads, staff_reads):
    job = look_up.enqueue(error)
    for tries in 2, 3:
        publish(job)
        assert why(job) == f"Try {tries} of 8{owner_reads}"
        assert why(job, for_staff=True) == f"Try {tries} of 8{staff_reads}"
        assert (job.message, job.progress) == ("Looked up 3 of 10", 30)  # is kept


def test_the_text_of_a_retry_is_gone_when_the_next_try_starts():
    job = look_up.enqueue("public")
    publish(job)
    job.refresh_from_db()
    assert job.public_error == "The service is down"
    assert claim(job.pk, retries=1)
    job.refresh_from_db()
    assert (job.public_error, why(job)) == ("", "")


def test_a_crash_says_so():
    job = waits()
    claim_and_lapse(job)
    Job.objects.filter(pk=job.pk).update(message="Row 7")
    recover_lapsed()
    assert why(job) == "Crash 1 of 3: The worker running this job stopped unexpectedly"
    assert why(job, for_staff=True) == "Crash 1 of 3: Its worker died"
    assert job.message == "Row 7"
    Job.objects.filter(pk=job.pk).update(retries=2, due_at=ago(60))
    assert (
        why(job)
        == f"{NOBODY}. Try 3 of 4, crash 1 of 3: The worker running this job stopped unexpectedly"
    )


def test_an_unknown_task_or_one_without_a_limit_has_no_last_try():
    assert why(waits(0, task="gone", retries=1)) == "Try 2"
    job = waits(0, retries=9)  # retry(max_retries=20) in a task function
    assert why(job) == "Try 10"


# Running


def test_a_running_job_says_nothing_while_its_lease_lasts():
    job = waits()
    assert claim(job.pk)
    assert why(job) == ""


def test_a_worker_gives_no_sign_of_life():
    text = "Its worker hasn't responded for 2 min"
    assert why(runs()) == f"{text}. It will restart automatically"
    works(name="celery@other")
    sweeps(130)
    assert why(runs()) == f"{text}. {NO_BEAT}"


def test_a_function_that_is_over_its_time_limit_does_not_blame_its_worker():
    late = runs(is_late=True)
    assert why(late) == "Exceeded its time limit. It will fail automatically"
    assert "The workers of 1 job aren't responding" not in problems()


def test_a_clock_that_is_ahead_makes_no_job_stalled(monkeypatch):
    """The machine of the web server has another clock than the database."""
    job = runs(silence=-20)
    later = timezone.now() + timedelta(hours=1)
    monkeypatch.setattr(timezone, "now", lambda: later)
    assert why(job) == ""


@pytest.mark.django_db(transaction=True)
def test_a_page_is_read_while_another_process_writes(broker_down):
    """It takes no lock: on SQLite, a reader with one makes Beat and the heartbeats wait, too."""
    sweeps(130)
    works(120)
    jobs = runs(), waits()
    sqlite = connection.vendor == "sqlite"
    write = "BEGIN IMMEDIATE" if sqlite else "BEGIN; LOCK durable_jobs_job IN ROW EXCLUSIVE MODE"
    other = connection.copy()
    try:
        with other.cursor() as cursor:
            cursor.execute(write)
        assert [NO_HEARTBEAT in why(job, for_staff=True) for job in jobs] == [True, True]
        assert problems()[0] == NO_HEARTBEAT
    finally:
        other.close()


# Batches


def test_a_batch_says_what_holds_its_jobs_up(api, user, admin_client):
    batch = batches.enqueue([add.s(1, 2), add.s(3, 4), add.s(5, 6)], owner=user)
    jobs = Job.objects.filter(batch=batch)

    def shown():
        [listed] = api.get("/api/batches/").json()["results"]
        assert api.get(f"/api/batches/{batch.pk}/").json()["reason"] == listed["reason"]
        page = admin_client.get(f"/admin/durable_jobs/batch/{batch.pk}/change/").content.decode()
        assert listed["reason"] in unescape(page)
        return listed["reason"]

    assert shown() == ""
    jobs.update(due_at=ago(60))
    assert shown() == NOBODY
    Pause.objects.create(name=add.name, reason="a bug", since=ago(8000))
    assert shown() == "Paused for 2 h: a bug"
    Pause.objects.all().delete()
    newest = jobs.latest("created_at")
    assert claim(newest.pk)
    assert shown() == ""  # it moves
    jobs.filter(pk=newest.pk).update(lease_ends_at=ago(105))
    assert shown() == "Its worker hasn't responded for 2 min. It will restart automatically"
    cancel(jobs)
    batches.end_all()
    assert shown() == ""


# Ended


@shared_task(base=JobTask)
def fail():
    raise OSError


def test_a_job_links_to_what_follows_it(api, user, run_jobs):
    @shared_task(base=JobTask, bind=True)
    def go_on(self):
        self.enqueue_next(add.using(label="A chain").s(1, 2))

    go_on.using(owner=user, label="A chain").enqueue()
    batch = batches.enqueue([add.s(1, 2)], owner=user, on_success=add.si(3, 4))
    run_jobs()
    first, second = Job.objects.filter(label="A chain").order_by("created_at")
    shown = [api.get(f"/api/jobs/{job.pk}/").json() for job in (first, second)]
    url = f"http://testserver/api/jobs/{second.pk}/"
    fields = {"id": str(second.pk), "url": url, "task": add.name, "label": "A chain"}
    assert shown[0]["followed_by"] == [{**fields, "state": "succeeded"}]
    assert [each["follows"] for each in shown] == [None, str(first.pk)]
    assert [each["follows_url"] for each in shown] == [None, shown[0]["url"]]
    shown = api.get(f"/api/jobs/{Job.objects.get(follows=batch.pk).pk}/").json()
    assert shown["follows_url"] == f"http://testserver/api/batches/{batch.pk}/"
    listed = api.get("/api/jobs/").json()["results"]
    assert not {"follows_url", "followed_by"} & listed[0].keys()
    assert str(first.pk) in [each["follows"] for each in listed]


def test_the_admin_links_jobs_and_batches_to_what_follows_them(admin_client, run_jobs):
    batch = batches.enqueue([add.s(1, 2)], on_success=fail.si())
    run_jobs()
    [job] = Job.objects.filter(follows=batch.pk)
    again = run_again(Job.objects.get(batch=batch))

    def page(row):
        kind = row._meta.model_name
        return admin_client.get(f"/admin/durable_jobs/{kind}/{row.pk}/change/").content.decode()

    assert f'<a href="{JOBS}?follows={batch.pk}">1</a>' in page(batch)
    assert listed(admin_client, f"follows={batch.pk}") == [job]
    assert (
        f'<a href="/admin/durable_jobs/batch/{batch.pk}/change/">the batch {batch.pk}</a>'
        in page(job)
    )
    first = Job.objects.get(pk=again.follows)
    assert f'<a href="{JOBS}?follows={first.pk}">1</a>' in page(first)
    assert f'<a href="/admin/durable_jobs/job/{first.pk}/change/">the job {first.pk}</a>' in page(
        again
    )


# The whole system


def test_a_system_without_problems_has_none():
    works()
    waits(), enqueue(add, [1, 2], countdown=60)
    assert problems() == []


def test_the_problems_of_the_system_are_named():
    works(queues=["io"])
    waits(), waits(), waits(queue="io")
    runs()
    Pause.objects.create(name="io", reason="a bug", since=ago(1250))
    sweeps(refused={"io": "ConnectionError('refused')"})
    assert problems() == [
        f"{NOBODY}: 2 jobs waiting",
        "The broker refuses messages for the queue io: ConnectionError('refused')",
        "The workers of 1 job aren't responding",
        "io: Paused for 20 min: a bug",
    ]
    sweeps(130)
    assert problems()[0] == NO_BEAT
    Worker.objects.update(seen_at=ago(60))
    assert problems()[0] == NO_HEARTBEAT


def test_the_sweeper_stores_for_which_queues_the_broker_takes_no_message(broker_down, monkeypatch):
    refuse = messages_unless("celery", OSError("no\0 broker"))
    monkeypatch.setattr(republish, "messages_in", refuse)
    waits(times_sent=0, send_at=ago(60))
    sweeper.sender.send_due()
    sweeper.store_round()
    assert Sweep.objects.get().refused == {"celery": "OSError('no\\x00 broker')"}
    cancel(Job.objects.all())
    sweeper.sender.send_due()
    sweeper.store_round()
    assert Sweep.objects.get().refused == {}


# Costs and faults


def tables(function, *args):
    """Return the table of each query."""
    with CaptureQueriesContext(connection) as captured:
        function(*args)
    return [query["sql"].replace('"', "").split(" FROM ")[1].split()[0] for query in captured]


def test_jobs_that_are_well_cost_no_query():
    job = waits()
    assert claim(job.pk)
    ended, later = waits(), enqueue(add, [1, 2], countdown=60)
    cancel(ended)
    assert tables(reasons, [*Job.objects.all()]) == []
    later.refresh_from_db()
    waits(5)
    assert tables(reasons, [*Job.objects.all()]) == ["durable_jobs_pause"]


def test_many_jobs_that_wait_cost_the_same_few_queries():
    works()
    for _ in range(3):
        waits(retries=1), runs(), waits(blocked_by="tenant:7", limit_key="tenant:7", send_at=None)
    with CaptureQueriesContext(connection) as captured:
        assert len(reasons([*Job.objects.all()], for_staff=True)) == 9
    sql = [query["sql"] for query in captured if query["sql"].startswith("SELECT")]
    assert len(sql) == 7  # the jobs, and six facts


@pytest.mark.parametrize(
    "seconds, text", [(-1, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (172800, "2 days")]
)
def test_a_span_of_time_is_short(seconds, text):
    assert span(timedelta(seconds=seconds)) == text


@pytest.mark.skipif(connection.vendor != "postgresql", reason="SQLite has no locks of tables")
@pytest.mark.django_db(transaction=True)
def test_what_diagnoses_does_not_wait_for_a_locked_table_and_says_who_locks_it(staff_api):
    """As a migration does, for minutes."""
    pages = "/admin/durable_jobs/pause/", "/metrics"
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("LOCK TABLE durable_jobs_job IN ACCESS EXCLUSIVE MODE")
        cursor.execute("SELECT pg_backend_pid()")
        [pid] = cursor.fetchone()
        answers = in_thread(lambda: [staff_api.get(page) for page in pages])
    assert [answer.status_code for answer in answers] == [200, 503]
    for answer in answers:
        assert f"The process {pid} of PostgreSQL has locked durable_jobs_job for" in answer.text
