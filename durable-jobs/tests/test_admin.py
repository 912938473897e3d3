"""The admin: jobs and batches are found, shown, cancelled and run again by those who may."""

import re
import uuid
from datetime import timedelta

import pytest
from celery import shared_task
from django.contrib.admin import site
from django.contrib.admin.utils import flatten_fieldsets
from django.contrib.messages.storage.cookie import CookieStorage
from django.db import connection
from django.test.utils import CaptureQueriesContext
from helpers import (
    JOBS,
    call,
    count,
    counting_queries,
    fail,
    finish,
    greet,
    listed,
    logged,
    multiply,
    runs_on,
)

from durable_jobs import batches
from durable_jobs.actions import cancel
from durable_jobs.admin import announce
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Batch, Job

pytestmark = pytest.mark.django_db


@shared_task
def plain():
    """No job."""


def act(client, action, query="", jobs=(), **data):
    """Do something with these jobs, or with all that match. Returns the messages."""
    data |= {"action": action, "_selected_action": [job.pk for job in jobs]}
    if not jobs:
        data |= {"select_across": "1", "_selected_action": [uuid.uuid4()]}
    page = client.post(f"{JOBS}?{query}", data, follow=True)
    return [str(message) for message in page.context["messages"]]


@pytest.fixture
def states(commit):
    """A job in each state."""
    with commit():
        jobs = {"succeeded": enqueue(greet)}
    jobs |= {name: enqueue(greet) for name in ("waiting", "running", "failed")}
    jobs["blocked"] = enqueue(call, ["a"])
    jobs["cancelled"] = enqueue(greet)
    jobs["waiting later"] = enqueue(greet, countdown=60)
    cancel(jobs["cancelled"])
    finish(Job.objects.filter(pk=jobs["failed"].pk), "failed")
    Job.objects.filter(pk=jobs["running"].pk).update(**runs_on())
    return jobs


# The list of jobs


def test_each_filter_by_state_finds_the_jobs_in_this_state(admin_client, states):
    for name, job in states.items():
        assert listed(admin_client, f"state={name}") == [job], name
    active = {states[name] for name in ("waiting", "waiting later", "blocked", "running")}
    assert set(listed(admin_client, "state=active")) == active
    assert listed(admin_client, "state=nonsense") == []


def test_jobs_are_filtered_by_task_queue_and_date(admin_client):
    old, other, new = (enqueue(task) for task in (greet, count, greet))
    Job.objects.filter(pk=old.pk).update(created_at=Now() - timedelta(days=3), queue="io")
    assert listed(admin_client, f"task={greet.name}") == [new, old]
    assert listed(admin_client, "queue=io") == [old]
    assert listed(admin_client, f"queue=celery&task={count.name}") == [other]
    page = admin_client.get(JOBS).content.decode()
    [today] = re.findall(r'href="\?(created_at[^"]*)">Today', page)
    assert set(listed(admin_client, today.replace("&amp;", "&"))) == {new, other}


def test_the_filters_names_come_from_the_code_and_not_from_the_table(admin_client):
    enqueue(greet, queue="special")
    Job.objects.update(task="deleted.task")
    with CaptureQueriesContext(connection) as captured:
        page = admin_client.get(JOBS).content.decode()
    assert not [query for query in captured if "DISTINCT" in query["sql"]]
    for name in greet.name, count.name:
        assert f'href="?task={name}"' in page
    assert f"?task={plain.name}" not in page and "?task=deleted" not in page
    assert re.findall(r'href="\?queue=(\w+)"', page) == ["celery", "cpu", "io"]
    assert len(listed(admin_client, "queue=special&task=deleted.task")) == 1


def test_a_nul_in_a_filter_or_a_search_is_a_bad_request(admin_client):
    names = (
        "q",
        "task",
        "queue",
        "state",
        "batch",
        "limit_key",
        "created_at__gte",
        "label__icontains",
    )
    for kind, name in *(("job", name) for name in names), ("batch", "q"), ("batch", "label"):
        url = f"/admin/durable_jobs/{kind}/?{name}=a%00b"
        assert admin_client.get(url).status_code == admin_client.post(url).status_code == 400, url


