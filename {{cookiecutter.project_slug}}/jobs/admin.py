import uuid

from django.apps import apps
from django.contrib import admin, messages
from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.core.paginator import Paginator
from django.http import HttpRequest
from django.template.defaultfilters import pluralize
from django.urls import reverse
from django.utils.functional import cached_property
from django.utils.html import format_html
from kombu.utils.json import loads

from .beat import check_entry
from .expressions import ACTIVE, FINAL
from .models import Batch, Failure, Job
from .serializers import count_jobs

__all__ = ["announce"]

# The fields on the page of a job
TASK_FIELDS = ["task", "label", "args", "kwargs", "owner", "queue", "batch", "created_at"]
OUTCOME_FIELDS = ["state", "error", "public_error", "result", "progress", "message"]
OUTCOME_FIELDS += ["started_at", "finished_at"]
KEYS = ["id", "idempotency_key", "fingerprint", "unique_key", "limit_key", "held_by"]
INTERNALS = ["cursor", "run_token", "worker", "due_at", "sweep_at", "deadline"]
INTERNALS += ["times_sent", "retries", "crashes", "then", "follows"]


class LatestPages(Paginator):
    """Counts at most 5,000 rows, because counting a million takes long. Filter to see older jobs."""

    most = 5000

    @cached_property
    def count(self):
        return self.object_list[: self.most].count()


def announce(request: HttpRequest, jobs: list[Job], done: str = "enqueued", rest: str = "") -> None:
    """Show how many jobs were enqueued, as a message in the admin.

    The message links to a page that shows them, or to the user's own jobs if the user may not view
    jobs in the admin.
    """
    if not request.user.has_perm("jobs.view_job"):
        url = reverse("index")
    elif len(jobs) == 1:
        url = reverse("admin:jobs_job_change", args=[jobs[0].pk])
    else:
        url = reverse("admin:jobs_job_changelist")  # which shows the newest first
    text = f"{len(jobs)} job{pluralize(jobs)} {done}"
    link = format_html('<a href="{}">{}</a>', url, text) if jobs else text
    messages.success(request, format_html("{}. {}", link, rest))


class FailureInline(admin.StackedInline):
    model = Failure
    verbose_name_plural = "Failed runs, the latest first"
    fields = readonly_fields = ["started", "worker", "shown_traceback"]
    ordering = ["-pk"]
    max_num = 0
    can_delete = False

    def has_view_permission(self, request, obj=None):
        return True  # every user who may view the job may view its failures

    def started(self, failure):
        seconds = (failure.ended_at - failure.started_at).total_seconds()
        return f"{failure.started_at:%Y-%m-%d %H:%M:%S}, for {seconds:.1f} s"

    @admin.display(description="traceback")
    def shown_traceback(self, failure):
        return format_html('<pre style="white-space: pre-wrap">{}</pre>', failure.traceback)


class ReadOnlyAdmin(admin.ModelAdmin):
    """Searches by columns that have an index, and orders by one until the user chooses another."""

    ordering = ["-created_at"]
    list_filter = ["state", "created_at"]
    list_select_related = ["owner"]
    paginator = LatestPages
    show_full_result_count = False
    search_fields = ["pk"]  # shows the search box
    search_help_text = "An id, or the full user name of an owner"

    def get_search_results(self, request, queryset, search_term):
        try:
            found = {"pk": uuid.UUID(search_term)}
        except ValueError:
            found = {f"owner__{get_user_model().USERNAME_FIELD}": search_term}
        return queryset.filter(**found) if search_term else queryset, False

    def response_action(self, request, queryset, **kwargs):
        if request.POST.get("select_across") == "1":  # at most as many as the paginator counts
            queryset = queryset.filter(pk__in=queryset.values("pk")[: LatestPages.most])
        return super().response_action(request, queryset, **kwargs)

    def has_add_permission(self, request):
        return False

    def has_change_permission(self, request, obj=None):
        return False  # a form would bypass JobQuerySet, which keeps a job and its worker consistent


