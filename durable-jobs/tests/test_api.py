"""The API of jobs: who sees them, cancels them and runs them again."""

import uuid
from base64 import b64encode

import pytest
from celery import shared_task
from django.contrib.auth.models import Permission
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import include, path
from django.utils import timezone
from drf_spectacular.generators import SchemaGenerator
from helpers import add, fail, greet, ids
from rest_framework import serializers
from rest_framework.parsers import MultiPartParser
from rest_framework.test import APIClient, APIRequestFactory, force_authenticate
from rest_framework.throttling import UserRateThrottle
from rest_framework.versioning import NamespaceVersioning
from rest_framework.views import APIView
from rest_framework.viewsets import GenericViewSet

from durable_jobs import batches
from durable_jobs.actions import cancel
from durable_jobs.api.views import EnqueueMixin, accepted
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.exceptions import JobError
from durable_jobs.models import Batch, Failure, Job
from durable_jobs.publish import publish
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask, owner_may_run_again=True)
def repeatable(n):
    return n


@shared_task(base=JobTask)
def fail_with_text(text):
    raise JobError(text)


def test_a_job_is_shown_to_its_owner(api, user, commit):
    with commit():
        job = enqueue(greet, ["Ada"], owner=user)
    shown = api.get(f"/api/jobs/{job.pk}/").json()
    assert shown["task"] == "helpers.greet"
    assert (shown["state"], shown["progress"], shown["result"]) == ("succeeded", 100, "Hello Ada")
    assert api.get(shown["url"]).json() == shown
    assert "args" not in shown


def test_jobs_of_other_owners_are_not_found(api, admin_user):
    for owner in admin_user, None:
        url = f"/api/jobs/{enqueue(greet, owner=owner).pk}/"
        assert api.get(url).status_code == 404
        assert api.post(f"{url}cancel/").status_code == 404
    assert ids(api.get("/api/jobs/")) == []
    assert api.get(f"/api/jobs/{uuid.uuid4()}/").status_code == 404
    assert not Job.objects.exclude(state="queued")


def test_staff_lists_own_jobs_and_jobs_without_an_owner(staff_api, user, admin_user):
    own, unowned = (enqueue(greet, owner=owner) for owner in (admin_user, None))
    enqueue(greet, owner=user)
    assert set(ids(staff_api.get("/api/jobs/"))) == {str(own.pk), str(unowned.pk)}


def test_staff_needs_the_delete_permission_to_cancel_jobs_of_others(staff):
    url = f"/api/jobs/{enqueue(greet).pk}/"
    without_permissions = staff()
    assert without_permissions.get(url).status_code == 200
    assert without_permissions.post(f"{url}cancel/").status_code == 404
    assert staff("delete").post(f"{url}cancel/").status_code == 200


def test_the_list_has_pages_newest_first(api, user):
    jobs = [enqueue(greet, owner=user) for _ in range(21)]
    Job.objects.filter(pk=jobs[0].pk).update(created_at="2020-01-01T00:00Z")
    first = api.get("/api/jobs/").json()
    assert len(first["results"]) == 20
    assert ids(api.get(first["next"])) == [str(jobs[0].pk)]
    assert ids(api.get(api.get(first["next"]).json()["previous"])) == ids(api.get("/api/jobs/"))


def test_a_long_result_is_not_in_the_list(api, user, commit):
    """The page polls the list."""
    with commit():
        long, short = (enqueue(greet, ["x" * n], owner=user) for n in [20_000, 9])
    Job.objects.filter(pk=short.pk).update(result=[1, {"a": None}])
    active = enqueue(greet, owner=user)
    results = {job["id"]: job["result"] for job in api.get("/api/jobs/").json()["results"]}
    assert results == {
        str(long.pk): "Too long for a list: see the job itself",
        str(short.pk): [1, {"a": None}],
        str(active.pk): None,
    }
    assert len(api.get(f"/api/jobs/{long.pk}/").json()["result"]) > 20_000


