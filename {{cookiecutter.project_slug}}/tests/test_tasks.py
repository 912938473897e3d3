{% from "chosen.jinja" import worker_pool, has_flower with context %}
import pytest
from celery import uuid
from celery.result import AsyncResult, GroupResult
from rest_framework.test import APIClient

from api.views import accepted
from config.celery import app


@pytest.fixture
def task():
    """What `delay()` returns."""
    return AsyncResult(uuid(), app=app)


@pytest.fixture
def location(rf, user, task):
    """The address of a task that `user` has started."""
    request = rf.post("/")
    request.user = user
    return accepted(request, task)["Location"]


def test_a_client_follows_a_task_to_its_result(api, task, location):
    assert api.get(location).data["state"] == "PENDING"
    app.backend.store_result(task.id, {"done": 1, "total": 2}, "PROGRESS")
    assert api.get(location).data["progress"] == {"done": 1, "total": 2}
    app.backend.store_result(task.id, 7, "SUCCESS")
    expected = {"id": task.id, "state": "SUCCESS", "progress": None, "result": 7, "error": None}
    assert api.get(location).data == expected


def test_what_stores_no_state_is_refused(rf, task):
    task.ignored = True
    for result in task, GroupResult("id", [task]):
        with pytest.raises(TypeError, match="ignore_result"):
            accepted(rf.post("/"), result)


@pytest.mark.parametrize("value", [float("nan"), {"data": b"\xff"}, "\ud800"])
def test_a_result_that_json_cannot_hold_is_text(api, task, location, value):
    app.backend.store_result(task.id, value, "SUCCESS")
    assert api.get(location).json()["result"] == repr(value)


def test_clients_do_not_see_which_worker_runs_a_task(api, task, location):
    app.backend.store_result(task.id, {"pid": 7, "hostname": "worker@host"}, "STARTED")
    assert "worker@host" not in str(api.get(location).data)


def test_only_staff_can_read_exceptions(api, user, task, location):
    app.backend.mark_as_failure(task.id, ValueError("host db1"))
    assert api.get(location).data["error"] == "The task failed."
    user.is_staff = True
    user.save()
    assert "host db1" in api.get(location).data["error"]


def test_nobody_else_can_see_a_task(api, admin_api, task, location, monkeypatch):
    assert APIClient().get(location).status_code == 401
    for url in location, f"/api/tasks/{task.id}/":
        assert admin_api.get(url).status_code == 404
{% if has_flower %}
        assert admin_api.delete(url).status_code == 404
{% endif %}
    monkeypatch.setitem(app.conf, "result_expires", -1)
    assert api.get(location).status_code == 404
{% if has_flower %}


def test_a_task_is_cancelled(api, task, location, monkeypatch):
    revoked = []
    monkeypatch.setattr(type(app.control), "revoke", lambda self, id, **options: revoked.append(id))
    assert api.delete(location).status_code == 204
    assert revoked == [task.id]
{% endif %}