def test_the_search_finds_an_id_and_an_owner(admin_client, user):
    own, other = enqueue(greet, owner=user), enqueue(greet)
    assert listed(admin_client, f"q={other.pk}") == [other]
    assert listed(admin_client, f"q={user}") == [own]
    assert listed(admin_client, "q=use") == listed(admin_client, f"q={uuid.uuid4()}") == []


def test_the_list_shows_label_queue_and_a_short_error(admin_client):
    job = enqueue(greet, label="For Ada", queue="special")
    finish(Job.objects.filter(pk=job.pk), "failed", error="<b>" + "x" * 5000)
    page = admin_client.get(JOBS).content.decode()
    assert '"field-label">For Ada<' in page and '"field-queue">special<' in page
    assert f'"field-short_error">&lt;b&gt;{"x" * 76}…<' in page


def test_the_list_loads_no_large_values(admin_client):
    enqueue(greet)
    with CaptureQueriesContext(connection) as captured:
        admin_client.get(JOBS)
    sql = " ".join(query["sql"] for query in captured)
    assert '"durable_jobs_job"."label"' in sql and '"durable_jobs_job"."args"' not in sql


ROWS = 5000


@pytest.fixture
def many(user):
    """Succeeded jobs of one task, with statistics."""
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL plans with statistics: set DATABASE_URL=postgres://…")
    ended = {"state": "succeeded", "finished_at": Now(), "task": greet.name, "queue": "celery"}
    job = Job.objects.create(**ended, owner=user)
    multiply(job, ROWS, created_at="now() - random() * interval '30 days'")
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE durable_jobs_job")


def job_rows_read(sql):
    """Return how many rows of the table of jobs PostgreSQL reads for a query."""
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF, SUMMARY OFF, FORMAT JSON) {sql}")
        [[[plan]]] = cursor.fetchall()

    def read(node):
        rows = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        own = node["Actual Loops"] * rows if node.get("Relation Name") == "durable_jobs_job" else 0
        return own + sum(map(read, node.get("Plans", [])))

    return read(plan["Plan"])


FILTERS = ["q=admin", f"state=running&task={greet.name}"]
FILTERS += [f"state={state}" for state in ("active", "waiting", "waiting later", "running")]


def test_a_page_of_a_filtered_list_reads_only_its_own_rows(many, admin_client, monkeypatch):
    """Also if no row matches, when a scan would read all rows before it knows."""
    monkeypatch.setattr("durable_jobs.admin.MAX_ROWS", 300)
    for query in "", *FILTERS, f"task={greet.name}", "state=succeeded":
        with CaptureQueriesContext(connection) as captured:
            found = listed(admin_client, query)
        assert len(found) == (0 if query in FILTERS else 100), query
        asked = [each["sql"] for each in captured if 'FROM "durable_jobs_job"' in each["sql"]]
        assert len(asked) == 2, query  # a count and a page
        assert max(map(job_rows_read, asked)) <= 310, query


# A job


def test_the_admin_shows_a_job_and_adds_none(admin_client):
    job = enqueue(greet)
    page = admin_client.get(f"/admin/durable_jobs/job/{job.pk}/change/").content.decode()
    assert str(job.pk) in page and "helpers.greet" in page
    assert admin_client.get("/admin/durable_jobs/job/add/").status_code == 403


def test_the_admin_shows_tracebacks(admin_client, commit):
    with commit():
        job = enqueue(fail)
    page = admin_client.get(f"/admin/durable_jobs/job/{job.pk}/change/").content.decode()
    assert "ValueError: &lt;b&gt;no&lt;/b&gt;" in page
    assert ">Traceback" in page
    assert "<b>no" not in page


def test_the_admin_shows_every_field_of_a_job():
    shown = set(flatten_fieldsets(site.get_model_admin(Job).fieldsets))
    assert {field.name for field in Job._meta.fields} <= shown


def test_the_admin_shows_the_active_jobs_of_a_user_who_cannot_be_deleted(admin_client, user):
    url = f"/admin/auth/user/{user.pk}/delete/"
    job = enqueue(greet, owner=user, countdown=60)
    page = admin_client.get(url).content.decode()
    assert "following protected related objects" in page and f"{job.pk}" in page
    assert admin_client.post(url, {"post": "yes"}).status_code == 200  # the same page
    user.refresh_from_db()
    cancel(Job.objects.all())
    assert admin_client.post(url, {"post": "yes"}).status_code == 302
    assert not Job.objects.exists()