def test_pages_show_each_job_once_even_if_all_were_created_at_once(api, user):
    enqueue_many([greet.using(owner=user).s()] * 50)
    Job.objects.update(created_at="2020-01-01T00:00Z")
    seen, url = [], "/api/jobs/?state=queued"
    while url:
        page = api.get(url)
        seen += ids(page)
        url = page.json()["next"]
    assert len(seen) == len(set(seen)) == 50


@pytest.mark.parametrize("cursor", ["nonsense", b64encode(b"p=%00").decode()])
def test_an_invalid_page_cursor_is_not_found(api, user, cursor):
    enqueue(greet, owner=user)
    assert api.get(f"/api/jobs/?cursor={cursor}").status_code == 404


def test_a_list_costs_the_same_however_many_jobs_there_are(api, admin_client, user):
    """No query counts or compares all jobs."""
    enqueue_many([greet.using(owner=user).s()] * 150)
    with CaptureQueriesContext(connection) as captured:
        assert len(ids(api.get("/api/jobs/"))) == 20
        assert admin_client.get("/admin/durable_jobs/job/?state__exact=queued").status_code == 200
    asked = [query["sql"] for query in captured if '"durable_jobs_job"' in query["sql"]]
    assert len(asked) == 3
    assert not [sql for sql in asked if "LIMIT" not in sql or "DISTINCT" in sql]


def test_the_list_is_filtered_by_state(api, user, commit):
    with commit():
        enqueue(greet, owner=user)
    queued = enqueue(greet, owner=user)
    assert ids(api.get("/api/jobs/?state=queued")) == [str(queued.pk)]
    for query in ["unheard-of", "", "%00", "unheard-of&state=queued", "queued&cursor=x&cursor=x"]:
        assert api.get(f"/api/jobs/?state={query}").status_code == 400


def test_cancel_ends_a_job_once(api, user):
    job = enqueue(greet, owner=user)
    response = api.post(f"/api/jobs/{job.pk}/cancel/")
    assert (response.status_code, response.json()["state"]) == (200, "cancelled")
    assert api.post(f"/api/jobs/{job.pk}/cancel/").status_code == 409


def test_staff_with_permissions_may_open_every_job(staff, user):
    job = enqueue(greet, owner=user)
    url = f"/api/jobs/{job.pk}/"
    assert staff().get(url).status_code == 404
    viewer, deleter = staff("view"), staff("delete")
    assert viewer.get(url).json()["id"] == str(job.pk)
    assert ids(viewer.get("/api/jobs/")) == ids(deleter.get("/api/jobs/")) == []
    assert viewer.post(f"{url}cancel/").status_code == 404
    assert deleter.post(f"{url}cancel/").json()["state"] == "cancelled"


def test_only_staff_with_the_view_permission_reads_tracebacks(api, staff, user, commit):
    with commit():
        job = enqueue(fail, owner=user)
    shown = api.get(f"/api/jobs/{job.pk}/").json()
    assert shown["error"] == "It failed"
    assert shown["failures"] == []
    viewer = staff("view")
    [failure] = viewer.get(f"/api/jobs/{job.pk}/").json()["failures"]
    assert failure["error"] == "ValueError: <b>no</b>"
    assert failure["exception"] == "builtins.ValueError"
    assert failure["traceback"].startswith("Traceback")
    Job.objects.update(owner=None)
    [shown] = viewer.get("/api/jobs/").json()["results"]
    assert "failures" not in shown
    assert not staff().get(f"/api/jobs/{job.pk}/").json()["failures"]


def test_staff_runs_a_failed_job_again(staff, user, commit):
    job = enqueue(greet, ["Ada"], owner=user)
    cancel(job)
    with commit():
        response = staff("delete").post(f"/api/jobs/{job.pk}/run_again/")
    assert (response.status_code, response.json()["id"]) == (202, str(job.pk))
    assert (response.json()["state"], response.json()["finished_at"]) == ("queued", None)
    assert response["Location"] == f"/api/jobs/{job.pk}/"
    assert Job.objects.get().result == "Hello Ada"


