"""What the API shows: of each kind of row, less in a list than alone."""

from django.utils.functional import cached_property
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers
from rest_framework.reverse import reverse

from durable_jobs.diagnosis import reasons, reasons_of_batches
from durable_jobs.messages import find_task
from durable_jobs.models import Batch, Failure, Job
from durable_jobs.states import ACTIVE, FINAL
from durable_jobs.statistics import count_jobs, kind_of, what_follows

__all__ = ["BatchSerializer", "JobSerializer"]

GENERIC_ERROR = "It failed"  # shown to owners instead of an exception: see JobError
Computed = serializers.SerializerMethodField


def has_job_perm(user, action):
    """Return whether this user is staff with the permission to "view" or "delete" every job."""
    return user.is_staff and user.has_perm(f"durable_jobs.{action}_job")


def may_run_again(user, job):
    """Return whether this user may run the job again, once it has ended."""
    task = find_task(job.task)
    is_owner = job.owner_id is not None and job.owner_id == user.pk
    is_allowed = getattr(task, "owner_may_run_again", False) and job.state != "succeeded"
    return has_job_perm(user, "delete") or (is_owner and is_allowed)


class StateField(serializers.ChoiceField):
    """The state of a job, which has a name of its own in the schema."""


class FailureSerializer(serializers.ModelSerializer):
    class Meta:
        model = Failure
        fields = ["worker", "started_at", "ended_at", "error", "exception", "traceback"]


class NextJobSerializer(serializers.ModelSerializer):
    serializer_choice_field = StateField
    url = serializers.HyperlinkedIdentityField(view_name="durable_jobs:job-detail")

    class Meta:
        model = Job
        fields = ["id", "url", "task", "label", "state"]


class RowSerializer(serializers.ModelSerializer):
    @property
    def user(self):
        return self.context["request"].user

    @property
    def rows(self):
        """This row, or those of the list that it is in: what they have in common costs one query."""
        return [self.instance] if self.parent is None else self.parent.instance

    @cached_property
    def reasons(self):
        return self.find_reasons(self.rows, has_job_perm(self.user, "view"))

    def get_reason(self, row) -> str:
        return self.reasons.get(row.pk, "")

    @extend_schema_field(NextJobSerializer(many=True))
    def get_followed_by(self, row):
        return NextJobSerializer(what_follows(row.pk), many=True, context=self.context).data


class ListedJobSerializer(RowSerializer):
    serializer_choice_field = StateField
    find_reasons = staticmethod(reasons)
    url = serializers.HyperlinkedIdentityField(view_name="durable_jobs:job-detail")
    reason = Computed(help_text="what it waits for, or why it does not move")
    result = serializers.JSONField(source="short_result", help_text="if long, see the detail view")
    error = Computed()
    can_run_again = Computed(help_text="it has ended, and the caller may run it again")

    class Meta:
        model = Job
        fields = ["id", "url", "task", "label", "queue", "state", "reason", "progress", "message"]
        fields += ["result", "error", "can_run_again", "batch", "follows"]
        fields += ["created_at", "due_at", "started_at", "finished_at"]
        extra_kwargs = {"due_at": {"help_text": "when it may start, or could have started"}}

    def get_error(self, job) -> str:
        is_trusted = not job.error or has_job_perm(self.user, "view")
        return job.error if is_trusted else job.public_error or GENERIC_ERROR

    def get_can_run_again(self, job) -> bool:
        has_ended = job.finished_at and not job.lease_ends_at  # a cancelled one may still run
        return bool(has_ended) and may_run_again(self.user, job)


class JobSerializer(ListedJobSerializer):
    result = serializers.JSONField()
    failures = Computed(help_text="for users who may view all jobs")
    follows_url = Computed(help_text="of the job or the batch that it follows")
    followed_by = Computed(help_text="the jobs that started after it, at most 100")

    class Meta(ListedJobSerializer.Meta):
        fields = [*ListedJobSerializer.Meta.fields, "failures", "follows_url", "followed_by"]

    @extend_schema_field(FailureSerializer(many=True))
    def get_failures(self, job):
        rows = job.failures.all() if has_job_perm(self.user, "view") else []
        return FailureSerializer(rows, many=True).data

    def get_follows_url(self, job) -> str | None:
        if job.follows is None:
            return None
        view = f"durable_jobs:{kind_of(job.follows)}-detail"
        return reverse(view, [job.follows], request=self.context["request"])


class ListedBatchSerializer(RowSerializer):
    find_reasons = staticmethod(reasons_of_batches)
    url = serializers.HyperlinkedIdentityField(view_name="durable_jobs:batch-detail")
    # Not an enum: drf-spectacular has one with this name, that of jobs.
    state = serializers.CharField(help_text="open, succeeded, failed or cancelled")
    reason = Computed(help_text="what its newest active job waits for, or why it does not move")
    counts = Computed(help_text="how many of its jobs are in each state")

    class Meta:
        model = Batch
        fields = ["id", "url", "label", "state", "reason", "counts", "error"]
        fields += ["created_at", "ended_at"]

    @cached_property
    def counted(self):
        return count_jobs(self.rows)

    def get_counts(self, batch) -> dict[str, int]:
        return dict.fromkeys(ACTIVE + FINAL, 0) | self.counted[batch.pk]


class BatchSerializer(ListedBatchSerializer):
    callbacks = Computed("get_followed_by", help_text="the jobs that started after it, at most 100")

    class Meta(ListedBatchSerializer.Meta):
        fields = [*ListedBatchSerializer.Meta.fields, "callbacks"]
