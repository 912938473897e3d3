"""Jobs over HTTP: the API, the metrics, the admin."""

import re
import uuid
from base64 import b64encode
from datetime import timedelta
from math import inf

import pytest
from celery import current_app as app
from celery import shared_task
from django.contrib.admin import site
from django.contrib.admin.utils import flatten_fieldsets
from django.contrib.auth.models import Permission
from django.core.exceptions import SuspiciousFileOperation
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from rest_framework import serializers
from rest_framework.authtoken.models import Token
from rest_framework.parsers import MultiPartParser
from rest_framework.test import APIClient, APIRequestFactory, force_authenticate
from rest_framework.throttling import UserRateThrottle
from rest_framework.viewsets import GenericViewSet

from jobs import updates
from jobs.models import Batch, Failure, Job, Pause
from jobs.tasks import JobTask
from jobs.views import EnqueueMixin, accepted


@shared_task(base=JobTask, owner_may_run_again=True)
def repeatable(n):
    return n


@shared_task(base=JobTask, bind=True)
def greet(self, name="you"):
    return f"Hello {name}"


@shared_task(base=JobTask)
def fail():
    raise ValueError("<b>no</b>")


def ids(response):
    assert response.status_code == 200
    return [job["id"] for job in response.json()["results"]]


# The API


def test_a_job_is_shown_to_its_owner(api, user, commit):
    with commit():
        job = Job.objects.enqueue(greet, ["Ada"], owner=user)
    shown = api.get(f"/api/jobs/{job.pk}/").json()
    assert shown["task"] == "test_api.greet"
    assert (shown["state"], shown["progress"], shown["result"]) == ("succeeded", 100, "Hello Ada")
    assert api.get(shown["url"]).json() == shown
    assert "args" not in shown


def test_jobs_of_other_owners_are_not_found(api, admin_user):
    for owner in admin_user, None:
        url = f"/api/jobs/{Job.objects.enqueue(greet, owner=owner).pk}/"
        assert api.get(url).status_code == 404
        assert api.post(f"{url}cancel/").status_code == 404
    assert ids(api.get("/api/jobs/")) == []
    assert api.get(f"/api/jobs/{uuid.uuid4()}/").status_code == 404
    assert not Job.objects.exclude(state="queued")


def test_staff_lists_own_jobs_and_jobs_without_an_owner(staff_api, user, admin_user):
    own, unowned = (Job.objects.enqueue(greet, owner=owner) for owner in (admin_user, None))
    Job.objects.enqueue(greet, owner=user)
    assert set(ids(staff_api.get("/api/jobs/"))) == {str(own.pk), str(unowned.pk)}


def test_staff_needs_the_delete_permission_to_cancel_jobs_of_others(staff):
    url = f"/api/jobs/{Job.objects.enqueue(greet).pk}/"
    without_permissions = staff()
    assert without_permissions.get(url).status_code == 200
    assert without_permissions.post(f"{url}cancel/").status_code == 404
    assert staff("delete").post(f"{url}cancel/").status_code == 200


def test_the_list_has_pages_newest_first(api, user):
    jobs = [Job.objects.enqueue(greet, owner=user) for _ in range(21)]
    Job.objects.filter(pk=jobs[0].pk).update(created_at="2020-01-01T00:00Z")
    first = api.get("/api/jobs/").json()
    assert len(first["results"]) == 20
    assert ids(api.get(first["next"])) == [str(jobs[0].pk)]
    assert ids(api.get(api.get(first["next"]).json()["previous"])) == ids(api.get("/api/jobs/"))