def test_staff_runs_a_copy_of_a_job_that_succeeded(staff, user, commit):
    with commit():
        ended = enqueue(greet, ["Ada"], owner=user, queue="special", unique="key")
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

    mine = enqueue(repeatable, [1], owner=user)
    assert post(api, mine).status_code == 409  # it is active
    assert api.get(f"/api/jobs/{mine.pk}/").json()["can_run_again"] is False
    cancel(mine)
    assert api.get(f"/api/jobs/{mine.pk}/").json()["can_run_again"] is True
    assert api.get("/api/jobs/").json()["results"][0]["can_run_again"] is True
    with commit():
        response = post(api, mine)
    assert (response.status_code, response.json()["id"]) == (202, str(mine.pk))
    succeeded = api.get(f"/api/jobs/{mine.pk}/").json()
    assert (succeeded["state"], succeeded["can_run_again"]) == ("succeeded", False)
    assert post(api, mine).status_code == 403  # only staff may enqueue a copy

    other, unowned = (enqueue(repeatable, [1]) for _ in range(2))
    Job.objects.filter(pk=other.pk).update(owner=staff("view").handler._force_user)
    cancel(Job.objects.all())
    assert (post(api, other).status_code, post(api, unowned).status_code) == (404, 404)
    assert post(staff(), unowned).status_code == 403


def test_an_owner_does_not_get_a_job_of_another_owner(api, user, admin_user):
    job = enqueue(repeatable, [1], owner=user, unique="key")
    cancel(job)
    enqueue(repeatable, [2], owner=admin_user, unique="key")
    response = api.post(f"/api/jobs/{job.pk}/run_again/")
    assert response.status_code == 409
    assert "same `unique`" in response.json()["detail"]


def test_only_staff_with_the_delete_permission_runs_other_jobs_again(api, staff, user, commit):
    job = enqueue(greet, owner=user)
    cancel(job)
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
    job = enqueue(greet)
    if changes:
        cancel(Job.objects.all())
        Job.objects.update(**changes)
    response = staff_api.post(f"/api/jobs/{job.pk}/run_again/")
    assert response.status_code == 409
    assert reason in response.json()["detail"]
    assert Job.objects.count() == 1


def test_a_request_without_a_login_is_refused():
    assert APIClient().get("/api/jobs/").status_code == 401
    assert APIClient().post(f"/api/jobs/{uuid.uuid4()}/cancel/").status_code == 401


def test_an_owner_reads_only_the_text_of_a_job_error(api, user):
    for task, args, shown in [(fail_with_text, ["Row 17"], "Row 17"), (add, [1, "2"], "It failed")]:
        job = enqueue(task, args, owner=user, label="Import")
        publish([job])
        seen = api.get(f"/api/jobs/{job.pk}/").json()
        assert (seen["label"], seen["state"], seen["error"]) == ("Import", "failed", shown)


def test_staff_reads_the_text_of_every_exception(staff_api):
    job = enqueue(add, [1, "2"])
    publish([job])
    assert "TypeError" in staff_api.get(f"/api/jobs/{job.pk}/").json()["error"]


def test_a_throttled_request_is_told_when_to_retry(api, monkeypatch):
    monkeypatch.setitem(UserRateThrottle.THROTTLE_RATES, "user", "1/min")
    assert api.get("/api/jobs/").status_code == 200
    response = api.get("/api/jobs/")
    assert response.status_code == 429
    assert 0 < int(response["Retry-After"]) <= 60


def test_a_format_suffix_in_the_url_is_not_found(api, user):
    job = enqueue(greet, owner=user)
    assert api.post(f"/api/jobs/{job.pk}/cancel.json").status_code == 404
    assert api.get("/api/jobs.json").status_code == 404
    response = api.get(f"/api/jobs/{job.pk}.json/")
    assert (response.status_code, response["Content-Type"]) == (404, "application/json")


def test_a_view_answers_with_a_job_or_a_batch(api, user):
    request = APIRequestFactory().post("/")
    request.user = user
    for stored in greet.using(owner=user).enqueue(), batches.enqueue([greet.s()], owner=user):
        response = accepted(request, stored)
        assert (response.status_code, response["Retry-After"]) == (202, "1")
        assert response.data["id"] == str(stored.pk)
        assert api.get(response["Location"]).json()["id"] == str(stored.pk)


