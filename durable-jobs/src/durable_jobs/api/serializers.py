from celery import current_app
from django.db.models.manager import BaseManager
from rest_framework import serializers
from rest_framework.reverse import reverse

from durable_jobs.diagnosis import reasons
from durable_jobs.models import Batch, Failure, Job
from durable_jobs.states import ACTIVE, FINAL
from durable_jobs.statistics import count_jobs, what_follows

__all__ = ["BatchSerializer", "JobSerializer"]

GENERIC_ERROR = "It failed"  # shown to owners instead of an exception: see JobError
TOO_LONG = "Too long for a list: see the job itself"


def has_job_perm(user, action):
    """Return whether this user is staff with the permission to "view" or "delete" every job."""
    return user.is_staff and user.has_perm(f"durable_jobs.{action}_job")


def may_run_again(user, job):
    """Return whether this user may run the job again, once it has ended."""
    task = current_app.tasks.get(job.task)
    is_owner = job.owner_id is not None and job.owner_id == user.pk
    is_allowed = getattr(task, "owner_may_run_again", False) and job.state != "succeeded"
    return has_job_perm(user, "delete") or (is_owner and is_allowed)


def add_reasons(jobs, user):
    found = reasons(jobs, has_job_perm(user, "view"))
    for job in jobs:
        job.reason = found.get(job.pk, "")


def rows_of(data):
    """Return the rows of a list serializer's data, which may be a manager such as user.job_set: see DRF."""
    return data.all() if isinstance(data, BaseManager) else data


class FailureSerializer(serializers.ModelSerializer):
    class Meta:
        model = Failure
        fields = ["worker", "started_at", "ended_at", "error", "exception", "traceback"]


class CallbackSerializer(serializers.ModelSerializer):
    url = serializers.HyperlinkedIdentityField(view_name="job-detail")

    class Meta:
        model = Job
        fields = ["id", "url", "task", "label", "state"]


class JobListSerializer(serializers.ListSerializer):
    def to_representation(self, data):
        jobs = rows_of(data)
        add_reasons(jobs, self.context["request"].user)
        return super().to_representation(jobs)


class JobSerializer(serializers.ModelSerializer):
    url = serializers.HyperlinkedIdentityField(view_name="job-detail")
    failures = FailureSerializer(
        many=True, required=False, help_text="in the detail view, for users who may view all jobs"
    )
    can_run_again = serializers.SerializerMethodField(
        help_text="it has ended, and the caller may run it again"
    )
    reason = serializers.CharField(
        read_only=True, help_text="what it waits for, or why it does not move"
    )
    follows_url = serializers.URLField(
        required=False,
        allow_null=True,
        help_text="in the detail view: of the job or the batch that it follows",
    )
    followed_by = CallbackSerializer(
        many=True,
        required=False,
        help_text="in the detail view: the jobs that started after it, at most 100",
    )

    class Meta:
        model = Job
        list_serializer_class = JobListSerializer
        fields = ["id", "url", "task", "label", "queue", "state", "reason", "progress", "message"]
        fields += ["result", "error", "failures", "can_run_again"]
        fields += ["batch", "follows", "follows_url", "followed_by"]
        fields += ["created_at", "due_at", "started_at", "finished_at"]
        extra_kwargs = {
            "message": {"help_text": "what the job has last reported"},
            "result": {"help_text": f"a list replaces a long result by {TOO_LONG!r}"},
            "due_at": {"help_text": "when a queued job may start, else null"},
        }

    def get_can_run_again(self, job) -> bool:
        has_ended = job.finished_at and not job.sweep_at  # a cancelled one may still run
        return bool(has_ended) and may_run_again(self.context["request"].user, job)

    def _url_before(self, job):
        if job.follows is None:
            return None
        kind = "batch" if Batch.objects.filter(pk=job.follows).exists() else "job"
        return reverse(f"{kind}-detail", [job.follows], request=self.context["request"])

    def to_representation(self, job):
        if hasattr(job, "short_result"):  # a row of a list: see JobViewSet
            job.result = job.short_result
        is_trusted = has_job_perm(self.context["request"].user, "view")
        if job.state != "queued":
            job.due_at = None
        if self.parent is None:
            add_reasons([job], self.context["request"].user)
            job.follows_url = self._url_before(job)
            job.followed_by = what_follows(job.pk) if job.state == "succeeded" else []
        else:
            for name in ("follows_url", "followed_by"):
                self.fields.pop(name, None)
        if self.parent is not None or not is_trusted:
            self.fields.pop("failures", None)
        shown = super().to_representation(job)
        if job.error and not is_trusted:
            shown["error"] = job.public_error or GENERIC_ERROR
        return shown


class BatchListSerializer(serializers.ListSerializer):
    def to_representation(self, data):
        batches = rows_of(data)
        count_jobs(batches)
        return super().to_representation(batches)


class BatchSerializer(serializers.ModelSerializer):
    url = serializers.HyperlinkedIdentityField(view_name="batch-detail")
    # Not an enum: drf-spectacular has one with this name, that of jobs.
    state = serializers.CharField(help_text="open, succeeded, failed or cancelled")
    counts = serializers.DictField(
        child=serializers.IntegerField(), help_text="how many of its jobs are in each state"
    )
    callbacks = CallbackSerializer(
        many=True,
        required=False,
        help_text="in the detail view: the jobs that started after it, at most 100",
    )

    class Meta:
        model = Batch
        list_serializer_class = BatchListSerializer
        fields = ["id", "url", "label", "state", "counts", "error", "callbacks"]
        fields += ["created_at", "ended_at"]

    def to_representation(self, batch):
        if self.parent is None:
            count_jobs([batch])
            batch.callbacks = what_follows(batch.pk)
        else:
            self.fields.pop("callbacks", None)
        batch.counts = dict.fromkeys(ACTIVE + FINAL, 0) | batch.counts
        return super().to_representation(batch)