def test_a_long_result_is_not_in_the_list(api, user, commit):
    """The page polls the list."""
    with commit():
        long, short = (Job.objects.enqueue(greet, ["x" * n], owner=user) for n in [20_000, 9])
    Job.objects.filter(pk=short.pk).update(result=[1, {"a": None}])
    active = Job.objects.enqueue(greet, owner=user)
    results = {job["id"]: job["result"] for job in api.get("/api/jobs/").json()["results"]}
    assert results == {
        str(long.pk): "Too long for a list: see the job itself",
        str(short.pk): [1, {"a": None}],
        str(active.pk): None,
    }
    assert len(api.get(f"/api/jobs/{long.pk}/").json()["result"]) > 20_000


def test_pages_show_each_job_once_even_if_all_were_created_at_once(api, user):
    Job.objects.enqueue_many(greet, [[]] * 50, owner=user)
    Job.objects.update(created_at="2020-01-01T00:00Z")
    seen, url = [], "/api/jobs/?state=queued"
    while url:
        page = api.get(url)
        seen += ids(page)
        url = page.json()["next"]
    assert len(seen) == len(set(seen)) == 50


@pytest.mark.parametrize("cursor", ["nonsense", b64encode(b"p=yesterday").decode()])
def test_an_invalid_page_cursor_is_not_found(api, user, cursor):
    Job.objects.enqueue(greet, owner=user)
    assert api.get(f"/api/jobs/?cursor={cursor}").status_code == 404


def test_a_list_costs_the_same_however_many_jobs_there_are(api, admin_client, user):
    """No query counts or compares all jobs."""
    Job.objects.enqueue_many(greet, [[]] * 150, owner=user)
    with CaptureQueriesContext(connection) as captured:
        assert len(ids(api.get("/api/jobs/"))) == 20
        assert admin_client.get("/admin/jobs/job/?state__exact=queued").status_code == 200
    asked = [query["sql"] for query in captured if '"jobs_job"' in query["sql"]]
    assert len(asked) == 3
    assert not [sql for sql in asked if "LIMIT" not in sql or "DISTINCT" in sql]


def test_the_list_is_filtered_by_state(api, user, commit):
    with commit():
        Job.objects.enqueue(greet, owner=user)
    queued = Job.objects.enqueue(greet, owner=user)
    assert ids(api.get("/api/jobs/?state=queued")) == [str(queued.pk)]
    for query in ["unheard-of", "", "unheard-of&state=queued", "queued&cursor=x&cursor=x"]:
        assert api.get(f"/api/jobs/?state={query}").status_code == 400


def test_cancel_ends_a_job_once(api, user):
    job = Job.objects.enqueue(greet, owner=user)
    response = api.post(f"/api/jobs/{job.pk}/cancel/")
    assert (response.status_code, response.json()["state"]) == (200, "cancelled")
    assert api.post(f"/api/jobs/{job.pk}/cancel/").status_code == 409


def test_staff_with_permissions_may_open_every_job(staff, user):
    job = Job.objects.enqueue(greet, owner=user)
    url = f"/api/jobs/{job.pk}/"
    assert staff().get(url).status_code == 404
    viewer, deleter = staff("view"), staff("delete")
    assert viewer.get(url).json()["id"] == str(job.pk)
    assert ids(viewer.get("/api/jobs/")) == ids(deleter.get("/api/jobs/")) == []
    assert viewer.post(f"{url}cancel/").status_code == 404
    assert deleter.post(f"{url}cancel/").json()["state"] == "cancelled"


def test_only_staff_with_the_view_permission_reads_tracebacks(api, staff, user, commit):
    with commit():
        job = Job.objects.enqueue(fail, owner=user)
    shown = api.get(f"/api/jobs/{job.pk}/").json()
    assert shown["error"] == "It failed"
    assert "failures" not in shown
    viewer = staff("view")
    [failure] = viewer.get(f"/api/jobs/{job.pk}/").json()["failures"]
    assert failure["error"] == "ValueError: <b>no</b>"
    assert failure["exception"] == "builtins.ValueError"
    assert failure["traceback"].startswith("Traceback")
    Job.objects.update(owner=None)
    [shown] = viewer.get("/api/jobs/").json()["results"]
    assert "failures" not in shown
    assert "failures" not in staff().get(f"/api/jobs/{job.pk}/").json()


