"""The admin: lists of jobs and batches, which staff cancel and run again, and the pages "Queues" and "Workers"."""

from datetime import timedelta

from django.apps import apps
from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.auth import get_user_model
from django.core.exceptions import BadRequest, PermissionDenied, ValidationError
from django.core.paginator import Paginator
from django.db import DataError
from django.db.models import F, Q
from django.http import HttpRequest, HttpResponseRedirect
from django.template.defaultfilters import pluralize, truncatechars
from django.urls import reverse
from django.utils.functional import cached_property
from django.utils.html import format_html

from durable_jobs import batches, conf, pauses
from durable_jobs.actions import cancel, run_all_again
from durable_jobs.beat.entries import check_row
from durable_jobs.database import Now
from durable_jobs.diagnosis import overview, reasons, reasons_of_batches, span
from durable_jobs.limits import name_of
from durable_jobs.messages import job_names, known_queues
from durable_jobs.models import Batch, Failure, Job, Pause, Worker
from durable_jobs.pauses import is_paused
from durable_jobs.states import ACTIVE, ADMITTED, FINAL, LEASED, RUNNING, STALLED, UNFINISHED
from durable_jobs.statistics import STALE_SECONDS, count_jobs, kind_of, what_follows
from durable_jobs.validation import uuids

__all__ = ["announce"]

# The fields on the page of a job
ABOUT = ["task", "label", "args", "kwargs", "owner", "queue", "batch", "follows_link", "created_at"]
OUTCOME = ["state", "reason", "error", "public_error", "result", "progress", "message"]
OUTCOME += ["due_at", "started_at", "finished_at", "followed_by"]
INTERNALS = [field.name for field in Job._meta.fields if field.name not in ABOUT + OUTCOME]
MAX_ROWS = 5000  # rows that a list counts, and that an action takes
# How the list of jobs can be filtered, in the words of the metrics. A job that has not ended is in one of three
# indexes: durable_jobs_job_queued, durable_jobs_job_blocked or durable_jobs_job_leased.
IS_QUEUED = ADMITTED | Q(blocked_by__isnull=False)
IS_WAITING = Q(ADMITTED, due_at__lte=Now())
STATES = {
    "active": IS_QUEUED | Q(LEASED, state="running"),
    "waiting": IS_WAITING & ~is_paused(),
    "waiting later": IS_QUEUED & Q(due_at__gt=Now()),
    "blocked": Q(blocked_by__isnull=False, due_at__lte=Now()) | (IS_WAITING & is_paused()),
    "running": RUNNING,
    "stalled": STALLED,
}


def announce(request: HttpRequest, jobs: list[Job], done: str = "enqueued", hint: str = "") -> None:
    """Show how many jobs were enqueued, as a message in the admin.

    The message links to a page that shows them, if the user may view jobs in the admin.
    """
    text = f"{len(jobs)} job{pluralize(jobs)} {done}"
    if jobs and request.user.has_perm("durable_jobs.view_job"):
        # A list shows the newest first.
        page, args = ("change", [jobs[0].pk]) if len(jobs) == 1 else ("changelist", [])
        url = reverse(f"admin:durable_jobs_job_{page}", args=args)
        text = format_html('<a href="{}">{}</a>', url, text)
    messages.success(request, format_html("{}. {}", text, hint))


def log(request, rows, text):
    """Show in the history of these rows what was done with them, when and by whom."""
    LogEntry.objects.log_actions(request.user.pk, rows, CHANGE, text)


def link_to_jobs(text, **filters):
    url = reverse("admin:durable_jobs_job_changelist", query=filters)
    return format_html('<a href="{}">{}</a>', url, text)


class FirstPages(Paginator):
    """Counts at most 5,000 rows, because counting a million takes long. Filter to see older jobs."""

    @cached_property
    def count(self):
        return self.object_list.order_by()[:MAX_ROWS].count()


class NameFilter(admin.SimpleListFilter):
    """A filter by a column. Its values come from the code, so that no query looks for them."""

    def lookups(self, request, model_admin):
        return [(name, name) for name in self.names()]

    def queryset(self, request, queryset):
        return queryset.filter(**self.used_parameters)


class QueueFilter(NameFilter):
    title = parameter_name = "queue"
    names = staticmethod(known_queues)


class TaskFilter(NameFilter):
    title = parameter_name = "task"
    names = staticmethod(job_names)


class StateFilter(admin.SimpleListFilter):
    title = parameter_name = "state"

    def lookups(self, request, model_admin):
        return [(name, name.capitalize()) for name in [*STATES, *FINAL]]

    def queryset(self, request, queryset):
        state = self.value()
        return queryset.filter(STATES.get(state, Q(state=state))) if state else queryset