@admin.register(Job)
class JobAdmin(ReadOnlyAdmin):
    list_display = ["task", "state", "progress", "owner", "created_at", "finished_at"]
    actions = ["run_again", "cancel"]
    inlines = [FailureInline]
    fieldsets = [
        (None, {"fields": TASK_FIELDS}),
        ("How it went", {"fields": OUTCOME_FIELDS}),
        ("Internals", {"fields": KEYS + INTERNALS, "classes": ["collapse"]}),
    ]

    @admin.action(description="Run again", permissions=["delete"])
    def run_again(self, request, queryset):
        count = queryset.count()  # first, because copies may be in the queryset, too
        again = queryset.run_again()
        rest = f"{count - len(again)} skipped, because they are active or can no longer run."
        announce(request, again, "queued again", rest)

    @admin.action(description="Cancel", permissions=["delete"])
    def cancel(self, request, queryset):
        count, cancelled = queryset.count(), queryset.cancel()
        rest = f"{count - cancelled} had already ended."
        self.message_user(request, f"{cancelled} job{pluralize(cancelled)} cancelled. {rest}")


@admin.register(Batch)
class BatchAdmin(ReadOnlyAdmin):
    """The permissions for jobs apply."""

    list_display = ["__str__", "state", "members", "owner", "created_at", "ended_at"]
    actions = ["run_failed_again", "cancel"]
    fields = ["label", "owner", "state", "members", "error", "created_at", "ended_at"]
    fields += ["id", "parent", "then", "ended"]

    def has_view_permission(self, request, obj=None):
        return request.user.has_perm("jobs.view_job")

    def has_delete_permission(self, request, obj=None):
        return request.user.has_perm("jobs.delete_job")

    def get_changelist_instance(self, request):
        changelist = super().get_changelist_instance(request)
        count_jobs(changelist.result_list)
        return changelist

    def get_object(self, request, *args):
        if batch := super().get_object(request, *args):
            count_jobs([batch])
        return batch

    @admin.display(description="jobs")
    def members(self, batch):
        counts = [(state, batch.counts.get(state)) for state in FINAL + ACTIVE]
        text = ", ".join(f"{count:,} {state}" for state, count in counts if count)
        url = reverse("admin:jobs_job_changelist")
        return format_html('<a href="{}?batch={}">{}</a>', url, batch.pk, text or "none")

    @admin.action(description="Run failed jobs again", permissions=["delete"])
    def run_failed_again(self, request, queryset):
        again = [job for batch in queryset for job in batch.run_failed_again()]
        announce(request, again, "enqueued again")

    @admin.action(description="Cancel", permissions=["delete"])
    def cancel(self, request, queryset):
        cancelled = sum(batch.cancel() for batch in queryset.filter(ended_at=None))
        self.message_user(request, f"{cancelled} job{pluralize(cancelled)} cancelled.")


if apps.is_installed("django_celery_beat"):
    from django_celery_beat.admin import PeriodicTaskAdmin, PeriodicTaskForm
    from django_celery_beat.models import PeriodicTask

    class ScheduleForm(PeriodicTaskForm):
        """Refuses what Beat cannot start, unless it is disabled."""

        def clean(self):
            data = super().clean()
            if data["enabled"] and not self.errors:
                options = {name: data[name] for name in ["exchange", "routing_key", "priority"]}
                options["expires"] = data["expires"] or data["expire_seconds"]
                try:
                    check_entry(data["task"], loads(data["args"]), loads(data["kwargs"]), options)
                except (TypeError, ValueError) as error:
                    raise ValidationError(f"Beat cannot start this task: {error}") from error
            return data

    admin.site.unregister(PeriodicTask)

    @admin.register(PeriodicTask)
    class ScheduleAdmin(PeriodicTaskAdmin):
        form = ScheduleForm