def test_staff_runs_a_failed_job_again(staff, user, commit):
    job = Job.objects.enqueue(greet, ["Ada"], owner=user)
    job.cancel()
    with commit():
        response = staff("delete").post(f"/api/jobs/{job.pk}/run_again/")
    assert (response.status_code, response.json()["id"]) == (202, str(job.pk))
    assert (response.json()["state"], response.json()["finished_at"]) == ("queued", None)
    assert response["Location"] == f"/api/jobs/{job.pk}/"
    assert Job.objects.get().result == "Hello Ada"


def test_staff_runs_a_copy_of_a_job_that_succeeded(staff, user, commit):
    with commit():
        ended = Job.objects.enqueue(greet, ["Ada"], owner=user, queue="special", unique="key")
    with commit():
        response = staff("delete").post(f"/api/jobs/{ended.pk}/run_again/")
    again = Job.objects.exclude(pk=ended.pk).get()
    assert (response.status_code, response.json()["id"]) == (202, str(again.pk))
    assert response["Location"] == f"/api/jobs/{again.pk}/"
    assert (again.owner, again.queue, again.unique_key) == (user, "special", "key")
    assert (again.state, again.result, again.follows) == ("succeeded", "Hello Ada", ended.pk)


def test_an_owner_runs_a_failed_job_again_if_its_task_says_so(api, staff, user, commit):
    def post(client, job):
        return client.post(f"/api/jobs/{job.pk}/run_again/")

    mine = Job.objects.enqueue(repeatable, [1], owner=user)
    assert post(api, mine).status_code == 409  # it is active
    assert api.get(f"/api/jobs/{mine.pk}/").json()["can_run_again"] is False
    mine.cancel()
    assert api.get(f"/api/jobs/{mine.pk}/").json()["can_run_again"] is True
    assert api.get("/api/jobs/").json()["results"][0]["can_run_again"] is True
    with commit():
        response = post(api, mine)
    assert (response.status_code, response.json()["id"]) == (202, str(mine.pk))
    succeeded = api.get(f"/api/jobs/{mine.pk}/").json()
    assert (succeeded["state"], succeeded["can_run_again"]) == ("succeeded", False)
    assert post(api, mine).status_code == 403  # only staff may enqueue a copy

    other, unowned = (Job.objects.enqueue(repeatable, [1]) for _ in range(2))
    Job.objects.filter(pk=other.pk).update(owner=staff("view").handler._force_user)
    Job.objects.all().cancel()
    assert (post(api, other).status_code, post(api, unowned).status_code) == (404, 404)
    assert post(staff(), unowned).status_code == 403


def test_an_owner_does_not_get_a_job_of_another_owner(api, user, admin_user):
    job = Job.objects.enqueue(repeatable, [1], owner=user, unique="key")
    job.cancel()
    Job.objects.enqueue(repeatable, [2], owner=admin_user, unique="key")
    response = api.post(f"/api/jobs/{job.pk}/run_again/")
    assert response.status_code == 409
    assert "same `unique`" in response.json()["detail"]