# Actions


def test_actions_take_the_filtered_set(admin_client, states):
    text = act(admin_client, "cancel", "state=running")
    assert text == ["1 job cancelled."]
    [text] = act(admin_client, "run_again", "state=failed")
    assert "1 job queued again</a>." in text
    assert len(listed(admin_client, "state=waiting")) == 2
    assert logged() == [("admin", "Cancelled"), ("admin", "Queued again")]


def test_the_message_about_jobs_has_a_link_for_users_who_may_view_them(rf, user, admin_user):
    for request in rf.get("/"), rf.get("/"):
        request.user, request._messages = user, CookieStorage(request)
        announce(request, [enqueue(greet)])
        [message] = request._messages
        assert str(message).endswith("1 job enqueued</a>. " if user == admin_user else "enqueued. ")
        user = admin_user


def test_an_action_of_all_takes_no_more_jobs_than_the_list_counts(admin_client, monkeypatch):
    monkeypatch.setattr("durable_jobs.admin.MAX_ROWS", 2)
    for _ in range(5):
        enqueue(greet, countdown=60)
    for action, state in {"cancel": "queued", "run_again": "cancelled"}.items():
        left = []
        for _ in range(3):
            act(admin_client, action, f"state={state}")
            left.append(Job.objects.filter(state=state).count())
        assert left == [3, 1, 0], action


def test_the_action_is_in_the_history_of_each_job(admin_client):
    jobs = [enqueue(greet, countdown=60) for _ in range(2)]
    act(admin_client, "cancel", jobs=jobs)
    for job in jobs:
        page = admin_client.get(f"{JOBS}{job.pk}/history/").content.decode()
        assert page.count("Cancelled") == 1


def test_the_actions_of_batches_are_logged(admin_client):
    batch = batches.enqueue([greet.s(), greet.s()])
    for action in "cancel", "run_failed_again":
        data = {"action": action, "_selected_action": [batch.pk]}
        admin_client.post("/admin/durable_jobs/batch/", data)
    assert [text for _, text in logged()] == ["Cancelled", "Queued again"]
    page = admin_client.get(f"/admin/durable_jobs/batch/{batch.pk}/history/").content.decode()
    assert "Cancelled" in page and "Queued again" in page


def test_staff_needs_view_job_to_see_and_delete_job_to_act(staff):
    job = enqueue(greet, countdown=60)
    assert staff().get(JOBS).status_code == 403
    viewer, operator = staff("view"), staff("view", "delete")
    assert listed(viewer) == [job]
    for client in viewer, operator:
        page = client.get(f"{JOBS}{job.pk}/change/").content.decode()
        assert ('value="cancel"' in page) == (client is operator)
        act(client, "cancel", jobs=[job])
        assert Job.objects.filter(state="cancelled").exists() == (client is operator)
    assert len(logged()) == 1


def act_on_all(admin_client, action):
    data = {"action": action, "_selected_action": list(Job.objects.values_list("pk", flat=True))}
    return admin_client.post("/admin/durable_jobs/job/", data, follow=True).content.decode()


def test_the_admin_cancels_jobs(admin_client):
    job = enqueue(greet)
    assert "1 job cancelled." in act_on_all(admin_client, "cancel")
    job.refresh_from_db()
    assert job.state == "cancelled"


def test_the_admin_runs_ended_jobs_again(admin_client, user, commit):
    with commit():
        ended = enqueue(greet, ["Ada"], owner=user, queue="special")
    cancelled = enqueue(greet, ["Bob"])
    cancel(cancelled)
    active = enqueue(greet)
    with commit():
        assert "2 jobs queued again</a>. 1 skipped" in act_on_all(admin_client, "run_again")
    copy = Job.objects.exclude(pk__in=[ended.pk, cancelled.pk, active.pk]).get()
    assert (copy.owner, copy.queue, copy.follows) == (user, "special", ended.pk)
    assert (copy.state, copy.result) == ("succeeded", "Hello Ada")
    cancelled.refresh_from_db()
    assert (cancelled.state, cancelled.result) == ("succeeded", "Hello Bob")


