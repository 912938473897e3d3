{% from "chosen.jinja" import worker_pool, has_flower with context %}
"""/api/tasks/<key>/ tells a client what has become of the task that it started."""

from celery import current_app, states
from celery.result import AsyncResult
from django.core import signing
from django.http import Http404, JsonResponse
from django.urls import reverse
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.renderers import JSONRenderer
from rest_framework.response import Response
from rest_framework.views import APIView

STATES = ["PENDING", "STARTED", "PROGRESS", "RETRY", "SUCCESS", "FAILURE", "REVOKED"]


class TaskSerializer(serializers.Serializer):
    id = serializers.CharField(help_text="Celery's task id, as in Flower and in the logs")
    state = serializers.ChoiceField(STATES)
    progress = serializers.JSONField(help_text="In the state PROGRESS: what the task reported")
    result = serializers.JSONField(help_text="In the state SUCCESS: what the task returned")
    error = serializers.CharField(help_text="In the state FAILURE", allow_null=True)


def accepted(request, result):
    """Answer 202 to the request that has sent a task, in any view. `result` is what delay() returned.

    The Location header has the task's URL. It is signed: it works only for this user, and only
    until the result expires. Celery itself can't tell an unknown id from that of a waiting task.
    Raises TypeError for a group, or a task with `ignore_result`: nobody stores their state.
    """
    if not isinstance(result, AsyncResult) or result.ignored:
        raise TypeError("accepted() needs a task without ignore_result=True; for a group, a chord")
    location = reverse("task", args=[signer(request.user).sign(result.id)])
    answer = Response if hasattr(request, "accepted_renderer") else JsonResponse  # a plain view
    return answer(describe(result.id, states.PENDING), status=202, headers={"Location": location})


def signer(user):
    return signing.TimestampSigner(salt=f"task of user {user.pk}")


def status_of(result, user):
    meta = result.backend.get_task_meta(result.id)  # state and result in one read
    state, value = meta["status"], meta["result"]
    status = describe(result.id, state)
    if state == "PROGRESS":
        status["progress"] = as_json(value)
    elif state == states.SUCCESS:
        status["result"] = as_json(value)
    elif state == states.FAILURE:  # an exception may name hosts, tables or other users
        status["error"] = repr(value) if user.is_staff else "The task failed."
    return status


def as_json(value):
    """Return the value, or its text if JSON can't hold it. Celery stores NaN and bytes, for example."""
    try:
        JSONRenderer().render(value)
    except (ValueError, TypeError):
        return repr(value)
    return value


def describe(task_id, state):
    return {"id": task_id, "state": state, "progress": None, "result": None, "error": None}


class TaskView(APIView):
    def result(self):
        age = current_app.conf.result_expires  # a day by default
        try:
            task_id = signer(self.request.user).unsign(self.kwargs["key"], max_age=age)
        except signing.BadSignature:  # another user's, forged or expired
            raise Http404 from None
        return AsyncResult(task_id, app=current_app)

    @extend_schema(responses=TaskSerializer)
    def get(self, request, key):
        return Response(status_of(self.result(), request.user))
{% if has_flower %}

    @extend_schema(responses={204: None})
    def delete(self, request, key):
        """{{ worker_pool.revoke_docs }}"""
{% if cookiecutter.worker_pool == "prefork" %}
        # It can't hit another task: a process gets its next one only after this result is read.
{% endif %}
        self.result().revoke({{ worker_pool.revoke_options }})
        return Response(status=204)
{% endif %}