def test_only_staff_with_the_delete_permission_runs_other_jobs_again(api, staff, user, commit):
    job = Job.objects.enqueue(greet, owner=user)
    job.cancel()
    Permission.objects.get(codename="delete_job").user_set.add(user)  # but the user is not staff
    for client, status in (api, 403), (staff(), 404), (staff("view"), 404):
        assert client.post(f"/api/jobs/{job.pk}/run_again/").status_code == status
    shown = [client.get(f"/api/jobs/{job.pk}/") for client in (api, staff("view", "delete"))]
    assert [each.json()["can_run_again"] for each in shown] == [False, True]
    assert APIClient().post(f"/api/jobs/{job.pk}/run_again/").status_code == 401
    assert staff("delete").post(f"/api/jobs/{uuid.uuid4()}/run_again/").status_code == 404
    assert Job.objects.get().state == "cancelled"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "it has not ended yet"),
        ({"task": "no.such.task"}, "there is no task no.such.task"),
        ({"args": [1, 2, 3]}, "arguments"),
        ({"task": "celery.backend_cleanup"}, "is not a job"),
    ],
)
def test_the_answer_says_why_a_job_cannot_run_again(staff_api, changes, reason):
    job = Job.objects.enqueue(greet)
    if changes:
        Job.objects.all().cancel()
        Job.objects.update(**changes)
    response = staff_api.post(f"/api/jobs/{job.pk}/run_again/")
    assert response.status_code == 409
    assert reason in response.json()["detail"]
    assert Job.objects.count() == 1


def test_a_request_without_a_login_is_refused():
    assert APIClient().get("/api/jobs/").status_code == 401
    assert APIClient().post(f"/api/jobs/{uuid.uuid4()}/cancel/").status_code == 401


def test_a_throttled_request_is_told_when_to_retry(api, monkeypatch):
    monkeypatch.setitem(UserRateThrottle.THROTTLE_RATES, "user", "1/min")
    assert api.get("/api/jobs/").status_code == 200
    response = api.get("/api/jobs/")
    assert response.status_code == 429
    assert 0 < int(response["Retry-After"]) <= 60


# Uploads with an Idempotency-Key


class UploadSerializer(serializers.Serializer):
    id = serializers.ReadOnlyField()
    file = serializers.FileField(write_only=True)
    tag = serializers.ListField(write_only=True, default=[])

    def create(self, data):
        """Store an object with a job: a failure. Read the file to its end, as a storage does."""
        if not data["file"].name.strip():
            raise SuspiciousFileOperation
        data["file"].read()
        now = timezone.now()
        return Failure.objects.create(job_id=data["job_id"], started_at=now, ended_at=now)


class UploadViewSet(EnqueueMixin, GenericViewSet):
    queryset = Failure.objects.all()
    serializer_class = UploadSerializer
    parser_classes = [MultiPartParser]

    def perform_create(self, serializer):
        serializer.save(job_id=self.job_id)
        self.enqueue(greet)


def upload(user, content, tags=(), name="tea.csv"):
    data = {"file": SimpleUploadedFile(name, content), "tag": tags}
    headers = {"Idempotency-Key": "key"}
    request = APIRequestFactory().post("/", data, format="multipart", headers=headers)
    force_authenticate(request, user)
    return UploadViewSet.as_view({"post": "create"})(request)


@pytest.mark.parametrize("size", [10, 3_000_000], ids=["in memory", "in a file"])
def test_the_same_key_and_file_give_the_same_job(user, size):
    first, again = upload(user, b"x" * size), upload(user, b"x" * size)
    assert [first.status_code, again.status_code] == [202, 202]
    assert again["Location"] == first["Location"]
    assert upload(user, b"x" * (size - 1) + b"y").status_code == 422
    assert Job.objects.count() == 1


def test_a_key_counts_all_values_of_a_form(user):
    assert upload(user, b"x", ["1", "2"]).status_code == 202
    assert upload(user, b"x", ["1", "2"]).status_code == 202
    assert upload(user, b"x", ["3", "2"]).status_code == 422
    assert upload(user, b"x", ["2"]).status_code == 422


def test_a_file_whose_name_the_storage_refuses_is_a_bad_request(user):
    response = upload(user, b"x", name="   ")
    assert (response.status_code, response.data["detail"].code) == (400, "parse_error")
    assert not Job.objects.exists()


# Metrics


def scrape(client):
    """Return the samples of GET /metrics that are not 0, as {name and labels: value}."""
    response = client.get("/metrics")
    assert response.status_code == 200
    found = {}
    for line in response.content.decode().splitlines():
        name, *labels, value = re.split('[{}",= ]+', line)
        if name != "#" and float(value):
            found[" ".join([name, *labels[1::2]])] = float(value)
    return found


