from rest_framework import serializers

from .models import Failure, Job

__all__ = ["JobSerializer"]

GENERIC_ERROR = "It failed"  # shown to owners instead of an exception: see JobError
TOO_LONG = "Too long for a list: see the job itself"


def has_job_perm(user, action):
    """Return whether this user is staff with the permission to "view" or "delete" every job."""
    return user.is_staff and user.has_perm(f"jobs.{action}_job")


class FailureSerializer(serializers.ModelSerializer):
    class Meta:
        model = Failure
        fields = ["worker", "started_at", "ended_at", "error", "exception", "traceback"]


class JobSerializer(serializers.ModelSerializer):
    url = serializers.HyperlinkedIdentityField(view_name="job-detail")
    failures = FailureSerializer(
        many=True, required=False, help_text="in the detail view, for users who may view all jobs"
    )

    class Meta:
        model = Job
        fields = ["id", "url", "task", "label", "queue", "state", "progress", "message"]
        fields += ["result", "error", "failures", "created_at", "started_at", "finished_at"]
        extra_kwargs = {"result": {"help_text": f"a list replaces a long result by {TOO_LONG!r}"}}

    def to_representation(self, job):
        if hasattr(job, "short_result"):  # a row of a list: see JobViewSet
            job.result = job.short_result
        is_trusted = has_job_perm(self.context["request"].user, "view")
        if self.parent is not None or not is_trusted:
            self.fields.pop("failures", None)
        shown = super().to_representation(job)
        if job.error and not is_trusted:
            shown["error"] = job.public_error or GENERIC_ERROR
        return shown