def test_the_admin_skips_a_job_whose_task_no_longer_exists(admin_client, user, commit):
    with commit():
        gone = enqueue(greet, ["Ada"], owner=user)
    Job.objects.filter(pk=gone.pk).update(task="no.such.task")
    assert "0 jobs queued again. 1 skipped" in act_on_all(admin_client, "run_again")
    assert Job.objects.count() == 1


# Batches


def test_the_admin_lists_and_shows_batches(admin_client, batch):
    other = batches.enqueue([greet.s()])
    batches.cancel(other)
    asked = counting_queries(admin_client.get, "/admin/durable_jobs/batch/")
    assert len(asked) == 2  # one by the paginator
    page = admin_client.get("/admin/durable_jobs/batch/").content.decode()
    assert "Greetings" in page and f"Batch {other.pk}" in page
    for pk, text in {batch.pk: "2 queued", other.pk: "1 cancelled"}.items():
        link = f'<a href="/admin/durable_jobs/job/?batch={pk}">{text}</a>'
        assert link in page
        assert link in admin_client.get(f"/admin/durable_jobs/batch/{pk}/change/").content.decode()
    page = admin_client.get("/admin/durable_jobs/batch/?state__exact=cancelled").content.decode()
    assert "Greetings" not in page and f"Batch {other.pk}" in page
    assert admin_client.get("/admin/durable_jobs/batch/add/").status_code == 403
    assert admin_client.post(f"/admin/durable_jobs/batch/{batch.pk}/change/").status_code == 403


def test_the_admin_lists_the_jobs_of_a_batch(admin_client, batch):
    alone = enqueue(greet)
    page = admin_client.get(f"/admin/durable_jobs/job/?batch={batch.pk}").content.decode()
    assert all(str(job.pk) in page for job in batch.jobs.all())
    assert str(alone.pk) not in page
    page = admin_client.get(
        f"/admin/durable_jobs/job/{batch.jobs.first().pk}/change/"
    ).content.decode()
    assert f'<a href="/admin/durable_jobs/batch/{batch.pk}/change/">Greetings</a>' in page


def test_the_admin_shows_every_field_of_a_batch():
    shown = set(site.get_model_admin(Batch).fields)
    stored = {field.name for field in Batch._meta.fields} - {"counts"}
    assert stored == shown - {"members", "followed_by", "reason"}


def act_on_batches(client, action, url="/admin/durable_jobs/batch/"):
    data = {"action": action, "_selected_action": list(Batch.objects.values_list("pk", flat=True))}
    return client.post(url, data, follow=True).content.decode()


def test_the_admin_cancels_batches_and_runs_their_failed_jobs_again(admin_client, batch):
    batches.cancel(batches.enqueue([greet.s()]))
    assert "2 jobs cancelled." in act_on_batches(admin_client, "cancel")
    batch.refresh_from_db()
    assert batch.state == "cancelled"
    page = admin_client.get(f"/admin/durable_jobs/batch/{batch.pk}/change/").content.decode()
    assert 'value="run_failed_again">Run failed jobs again<' in page
    assert "3 jobs queued again</a>." in act_on_batches(admin_client, "run_failed_again")
    assert Job.objects.filter(state="queued").count() == 3


def test_the_admin_deletes_no_batch_with_active_jobs(admin_client, batch):
    url = f"/admin/durable_jobs/batch/{batch.pk}/delete/"
    assert admin_client.post(url, {"post": "yes"}).status_code == 200  # the same page
    batches.cancel(batch)
    assert admin_client.post(url, {"post": "yes"}).status_code == 302
    assert not Batch.objects.exists() and not Job.objects.exists()


def test_the_admin_asks_for_the_permissions_for_jobs(staff, batch):
    url = "/admin/durable_jobs/batch/"
    assert staff().get(url).status_code == 403
    viewer, both = staff("view"), staff("view", "delete")
    assert "Batches" in viewer.get("/admin/").content.decode()
    assert "Greetings" in viewer.get(url).content.decode()
    assert "cancelled." not in act_on_batches(viewer, "cancel")
    assert viewer.post(f"{url}{batch.pk}/delete/", {"post": "yes"}).status_code == 403
    batch.refresh_from_db()
    assert batch.state == "open"
    assert "2 jobs cancelled." in act_on_batches(both, "cancel")
    assert both.post(f"{url}{batch.pk}/delete/", {"post": "yes"}).status_code == 302