def ago(seconds):
    return Now() - timedelta(seconds=seconds)


def test_the_metrics_count_waiting_jobs_and_the_longest_wait(staff_api):
    Job.objects.enqueue(greet, queue="slow")
    resent = Job.objects.enqueue(greet, queue="slow")
    Job.objects.filter(pk=resent.pk).update(due_at=ago(100), times_sent=3)
    Job.objects.enqueue(greet, queue="slow", countdown=60)
    retried, running = (Job.objects.enqueue(greet) for _ in range(2))
    for job in retried, running:
        changes = {"due_at": ago(100), "state": "running", "run_token": uuid.uuid4()}
        Job.objects.filter(pk=job.pk).update(**changes)
    updates.requeue(Job.objects.filter(pk=retried.pk), 30, retries=1)
    found = scrape(staff_api)
    assert 100 <= found.pop("jobs_oldest_wait_seconds slow") < 160
    assert found == {
        "jobs_waiting slow": 2,
        "jobs_waiting_later slow": 1,
        "jobs_waiting_later celery": 1,
        "jobs_running celery": 1,
        "jobs_sweep_age_seconds": inf,
        "jobs_beat_late_seconds": inf,
    }


def test_jobs_that_are_held_or_paused_are_not_counted_as_waiting(staff_api):
    """More workers would not help them: they raise no alert and start no worker."""
    held = {"held_by": "tenant:7", "sweep_at": None, "due_at": ago(100)}
    paused = {"due_at": ago(100)}
    for queue, changes in ("celery", held), ("celery", held), ("io", paused), ("io", paused):
        job = Job.objects.enqueue(greet, queue=queue)
        Job.objects.filter(pk=job.pk).update(**changes)
    for changes in {"queue": "celery", "held_by": "tenant:7", "sweep_at": None}, {"queue": "io"}:
        job = Job.objects.enqueue(greet, countdown=60)
        Job.objects.filter(pk=job.pk).update(**changes)
    assert scrape(staff_api)["jobs_oldest_wait_seconds io"] >= 100
    Pause.objects.pause("io", "SMTP is down")
    Pause.objects.update(since=ago(60))
    one = Job.objects.filter(queue="io", due_at__lt=Now()).first()
    Job.objects.filter(pk=one.pk).update(held_by="pause:io", sweep_at=None)
    found = scrape(staff_api)
    assert 60 <= found.pop("jobs_pause_seconds io") < 120
    assert found == {
        "jobs_held celery": 2,
        "jobs_held io": 2,  # one of them is not held yet
        "jobs_waiting_later celery": 1,
        "jobs_waiting_later io": 1,
        "jobs_sweep_age_seconds": inf,
        "jobs_beat_late_seconds": inf,
    }


def test_the_metrics_name_each_queue_even_if_it_is_empty(staff_api, settings):
    shown = staff_api.get("/metrics").content.decode()
    for queue in app.conf.task_queues:
        assert re.search(f'jobs_waiting.queue="{queue}". 0.0', shown)