class Versions(NamespaceVersioning):
    allowed_versions = ["v1"]


class Versioned:
    urlpatterns = [path("v1/", include(([path("api/", include("durable_jobs.urls"))], "v1")))]


@pytest.mark.parametrize("urls, prefix", [("urls", ""), (Versioned, "/v1")])
def test_namespaces_may_be_versions(urls, prefix, api, user, settings, monkeypatch):
    settings.ROOT_URLCONF = urls
    monkeypatch.setattr(APIView, "versioning_class", Versions)
    job = repeatable.using(owner=user).enqueue(1)
    cancel(job)
    [shown] = api.get(f"{prefix}/api/jobs/").json()["results"]
    response = api.post(f"{shown['url']}run_again/")
    assert response.status_code == 202
    assert response["Location"] == f"{prefix}/api/jobs/{job.pk}/"


# Uploads with an Idempotency-Key


class UploadSerializer(serializers.Serializer):
    id = serializers.ReadOnlyField()
    file = serializers.FileField(write_only=True)
    tag = serializers.ListField(write_only=True, default=[])

    def create(self, data):
        """Store an object with a job: a failure. Read the file to its end, as a storage does."""
        data["file"].read()
        now = timezone.now()
        return Failure.objects.create(job_id=data["job_id"], started_at=now, ended_at=now)


class UploadViewSet(EnqueueMixin, GenericViewSet):
    queryset = Failure.objects.all()
    serializer_class = UploadSerializer
    parser_classes = [MultiPartParser]

    def perform_create(self, serializer):
        serializer.save(job_id=self.job_id)
        self.enqueue(greet.s())


class BatchUploadViewSet(UploadViewSet):
    def perform_create(self, serializer):
        serializer.save(job_id=self.job_id)
        with batches.open_batch(owner=self.request.user, on_success=greet.s()) as batch:
            self.enqueue(greet.s("first"), batch=batch)
            batches.add_many(batch, [greet.s("second"), greet.s("third")])


def upload(user, content, tags=(), view=UploadViewSet):
    data = {"file": SimpleUploadedFile("tea.csv", content), "tag": tags}
    headers = {"Idempotency-Key": "key"}
    request = APIRequestFactory().post("/", data, format="multipart", headers=headers)
    force_authenticate(request, user)
    return view.as_view({"post": "create"})(request)


def test_the_same_key_gives_the_same_batch(user, run_jobs):
    first, again = (upload(user, b"x", view=BatchUploadViewSet) for _ in range(2))
    assert [first.status_code, again.status_code] == [202, 202]
    assert again["Location"] == first["Location"]
    assert upload(user, b"y", view=BatchUploadViewSet).status_code == 422
    batch = Batch.objects.get()
    members = batch.jobs.order_by("created_at")
    assert [job.args for job in members] == [["first"], ["second"], ["third"]]
    assert first["Location"] == f"/api/jobs/{members[0].pk}/"
    assert {job.owner for job in members} == {user}
    run_jobs()
    batch.refresh_from_db()
    assert (batch.state, batch.counts) == ("succeeded", {"succeeded": 3})


def test_a_view_adds_no_job_to_a_batch_that_has_ended(user, monkeypatch):
    ended = batches.enqueue([])
    add = lambda self, serializer: self.enqueue(greet.s(), batch=ended)  # noqa: E731
    monkeypatch.setattr(UploadViewSet, "perform_create", add)
    with pytest.raises(ValueError, match="has ended"):
        upload(user, b"x")
    assert not Job.objects.exists()


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


@pytest.mark.parametrize("url", ["/api/jobs/", "/api/batches/"])
def test_anonymous_users_get_nothing_by_default(url):
    """DRF's default permission allows everyone."""
    assert APIClient().get(url).status_code == 401


def test_the_enum_of_a_state_has_a_name_that_no_field_of_the_project_takes():
    schemas = SchemaGenerator().get_schema(public=True)["components"]["schemas"]
    assert schemas["JobState"]["enum"] == ["queued", "running", "succeeded", "failed", "cancelled"]
    assert "StateEnum" not in schemas