class JobPermissions:
    """The permissions for jobs apply. Nothing is edited in a form: only actions keep a job and its worker in step."""

    def has_view_permission(self, request, obj=None):
        return request.user.has_perm("durable_jobs.view_job")

    def has_delete_permission(self, request, obj=None):
        return request.user.has_perm("durable_jobs.delete_job")

    def has_change_permission(self, request, obj=None):
        return False

    has_add_permission = has_change_permission


class FailureInline(JobPermissions, admin.StackedInline):
    model = Failure
    verbose_name_plural = "Failed runs, latest first"
    fields = readonly_fields = ["started_at", "ended_at", "worker", "shown_traceback"]
    ordering = ["-pk"]
    can_delete = False

    @admin.display(description="traceback")
    def shown_traceback(self, failure):
        return format_html('<pre style="white-space: pre-wrap">{}</pre>', failure.traceback)


class ListAdmin(JobPermissions, admin.ModelAdmin):
    """Searches by columns that have an index, and sorts by one."""

    ordering = ["-created_at"]
    sortable_by = ["created_at"]
    list_select_related = ["owner"]
    paginator = FirstPages
    show_facets = admin.ShowFacets.NEVER  # they count all rows
    show_full_result_count = False
    search_fields = ["pk"]  # shows the search box
    search_help_text = "An id, or the full user name of an owner"

    def changelist_view(self, request, extra_context=None):
        if "%00" in request.META["QUERY_STRING"]:
            raise BadRequest("A parameter has a NUL, which PostgreSQL refuses")
        return super().changelist_view(request, extra_context)

    def get_queryset(self, request):
        return super().get_queryset(request).defer(*self.large)

    def get_search_results(self, request, queryset, search_term):
        return queryset.filter(self.find(search_term)) if search_term else queryset, False

    def find(self, term):
        """Return the condition for this search term. It has no join, which would hide the owner's index."""
        users = get_user_model()
        owners = users.objects.filter(**{users.USERNAME_FIELD: term})
        return Q(pk__in=list(uuids([term]))) | Q(owner__in=list(owners))

    def response_action(self, request, queryset, **location):  # Django 6.1 has pages with actions
        if request.POST.get("select_across") == "1":
            ids = list(queryset.values_list("pk", flat=True)[:MAX_ROWS])
            queryset = self.model.objects.filter(pk__in=ids)
        return super().response_action(request, queryset, **location)

    def followed_by(self, row):
        return link_to_jobs(what_follows(row.pk).count(), follows=row.pk)


@admin.register(Job)
class JobAdmin(ListAdmin):
    list_display = ["task", "label", "state", "short_error", "queue", "owner"]
    list_display += ["created_at", "finished_at", "progress"]
    list_filter = [StateFilter, TaskFilter, QueueFilter, "created_at"]
    search_help_text = 'An id, the full user name of an owner, or the key of a limit ("tenant:7")'
    large = ["args", "kwargs", "cursor", "steps", "result"]
    actions = ["run_again", "cancel"]
    inlines = [FailureInline]
    fieldsets = [
        (None, {"fields": ABOUT}),
        ("How it went", {"fields": OUTCOME}),
        ("Internals", {"fields": INTERNALS, "classes": ["collapse"]}),
    ]

    def find(self, term):
        return Q(limit_key=term) if name_of(term) in conf.LIMITS else super().find(term)

    @admin.display(description="follows")
    def follows_link(self, job):
        if job.follows is None:
            return None
        kind = kind_of(job.follows)
        url = reverse(f"admin:durable_jobs_{kind}_change", args=[job.follows])
        return format_html('<a href="{}">the {} {}</a>', url, kind, job.follows)

    def reason(self, job):
        return reasons([job], for_staff=True).get(job.pk)

    @admin.display(description="error")
    def short_error(self, job):
        return truncatechars(job.error, 80)

    @admin.action(description="Run again", permissions=["delete"])
    def run_again(self, request, queryset):
        count = queryset.count()  # first, because copies may be in the queryset, too
        again = run_all_again(queryset.defer(None))  # with their arguments
        log(request, again, "Queued again")
        skipped = count - len(again)
        reason = f"{skipped} skipped, because they are active or can no longer run."
        announce(request, again, "queued again", reason if skipped else "")

    @admin.action(description="Cancel", permissions=["delete"])
    def cancel(self, request, queryset):
        active = list(queryset.filter(UNFINISHED))
        cancelled = cancel(queryset)
        log(request, active, "Cancelled")
        self.message_user(request, f"{cancelled} job{pluralize(cancelled)} cancelled.")