def test_the_metrics_count_jobs_that_ended_in_the_last_minute(staff_api):
    ended = {"started_at": ago(4), "finished_at": Now(), "sweep_at": None}
    for change in [
        {"state": "succeeded"},
        {"state": "succeeded", "started_at": ago(8), "retries": 2},
        {"state": "failed", "crashes": 3},
        {"state": "cancelled", "started_at": None},
        {"state": "cancelled"},
        {"state": "failed", "finished_at": ago(61)},
    ]:
        job = Job.objects.enqueue(greet)
        Job.objects.filter(pk=job.pk).update(**ended | change)
    found = scrape(staff_api)
    ran = {name: found.pop(name) for name in list(found) if "run_seconds" in name}
    assert ran == {
        "jobs_ended_last_minute_run_seconds succeeded test_api.greet": pytest.approx(12, abs=0.5),
        "jobs_ended_last_minute_run_seconds failed test_api.greet": pytest.approx(4, abs=0.5),
    }
    assert found == {
        "jobs_ended_last_minute succeeded test_api.greet": 2,
        "jobs_ended_last_minute failed test_api.greet": 1,
        "jobs_ended_last_minute cancelled test_api.greet": 2,
        "jobs_ended_last_minute_retries succeeded test_api.greet": 2,
        "jobs_ended_last_minute_crashes failed test_api.greet": 3,
        "jobs_sweep_age_seconds": inf,
        "jobs_beat_late_seconds": inf,
    }


def test_the_metrics_are_for_staff_and_not_throttled(api, staff_api, admin_user, monkeypatch):
    monkeypatch.setitem(UserRateThrottle.THROTTLE_RATES, "user", "1/min")
    assert APIClient().get("/metrics").status_code == 401
    assert api.get("/metrics").status_code == 403
    token = Token.objects.create(user=admin_user)
    by_token = APIClient(HTTP_AUTHORIZATION=f"Token {token}", HTTP_ACCEPT="text/plain")
    for client in staff_api, by_token, by_token:  # more often than the throttle allows
        assert client.get("/metrics")["Content-Type"].startswith("text/plain")


def test_a_scrape_needs_seven_queries_however_many_jobs_there_are(staff_api):
    for number in range(20):
        Job.objects.enqueue(greet, queue=f"queue{number % 7}")
    Job.objects.filter(queue="queue1").cancel()
    with CaptureQueriesContext(connection) as captured:
        scrape(staff_api)
    assert len([query for query in captured if "jobs_" in query["sql"]]) == 7


# The admin


def act(admin_client, action):
    data = {"action": action, "_selected_action": list(Job.objects.values_list("pk", flat=True))}
    return admin_client.post("/admin/jobs/job/", data, follow=True).content.decode()


def test_the_admin_shows_the_active_jobs_of_a_user_who_cannot_be_deleted(admin_client, user):
    url = f"/admin/auth/user/{user.pk}/delete/"
    job = Job.objects.enqueue(greet, owner=user, countdown=60)
    page = admin_client.get(url).content.decode()
    assert "following protected related objects" in page and f"{job.pk}" in page
    assert admin_client.post(url, {"post": "yes"}).status_code == 200  # the same page
    user.refresh_from_db()
    Job.objects.all().cancel()
    assert admin_client.post(url, {"post": "yes"}).status_code == 302
    assert not Job.objects.exists()


def test_the_admin_lists_and_shows_jobs(admin_client, user):
    job, other = (Job.objects.enqueue(greet, owner=user) for _ in range(2))
    found = admin_client.get(f"/admin/jobs/job/?q={job.pk}").content.decode()
    assert str(job.pk) in found and str(other.pk) not in found
    Job.objects.filter(pk=other.pk).update(owner=None)
    found = admin_client.get("/admin/jobs/job/?q=user").content.decode()
    assert str(job.pk) in found and str(other.pk) not in found
    assert "0 jobs" in admin_client.get("/admin/jobs/job/?q=use").content.decode()
    assert admin_client.get(f"/admin/jobs/job/{job.pk}/change/").status_code == 200
    assert admin_client.get("/admin/jobs/job/add/").status_code == 403


def test_the_admin_shows_tracebacks(admin_client, commit):
    with commit():
        job = Job.objects.enqueue(fail)
    page = admin_client.get(f"/admin/jobs/job/{job.pk}/change/").content.decode()
    assert "ValueError: &lt;b&gt;no&lt;/b&gt;" in page
    assert ">Traceback" in page
    assert "<b>no" not in page


