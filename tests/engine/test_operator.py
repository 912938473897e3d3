"""The operator's pages in the admin: the list of jobs with its filters and actions."""

import re
import uuid
from datetime import timedelta

import pytest
from celery import shared_task
from django.contrib.admin.models import LogEntry
from django.db import connection
from django.db.models import F
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from jobs import publish, updates
from jobs.models import Batch, Job
from jobs.tasks import JobTask

pytestmark = pytest.mark.django_db
URL = "/admin/jobs/job/"


@shared_task(base=JobTask)
def greet(name="you"):
    return f"Hello {name}"


@shared_task(base=JobTask)
def count():
    """Another task."""


@shared_task
def plain():
    """No job."""


def listed(client, query="", url=URL):
    """Return the jobs of a list."""
    response = client.get(f"{url}?{query}")
    assert response.status_code == 200
    return list(response.context["cl"].result_list)


def act(client, action, query="", jobs=(), **data):
    """Do something with these jobs, or with all that match. Returns the messages."""
    data |= {"action": action, "_selected_action": [job.pk for job in jobs]}
    if not jobs:
        data |= {"select_across": "1", "_selected_action": [uuid.uuid4()]}
    page = client.post(f"{URL}?{query}", data, follow=True)
    return [str(message) for message in page.context["messages"]]


def logged():
    """Return who did what, as the admin shows it."""
    return [(entry.user.username, str(entry)) for entry in LogEntry.objects.order_by("pk")]


# Filters


@pytest.fixture
def states(commit):
    """A job in each state."""
    with commit():
        jobs = {"succeeded": Job.objects.enqueue(greet)}
    jobs |= {name: Job.objects.enqueue(greet) for name in ("waiting", "running", "failed")}
    jobs["cancelled"] = Job.objects.enqueue(greet)
    jobs["waiting later"] = Job.objects.enqueue(greet, countdown=60)
    jobs["cancelled"].cancel()
    updates.finish(Job.objects.filter(pk=jobs["failed"].pk), "failed")
    running = {"state": "running", "run_token": uuid.uuid4()}
    Job.objects.filter(pk=jobs["running"].pk).update(**running)
    return jobs


def test_each_filter_by_state_finds_the_jobs_in_this_state(admin_client, states):
    for name, job in states.items():
        assert listed(admin_client, f"state={name}") == [job], name
    active = {states[name] for name in ("waiting", "waiting later", "running")}
    assert set(listed(admin_client, "state=active")) == active
    assert admin_client.get(f"{URL}?state=nonsense").headers["Location"] == f"{URL}?e=1"


def test_jobs_are_filtered_by_task_queue_and_date(admin_client):
    old, other, new = (Job.objects.enqueue(task) for task in (greet, count, greet))
    Job.objects.filter(pk=old.pk).update(created_at=Now() - timedelta(days=3), queue="io")
    assert listed(admin_client, f"task={greet.name}") == [new, old]
    assert listed(admin_client, "queue=io") == [old]
    assert listed(admin_client, f"queue=celery&task={count.name}") == [other]
    page = admin_client.get(URL).content.decode()
    [today] = re.findall(r'href="\?(created_at[^"]*)">Today', page)
    assert set(listed(admin_client, today.replace("&amp;", "&"))) == {new, other}


def test_the_filters_names_come_from_the_code_and_not_from_the_table(admin_client):
    Job.objects.enqueue(greet, queue="special")
    Job.objects.update(task="deleted.task")
    with CaptureQueriesContext(connection) as captured:
        page = admin_client.get(URL).content.decode()
    assert not [query for query in captured if "DISTINCT" in query["sql"]]
    for name in greet.name, count.name:
        assert f'href="?task={name}"' in page
    assert f"?task={plain.name}" not in page and "?task=deleted" not in page
    assert re.findall(r'href="\?queue=(\w+)"', page) == ["celery", "cpu", "io"]
    # A link to the list may name others.
    page = admin_client.get(f"{URL}?queue=special&task=deleted.task").content.decode()
    assert "1 job\n" in page and ">special</a>" in page and ">deleted.task</a>" in page


def test_the_search_finds_an_id_and_an_owner(admin_client, user):
    own, other = Job.objects.enqueue(greet, owner=user), Job.objects.enqueue(greet)
    assert listed(admin_client, f"q={other.pk}") == [other]
    assert listed(admin_client, "q=user") == [own]
    assert listed(admin_client, "q=use") == listed(admin_client, f"q={uuid.uuid4()}") == []


def test_the_list_shows_label_queue_and_a_short_error(admin_client):
    job = Job.objects.enqueue(greet, label="For Ada", queue="special")
    updates.finish(Job.objects.filter(pk=job.pk), "failed", error="<b>" + "x" * 5000)
    page = admin_client.get(URL).content.decode()
    assert '"field-label">For Ada<' in page and '"field-queue">special<' in page
    assert f'"field-short_error">&lt;b&gt;{"x" * 76}…<' in page


def test_the_list_loads_no_large_values(admin_client):
    Job.objects.enqueue(greet)
    with CaptureQueriesContext(connection) as captured:
        admin_client.get(URL)
    sql = " ".join(query["sql"] for query in captured)
    assert '"jobs_job"."label"' in sql and '"jobs_job"."args"' not in sql


# Actions