@admin.register(Batch)
class BatchAdmin(ListAdmin):
    list_display = ["__str__", "state", "members", "owner", "created_at", "ended_at"]
    list_filter = ["state", "created_at"]
    large = ["on_success", "on_finish"]
    actions = ["run_failed_again", "cancel"]
    fields = ["label", "owner", "state", "reason", "members", "error", "followed_by", "created_at"]
    fields += ["ended_at", "id", "on_success", "on_finish"]

    def get_changelist_instance(self, request):
        changelist = super().get_changelist_instance(request)
        counted = count_jobs(changelist.result_list)
        for batch in changelist.result_list:
            batch.counted = counted[batch.pk]
        return changelist

    def reason(self, batch):
        return reasons_of_batches([batch], for_staff=True).get(batch.pk)

    @admin.display(description="jobs")
    def members(self, batch):
        counts = getattr(batch, "counted", None) or count_jobs([batch])[batch.pk]
        states = (state for state in FINAL + ACTIVE if counts.get(state))
        text = ", ".join(f"{counts[state]:,} {state}" for state in states)
        return link_to_jobs(text or "none", batch=batch.pk)

    @admin.action(description="Run failed jobs again", permissions=["delete"])
    def run_failed_again(self, request, queryset):
        again = []
        for batch in queryset:
            again += batches.run_failed_again(batch, most=MAX_ROWS - len(again))
        log(request, queryset, "Queued again")
        announce(request, again, "queued again")

    @admin.action(description="Cancel", permissions=["delete"])
    def cancel(self, request, queryset):
        still_open = list(queryset.filter(ended_at=None))
        cancelled = sum(map(batches.cancel, still_open))
        log(request, still_open, "Cancelled")
        self.message_user(request, f"{cancelled} job{pluralize(cancelled)} cancelled.")


class PageAdmin(JobPermissions, admin.ModelAdmin):
    """A page that starts with what is wrong now."""

    actions = None

    def changelist_view(self, request, extra_context=None):
        rows, problems = overview()
        context = {"problems": problems, **self.context(rows)}
        return super().changelist_view(request, context)

    def context(self, rows):
        return {}


@admin.register(Worker)
class WorkersAdmin(PageAdmin):
    list_display = ["name", "last_seen", "busy_slots", "queues", "pool", "version", "started_at"]
    list_display_links = None
    ordering = ["seen_at"]  # those that do not respond first

    def get_queryset(self, request):
        return super().get_queryset(request).annotate(silence=Now() - F("seen_at"))

    def has_delete_permission(self, request, obj=None):
        return False

    def last_seen(self, worker):
        is_stale = worker.silence > timedelta(seconds=STALE_SECONDS)
        text = "no heartbeat for {}" if is_stale else "{} ago"
        return text.format(span(worker.silence))

    def busy_slots(self, worker):
        text = f"{worker.busy} of {worker.slots}"
        return link_to_jobs(text, worker=worker.name, state="running")


@admin.register(Pause)
class QueuesAdmin(PageAdmin):
    def changelist_view(self, request, extra_context=None):
        if request.method != "POST":
            return super().changelist_view(request)
        if not self.has_delete_permission(request):
            raise PermissionDenied
        try:
            self.pause_or_resume(request)
        except (DataError, ValueError) as error:
            messages.error(request, str(error))
        return HttpResponseRedirect(request.path)

    def pause_or_resume(self, request):
        name, reason = request.POST.get("pause"), request.POST.get("reason", "")
        if name:
            row, text = pauses.pause(name, reason), f"Paused {name}"
        elif row := Pause.objects.filter(name=request.POST.get("resume")).first():
            pauses.resume(row.name)
            text = f"Resumed {row.name}"
        if row:
            log(request, [row], text)
            messages.success(request, f"{text}.")

    def context(self, rows):
        paused = {pause.name: pause for pause in Pause.objects.all()}
        by_name = {row["queue"]: row for row in rows}
        for row in rows:
            if wait := row.get("durable_jobs_oldest_wait_seconds"):
                row["wait"] = span(wait)
        tasks = job_names()
        names = sorted({*by_name, *paused} - {*tasks})
        return {
            "title": "Queues",
            "queues": [(name, by_name.get(name, {}), paused.get(name)) for name in names],
            "tasks": [(name, paused.get(name)) for name in tasks],
        }


if apps.is_installed("django_celery_beat"):
    from django_celery_beat.admin import PeriodicTaskAdmin, PeriodicTaskForm
    from django_celery_beat.models import PeriodicTask

    class RowForm(PeriodicTaskForm):
        """Refuses a row whose job Beat could not start."""

        def clean(self):
            data = super().clean()
            fields = {name: value for name, value in data.items() if name != "regtask"}
            try:
                check_row(PeriodicTask(**fields))
            except (TypeError, ValueError) as error:
                raise ValidationError(str(error)) from error
            return data

    class RowAdmin(PeriodicTaskAdmin):
        form = RowForm

    if type(admin.site.get_model_admin(PeriodicTask)) is PeriodicTaskAdmin:  # not a project's own
        admin.site.unregister(PeriodicTask)
        admin.site.register(PeriodicTask, RowAdmin)
