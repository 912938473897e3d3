"""The API of batches: who sees them and their jobs, and what a list costs."""

import re
import uuid
from types import SimpleNamespace

import pytest
from django.contrib.auth.models import Permission
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from helpers import counting_queries, fail, greet, ids, multiply
from rest_framework.test import APIClient

from durable_jobs import batches
from durable_jobs.actions import cancel
from durable_jobs.api.views import EnqueueMixin
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.models import Batch, Job

pytestmark = pytest.mark.django_db
ACTIONS = ["cancel", "run_failed_again"]


def counts(**states):
    return {"queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0} | states


def test_a_batch_is_shown_to_its_owner(api, user, run_jobs):
    batch = batches.enqueue(
        [greet.s("Ada"), greet.s("Bo")],
        owner=user,
        label="Greetings",
        on_success=greet.si(),
        on_finish=greet.si(),
    )
    url = f"/api/batches/{batch.pk}/"
    shown = api.get(url).json()
    assert shown == {
        "id": str(batch.pk),
        "url": f"http://testserver{url}",
        "label": "Greetings",
        "state": "open",
        "counts": counts(queued=2),
        "reason": "",
        "error": "",
        "callbacks": [],
        "created_at": shown["created_at"],
        "ended_at": None,
    }
    run_jobs()
    shown = api.get(url).json()
    assert (shown["state"], shown["counts"]) == ("succeeded", counts(succeeded=2))
    assert shown["ended_at"] > shown["created_at"]
    for job in shown["callbacks"]:
        assert api.get(job["url"]).json()["state"] == job["state"] == "succeeded"
    callbacks = Job.objects.filter(follows=batch.pk)
    assert {job["id"] for job in shown["callbacks"]} == {str(job.pk) for job in callbacks}
    [listed] = api.get("/api/batches/").json()["results"]
    del shown["callbacks"]
    assert listed == shown


def test_results_come_in_the_order_of_an_enqueue_mixin_too(user, monkeypatch):
    """The first job and the others are stored in the same millisecond, as they may be on SQLite."""
    view = EnqueueMixin()
    view.request, view.job_id = SimpleNamespace(user=user, headers={}), uuid.uuid4()
    with batches.open_batch() as batch:
        first = view.enqueue(greet.s(), batch=batch)
        monkeypatch.setattr(batches, "database_time", lambda: first.created_at)
        second = batches.add(batch, greet.s())
    assert first.created_at < second.created_at


def test_a_failed_batch_says_why(api, user, run_jobs):
    batch = batches.enqueue([fail.s()] * 3, owner=user, on_success=greet.si())
    run_jobs()
    shown = api.get(f"/api/batches/{batch.pk}/").json()
    assert (shown["state"], shown["counts"]) == ("failed", counts(failed=3))
    assert (shown["error"], shown["callbacks"]) == ("3 failed of 3", [])


def test_batches_of_other_owners_are_not_found(api, admin_user):
    for owner in admin_user, None:
        other = batches.enqueue([greet.s()], owner=owner)
        url = f"/api/batches/{other.pk}/"
        assert api.get(url).status_code == 404
        assert api.post(f"{url}cancel/").status_code == 404
        assert ids(api.get(f"/api/jobs/?batch={other.pk}")) == []
    assert ids(api.get("/api/batches/")) == []
    assert not Batch.objects.exclude(state="open")
    assert not Job.objects.exclude(state="queued")


@pytest.mark.parametrize("pk", [uuid.UUID(int=1), "no-id", "1.json"])
def test_a_batch_that_does_not_exist_is_not_found(staff_api, pk):
    assert staff_api.get(f"/api/batches/{pk}/").status_code == 404
    for action in ACTIONS:
        assert staff_api.post(f"/api/batches/{pk}/{action}/").status_code == 404


def test_batches_need_a_login(batch):
    anonymous = APIClient()
    for url in "/api/batches/", f"/api/batches/{batch.pk}/":
        assert anonymous.get(url).status_code == 401
    for action in ACTIONS:
        assert anonymous.post(f"/api/batches/{batch.pk}/{action}/").status_code == 401


def test_staff_lists_own_batches_and_batches_without_an_owner(staff_api, user, admin_user):
    own, unowned, other = (
        batches.enqueue([greet.s()], owner=owner) for owner in (admin_user, None, user)
    )
    assert ids(staff_api.get("/api/batches/")) == [str(unowned.pk), str(own.pk)]
    assert len(ids(staff_api.get(f"/api/jobs/?batch={unowned.pk}"))) == 1
    assert ids(staff_api.get(f"/api/jobs/?batch={other.pk}")) == []


def test_staff_needs_the_permissions_for_jobs(staff, batch):
    url = f"/api/batches/{batch.pk}/"
    assert staff().get(url).status_code == 404
    viewer, deleter = staff("view"), staff("delete")
    assert viewer.get(url).json()["id"] == str(batch.pk)
    assert ids(viewer.get("/api/batches/")) == ids(deleter.get("/api/batches/")) == []
    assert viewer.post(f"{url}cancel/").status_code == 404
    Batch.objects.update(owner=None)
    assert viewer.post(f"{url}cancel/").status_code == 404
    assert deleter.post(f"{url}cancel/").json()["state"] == "cancelled"


def test_a_batch_is_cancelled_once(api, batch):
    url = f"/api/batches/{batch.pk}/cancel/"
    response = api.post(url)
    assert (response.status_code, response.json()["state"]) == (200, "cancelled")
    assert response.json()["counts"] == counts(cancelled=2)
    assert api.post(url).status_code == 409
    assert {job.state for job in batch.jobs.all()} == {"cancelled"}


def test_staff_runs_the_failed_jobs_of_a_batch_again(staff, user, batch, monkeypatch):
    url, deleter = f"/api/batches/{batch.pk}/run_failed_again/", staff("delete")
    first = batch.jobs.first()
    cancel(first)
    response = deleter.post(url)
    assert (response.status_code, response.json()["id"]) == (202, str(batch.pk))
    assert Job.objects.filter(state="queued").count() == 2
    batches.cancel(batch)
    monkeypatch.setattr("durable_jobs.api.views.MAX_RUN_AGAIN", 1)
    assert deleter.post(url).json()["counts"] == counts(queued=1, cancelled=1)
    batch.jobs.all().update(task="no.such.task")
    batches.cancel(batch)
    assert deleter.post(url).status_code == 409


def test_only_staff_with_the_delete_permission_runs_jobs_of_a_batch_again(api, staff, batch, user):
    batches.cancel(batch)
    Permission.objects.get(codename="delete_job").user_set.add(user)  # but the user is not staff
    url = f"/api/batches/{batch.pk}/run_failed_again/"
    answers = [client.post(url) for client in (api, staff(), staff("view"))]
    assert [answer.status_code for answer in answers] == [403, 404, 404]
    assert not Job.objects.exclude(state="cancelled")


def test_an_owner_runs_the_jobs_of_a_batch_again_if_all_their_tasks_allow_it(
    api, user, batch, monkeypatch
):
    url = f"/api/batches/{batch.pk}/run_failed_again/"
    assert api.post(url).status_code == 409  # no job has ended
    batches.add(batch, fail.s())
    batches.cancel(batch)
    for allowed, status in {greet: 403, fail: 202}.items():
        monkeypatch.setattr(allowed, "owner_may_run_again", True)
        assert api.post(url).status_code == status
    assert Job.objects.filter(state="queued").count() == 3


def test_batches_have_pages_newest_first(api, user):
    new = [batches.enqueue([greet.s()], owner=user) for _ in range(21)]
    newest_first = [str(batch.pk) for batch in reversed(new)]
    first = api.get("/api/batches/")
    assert ids(first) == newest_first[:20]
    assert ids(api.get(first.json()["next"])) == newest_first[20:]
    assert api.get("/api/batches/?cursor=nonsense").status_code == 404


def test_batches_are_filtered_by_state(api, user, batch):
    cancelled = batches.enqueue([greet.s()], owner=user)
    batches.cancel(cancelled)
    assert ids(api.get("/api/batches/?state=open")) == [str(batch.pk)]
    assert ids(api.get("/api/batches/?state=cancelled")) == [str(cancelled.pk)]
    for query in ["running", "", "open&state=open", "open&cursor=x&cursor=x"]:
        assert api.get(f"/api/batches/?state={query}").status_code == 400


# The jobs of a batch


def test_the_list_of_jobs_has_those_outside_of_batches_or_those_of_a_batch(api, user, batch):
    alone = enqueue(greet, owner=user)
    members = {str(job.pk) for job in batch.jobs.all()}
    assert ids(api.get("/api/jobs/")) == [str(alone.pk)]
    assert set(ids(api.get(f"/api/jobs/?batch={batch.pk}"))) == members
    cancel(batch.jobs.first())
    found = ids(api.get(f"/api/jobs/?batch={batch.pk}&state=queued"))
    assert len(found) == 1 and set(found) < members
    assert ids(api.get("/api/jobs/?state=cancelled")) == []
    assert ids(api.get(f"/api/jobs/?batch={uuid.UUID(int=1)}")) == []
    for query in ["", "no-id", "%00", f"{batch.pk}&batch={batch.pk}"]:
        assert api.get(f"/api/jobs/?batch={query}").status_code == 400


def test_a_job_shows_its_batch(api, user, batch):
    alone, member = enqueue(greet, owner=user), batch.jobs.first()
    assert api.get(f"/api/jobs/{alone.pk}/").json()["batch"] is None
    assert api.get(f"/api/jobs/{member.pk}/").json()["batch"] == str(batch.pk)


# What a list costs


def test_one_query_counts_the_jobs_of_all_batches_of_a_page(api, user):
    url = "/api/batches/"
    for _ in range(9):
        batches.enqueue([greet.s()] * 3, owner=user)
    assert len(counting_queries(api.get, url)) == 1
    assert {batch["counts"]["queued"] for batch in api.get(url).json()["results"]} == {3}
    for batch in Batch.objects.all():
        batches.cancel(batch)
    assert not counting_queries(api.get, url)
    assert {batch["counts"]["cancelled"] for batch in api.get(url).json()["results"]} == {3}


@pytest.fixture
def thousands(user):
    """The batches of a user, each with many jobs, and statistics. Two of them are open."""
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL plans with statistics: set DATABASE_URL=postgres://…")
    now = timezone.now()
    enqueue_many([greet.using(owner=user).s()] * 100)
    ended = {"state": "failed", "ended_at": now}
    batches = [Batch.objects.create(owner=user, **fields) for fields in [{}, {}, *[ended] * 18]]
    multiply(Batch.objects.create(**ended), 2000)
    for batch in [*batches, None]:
        fields = {"task": greet.name, "batch": batch, "owner": user if batch else None}
        fields |= {"state": "succeeded", "finished_at": now}
        multiply(Job.objects.create(**fields), 500, created_at="created_at - n * interval '1 s'")
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")
    return batches


def scans(client, url):
    """Return the indexes and tables that PostgreSQL reads for this request, without users."""
    with CaptureQueriesContext(connection) as captured:
        assert client.get(url).status_code == 200
    found = set()
    with connection.cursor() as cursor:
        for query in captured.captured_queries:
            if '"durable_jobs_' in query["sql"]:
                cursor.execute(f"EXPLAIN {query['sql']}")
                plan = "\n".join(line for (line,) in cursor.fetchall())
                found |= set(re.findall(r"(?:Seq|Index|Only) Scan (?:using|on) (\w+)", plan))
    return found - {"durable_jobs_pause"}  # a few rows


def test_the_lists_read_no_more_than_a_page(api, thousands):
    assert scans(api, "/api/jobs/") == {"durable_jobs_job_owner_alone"}
    assert scans(api, f"/api/jobs/?batch={thousands[0].pk}") == {"durable_jobs_job_batch"}
    of_batches = {
        f"durable_jobs_{name}" for name in ("job_batch", "job_batch_active", "batch_pkey")
    }
    assert scans(api, "/api/batches/") == {*of_batches, "durable_jobs_batch_owner"}
    one = f"/api/batches/{thousands[0].pk}/"
    assert scans(api, one) == {*of_batches, "durable_jobs_job_follows"}


def test_a_scrape_reads_no_batch_that_has_ended(staff_api, thousands):
    assert scans(staff_api, "/metrics") >= {"durable_jobs_batch_ended"}
    assert "durable_jobs_batch" not in scans(staff_api, "/metrics")