def test_start_now_ends_countdowns_and_pauses_before_a_retry(admin_client, monkeypatch, commit):
    sent = []
    later, retried = (Job.objects.enqueue(greet, countdown=600) for _ in range(2))
    Job.objects.filter(pk=retried.pk).update(retries=2, crashes=1)
    due, ended = Job.objects.enqueue(greet), Job.objects.enqueue(greet)
    ended.cancel()
    before = Job.objects.in_bulk([due.pk, ended.pk])
    with commit():
        monkeypatch.setattr(publish, "send", sent.extend)
        assert Job.objects.all().start_now() == 2
        assert sent == []  # not before the commit
    assert {(job.pk, job.retries, job.crashes, job.times_sent) for job in sent} == {
        (later.pk, 0, 0, 1),
        (retried.pk, 2, 1, 1),
    }
    for job in Job.objects.filter(pk__in=[later.pk, retried.pk]):
        assert job.due_at < job.sweep_at < job.due_at + timedelta(minutes=1)
        assert (job.state, job.times_sent) == ("queued", 1)
    assert not Job.objects.filter(due_at__gt=Now())
    for job in before.values():
        row = Job.objects.get(pk=job.pk)
        assert (row.due_at, row.sweep_at, row.state) == (job.due_at, job.sweep_at, job.state)
    assert Job.objects.all().start_now() == 0


def test_the_sweep_sends_the_message_if_the_broker_refuses_it(commit, broker_down):
    job = Job.objects.enqueue(greet, countdown=600)
    with commit():
        Job.objects.all().start_now()
    assert broker_down == [str(job.pk)]
    job.refresh_from_db()
    assert job.times_sent == 0
    assert max(job.due_at, job.sweep_at) < job.created_at + timedelta(seconds=60)


def test_start_now_takes_the_jobs_of_a_batch_and_of_an_owner_and_many(user):
    batch = Batch.objects.enqueue(greet, [[]] * 1001, countdown=60, owner=user)
    with CaptureQueriesContext(connection) as captured:
        assert batch.jobs.all().start_now() == 1001
    assert len(captured) < 14
    Job.objects.enqueue(greet, countdown=60, owner=user)
    assert Job.objects.filter(owner__username="user").start_now() == 1  # with a join


def test_actions_take_the_filtered_set(admin_client, states):
    kept = Job.objects.enqueue(count, countdown=60)
    text = act(admin_client, "start_now", f"task={greet.name}")
    assert text == ["1 job due now. 0 skipped, because they were not waiting for their time."]
    kept.refresh_from_db()
    assert kept.due_at > kept.created_at + timedelta(seconds=50)
    text = act(admin_client, "cancel", "state=running")
    assert text == ["1 job cancelled. 0 had already ended."]
    [text] = act(admin_client, "run_again", "state=failed")
    assert "1 job queued again</a>." in text
    assert len(listed(admin_client, "state=waiting")) == 3
    admin = "admin"
    assert logged() == [
        (admin, f"Changed “1 job” — Started now. Filter: task={greet.name}"),
        (admin, "Changed “1 job” — Cancelled. Filter: state=running"),
        (admin, "Changed “1 job” — Queued again. Filter: state=failed"),
    ]


@pytest.mark.parametrize(
    ("action", "state"), [("cancel", "queued"), ("run_again", "failed"), ("start_now", "queued")]
)
def test_a_second_click_takes_the_jobs_that_were_left(admin_client, monkeypatch, action, state):
    """Also without a filter by state: then the newest jobs may be those of the first click."""
    monkeypatch.setattr("jobs.admin.LatestPages.most", 2)
    jobs = [Job.objects.enqueue(greet, countdown=60) for _ in range(5)]
    if action == "run_again":
        updates.finish(Job.objects.all(), "failed")
    more = "These were the first 2 jobs. More are left: choose the action again."
    left = [more in act(admin_client, action, f"task={greet.name}") for _ in range(3)]
    assert left == [True, True, False]
    entries = [re.search("[0-9]+", text)[0] for _, text in logged()]
    assert entries == ["2", "2", "1"]
    done = {"cancel": {"state": "cancelled"}, "run_again": {"state": "queued"}}
    done["start_now"] = {"due_at__lte": Now()}
    assert Job.objects.filter(**done[action]).count() == len(jobs)


def test_the_action_of_one_job_is_in_its_history(admin_client):
    job, other = (Job.objects.enqueue(greet, countdown=60) for _ in range(2))
    act(admin_client, "start_now", jobs=[job])
    for shown, texts in (job, 1), (other, 0):
        page = admin_client.get(f"{URL}{shown.pk}/history/").content.decode()
        assert page.count("Started now. Filter: none") == texts
    act(admin_client, "cancel", "q=nobody&p=1", jobs=[])
    assert logged()[-1] == ("admin", "Changed “0 jobs” — Cancelled. Filter: q=nobody")


def test_the_actions_of_batches_are_logged(admin_client):
    batch = Batch.objects.enqueue(greet, [[], []])
    for action in "cancel", "run_failed_again":
        data = {"action": action, "_selected_action": [batch.pk]}
        admin_client.post("/admin/jobs/batch/?q=", data)
    done = [text.partition(" — ")[2] for _, text in logged()]
    assert done == ["Cancelled. Filter: q=", "Enqueued again. Filter: q="]
    page = admin_client.get(f"/admin/jobs/batch/{batch.pk}/history/").content.decode()
    assert page.count("Enqueued again") == 1


def test_staff_needs_view_job_to_see_and_delete_job_to_act(staff):
    job = Job.objects.enqueue(greet, countdown=60)
    assert staff().get(URL).status_code == 403
    viewer, operator = staff("view"), staff("view", "delete")
    assert listed(viewer) == [job]
    for client in viewer, operator:
        page = client.get(f"{URL}{job.pk}/change/").content.decode()
        assert ("Start now" in page) == (client is operator)
        act(client, "start_now", jobs=[job])
        assert Job.objects.filter(due_at__lte=F("created_at") + timedelta(seconds=30)).exists() == (
            client is operator
        )
    assert len(logged()) == 1
