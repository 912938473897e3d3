from rest_framework import serializers

from .models import Attempt, Job

SHOWN = "id url task label queue state progress message result error attempts"
FAILED = "It failed"  # what an owner reads in place of an exception: see JobError
LONG = "Too long for a list: see the job itself"
TIMES = "created_at started_at finished_at"


def may(user, action):
    """Return whether this user may "view" or "delete" every job: staff with that right."""
    return user.is_staff and user.has_perm(f"jobs.{action}_job")


class AttemptSerializer(serializers.ModelSerializer):
    class Meta:
        model = Attempt
        fields = ["worker", "started_at", "ended_at", "error", "exception", "traceback"]


class JobSerializer(serializers.ModelSerializer):
    url = serializers.HyperlinkedIdentityField(view_name="job-detail")
    attempts = AttemptSerializer(
        many=True, required=False, help_text="in the detail view, for users who may view all jobs"
    )

    class Meta:
        model = Job
        fields = f"{SHOWN} {TIMES}".split()
        extra_kwargs = {"result": {"help_text": f"in lists, if it is long: {LONG!r}"}}

    def to_representation(self, job):
        if "result" in job.get_deferred_fields():  # in lists
            job.result = job.short_result
        is_trusted = may(self.context["request"].user, "view")
        if self.parent is not None or not is_trusted:
            self.fields.pop("attempts", None)
        if job.error and not is_trusted:
            job.error = job.reason or FAILED
        return super().to_representation(job)