def test_the_admin_shows_every_field_of_a_job():
    shown = set(flatten_fieldsets(site.get_model_admin(Job).fieldsets))
    assert {field.name for field in Job._meta.fields} <= shown


def test_the_admin_cancels_jobs(admin_client):
    job = Job.objects.enqueue(greet)
    assert "1 job cancelled. 0 had already ended." in act(admin_client, "cancel")
    job.refresh_from_db()
    assert job.state == "cancelled"


def test_the_admin_changes_no_more_jobs_than_it_counts(admin_client, monkeypatch):
    monkeypatch.setattr("jobs.admin.LatestPages.most", 2)
    jobs = [Job.objects.enqueue(greet, countdown=9) for _ in range(3)]
    data = {"action": "cancel", "select_across": "1", "_selected_action": [jobs[0].pk]}
    admin_client.post("/admin/jobs/job/", data)
    assert Job.objects.filter(state="cancelled").count() == 2


def test_the_admin_runs_ended_jobs_again(admin_client, user, commit):
    with commit():
        ended = Job.objects.enqueue(greet, ["Ada"], owner=user, queue="special")
    cancelled = Job.objects.enqueue(greet, ["Bob"])
    cancelled.cancel()
    active = Job.objects.enqueue(greet)
    with commit():
        assert "2 jobs queued again</a>. 1 skipped" in act(admin_client, "run_again")
    copy = Job.objects.exclude(pk__in=[ended.pk, cancelled.pk, active.pk]).get()
    assert (copy.owner, copy.queue, copy.follows) == (user, "special", ended.pk)
    assert (copy.state, copy.result) == ("succeeded", "Hello Ada")
    cancelled.refresh_from_db()
    assert (cancelled.state, cancelled.result) == ("succeeded", "Hello Bob")


def test_many_jobs_run_again_in_a_few_queries(admin_client, user):
    """One query for each of 5,000 jobs took a minute, longer than a server waits."""
    keyed = Job.objects.enqueue(greet, unique="key")
    Job.objects.enqueue_many(greet, [["one"], ["two"]] * 10, queue="cpu", owner=user)
    Job.objects.update(cursor=[7])
    Job.objects.all().cancel()
    with CaptureQueriesContext(connection) as queries:
        again = Job.objects.filter(unique_key=None).run_again()
    assert len(queries) < 12
    assert len(again) == 20
    assert {(job.queue, job.owner_id, *job.cursor) for job in again} == {("cpu", user.pk, 7)}
    assert "1 job queued again</a>. 20 skipped" in act(admin_client, "run_again")
    assert set(Job.objects.filter(state="queued")) == {keyed, *again}
    assert Job.objects.count() == 21


def test_the_admin_skips_a_job_whose_task_no_longer_exists(admin_client, user, commit):
    with commit():
        gone = Job.objects.enqueue(greet, ["Ada"], owner=user)
    Job.objects.filter(pk=gone.pk).update(task="no.such.task")
    assert "0 jobs queued again. 1 skipped" in act(admin_client, "run_again")
    assert Job.objects.count() == 1


# Bad input


def test_a_format_suffix_in_the_url_is_not_found(api, user):
    job = Job.objects.enqueue(greet, owner=user)
    assert api.post(f"/api/jobs/{job.pk}/cancel.json").status_code == 404
    assert api.get("/api/jobs.json").status_code == 404
    response = api.get(f"/api/jobs/{job.pk}.json/")
    assert (response.status_code, response["Content-Type"]) == (404, "application/json")


def test_a_view_answers_with_a_job_or_a_batch(api, user):
    request = APIRequestFactory().post("/")
    request.user = user
    for stored in greet.using(owner=user).enqueue(), Batch.objects.enqueue(greet, [[]], owner=user):
        response = accepted(request, stored)
        assert (response.status_code, response["Retry-After"]) == (202, "1")
        assert response.data["id"] == str(stored.pk)
        assert api.get(response["Location"]).json()["id"] == str(stored.pk)
