import logging
import time

from django_filters.rest_framework import DjangoFilterBackend
from rest_framework import serializers
from rest_framework.throttling import UserRateThrottle

from .models import Job

logger = logging.getLogger(__name__)

CACHE_PAUSE = 10  # seconds without a try after the cache failed: requests stay quick
SHOWN = "id url task queue state progress message result error attempts"
TIMES = "created_at started_at finished_at"
ERROR = {"type": "object", "properties": {"detail": {"type": "string"}}}
TEXT = {"schema": {"type": "string"}}
COMMON = {401: "Not authenticated", 403: "Not permitted", 406: "No such representation"}
CONFLICTS = {
    "cancel": "The job has ended already",
    "run_again": "The job is active, or its task is gone or takes other arguments",
}


def may(user, action):
    """Return whether this user may "view" or "delete" every job: what the admin asks for too."""
    return user.is_staff and user.has_perm(f"jobs.{action}_job")


class AttemptSerializer(serializers.Serializer):
    started_at = serializers.DateTimeField()
    ended_at = serializers.DateTimeField()
    error = serializers.CharField()
    traceback = serializers.CharField()


class JobSerializer(serializers.ModelSerializer):
    url = serializers.HyperlinkedIdentityField(view_name="job-detail")
    attempts = AttemptSerializer(
        many=True, required=False, help_text="of one job, for who may view all jobs"
    )

    class Meta:
        model = Job
        fields = f"{SHOWN} {TIMES}".split()

    def to_representation(self, job):
        if self.parent is not None or not may(self.context["request"].user, "view"):
            self.fields.pop("attempts", None)
        return super().to_representation(job)


def document_common_answers(result, generator, request, public):
    """Add to the OpenAPI document what no view declares: say of throttles, parsers, EnqueueMixin.

    A postprocessing hook of drf-spectacular: returns the changed document.
    """
    for path, operations in result["paths"].items():
        for operation in operations.values():
            parameters = {parameter["name"] for parameter in operation.get("parameters", [])}
            answers = COMMON | {429: "Too many requests"}
            has_pages = {"page", "cursor"} & parameters
            if "{" in path or has_pages:
                answers[404] = "Not found"
            if "requestBody" in operation or has_pages:
                answers[400] = "Not valid"
            if "requestBody" in operation:
                answers[415] = "Not JSON"
            *_, action, _ = path.rsplit("/", 2)
            if action in CONFLICTS:
                answers[409] = CONFLICTS[action]
            responses = operation["responses"]
            if "Idempotency-Key" in parameters:
                answers[422] = "The key was used for another request"
                responses["202"] = responses.pop("201", responses.get("202"))
            if "Idempotency-Key" in parameters or action == "run_again":
                responses["202"]["headers"] = {"Location": TEXT, "Retry-After": TEXT}
            for status, description in answers.items():
                content = {"application/json": {"schema": ERROR if status != 400 else {}}}
                responses[str(status)] = {"description": description, "content": content}
            responses["429"]["headers"] = {"Retry-After": TEXT}
            responses["414"] = {"description": "The address is too long"}  # says gunicorn
    return result


# Not in views.py, because the framework imports these two before there can be views.


class Filter(DjangoFilterBackend):
    """Refuses a parameter that is empty or comes twice: the answer would not be what was asked."""

    def filter_queryset(self, request, queryset, view):
        for name, values in request.query_params.lists():
            if len(values) > 1 or not values[0]:
                raise serializers.ValidationError({name: ["Say it once, and not empty."]})
        return super().filter_queryset(request, queryset, view)


class Throttle(UserRateThrottle):
    """Counts requests in the cache, and lets them pass while that is away."""

    count_again_at = 0.0

    def allow_request(self, request, view):
        if time.monotonic() < Throttle.count_again_at:
            return True
        try:
            return super().allow_request(request, view)
        except Exception as error:  # each cache raises its own
            Throttle.count_again_at = time.monotonic() + CACHE_PAUSE
            logger.warning("requests are not counted, the cache is away: %r", error)
            return True
