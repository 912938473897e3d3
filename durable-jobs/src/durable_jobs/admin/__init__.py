import uuid

from django import forms
from django.apps import apps
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.views.main import ORDER_VAR, PAGE_VAR
from django.contrib.auth import get_user_model
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import PermissionDenied, ValidationError
from django.core.paginator import Paginator
from django.db.models import Q
from django.db.models.functions import Now
from django.http import HttpRequest, HttpResponseRedirect
from django.template.defaultfilters import pluralize, truncatechars
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.functional import cached_property
from django.utils.html import format_html, format_html_join
from kombu.utils.json import loads

from durable_jobs import actions, batches, conf, pauses
from durable_jobs.admin import pages
from durable_jobs.beat.schedule import check_entry
from durable_jobs.diagnosis import reasons
from durable_jobs.limits import name_of
from durable_jobs.messages import known_names
from durable_jobs.models import Batch, Failure, Job, Pause, Worker
from durable_jobs.states import ACTIVE, FINAL, RUNNING, STALLED, UNFINISHED
from durable_jobs.statistics import count_jobs, what_follows
from durable_jobs.transitions import is_paused

__all__ = ["announce"]

# The fields on the page of a job
TASK_FIELDS = ["task", "label", "args", "kwargs", "owner", "queue", "batch", "follows_link"]
TASK_FIELDS += ["created_at"]
OUTCOME_FIELDS = ["state", "reason", "error", "public_error", "result", "progress", "message"]
OUTCOME_FIELDS += ["due_at", "started_at", "finished_at", "followed_by"]
KEYS = ["id", "idempotency_key", "fingerprint", "unique_key", "limit_key", "blocked_by"]
INTERNALS = ["cursor", "run_token", "worker", "sweep_at", "deadline"]
INTERNALS += ["times_sent", "retries", "crashes", "follows", "results_of", "headers"]
# How the list of jobs can be filtered, in the words of the metrics. A job that has not ended is in one of two
# indexes: job_active or job_blocked.
IS_ACTIVE = Q(state__in=ACTIVE) & (Q(sweep_at__isnull=False) | Q(blocked_by__isnull=False))
IS_WAITING = Q(state="queued", sweep_at__isnull=False, due_at__lte=Now())
STATES = {
    "active": IS_ACTIVE,
    "waiting": IS_WAITING & ~is_paused(),
    "waiting later": IS_ACTIVE & Q(state="queued", due_at__gt=Now()),
    "blocked": Q(blocked_by__isnull=False, due_at__lte=Now()) | (IS_WAITING & is_paused()),
    "running": RUNNING,
    "stalled": STALLED,
    **{state: Q(state=state) for state in FINAL},
}


class LatestPages(Paginator):
    """Counts at most 5,000 rows, because counting a million takes long. Filter to see older jobs."""

    most = 5000

    @cached_property
    def count(self):
        return self.object_list.order_by()[: self.most].count()


def announce(request: HttpRequest, jobs: list[Job], done: str = "enqueued", rest: str = "") -> None:
    """Show how many jobs were enqueued, as a message in the admin.

    The message links to a page that shows them, or to the user's own jobs if the user may not view
    jobs in the admin.
    """
    if not request.user.has_perm("durable_jobs.view_job"):
        url = reverse("index")
    elif len(jobs) == 1:
        url = reverse("admin:durable_jobs_job_change", args=[jobs[0].pk])
    else:
        url = reverse("admin:durable_jobs_job_changelist")  # which shows the newest first
    text = f"{len(jobs)} job{pluralize(jobs)} {done}"
    link = format_html('<a href="{}">{}</a>', url, text) if jobs else text
    messages.success(request, format_html("{}. {}", link, rest))


def log(request, model, text, pk=None):
    """Leave a LogEntry: who did what, and when. With `pk`, the page "History" of this object shows it."""
    LogEntry.objects.create(
        user=request.user,
        content_type=ContentType.objects.get_for_model(model),
        object_id=pk,
        object_repr=text[:200],
        action_flag=CHANGE,
        change_message=text,
    )


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


class NameFilter(admin.SimpleListFilter):
    """A filter by a column. Its values come from the code, so that no query looks for them."""

    names: list[str]

    def lookups(self, request, model_admin):
        chosen = [self.value()] if self.value() else []  # it may be the name of a deleted task
        return [(name, name) for name in sorted({*self.names(), *chosen})]

    def queryset(self, request, queryset):
        return queryset.filter(**self.used_parameters)


class TaskFilter(NameFilter):
    title = parameter_name = "task"

    def names(self):
        return known_names()[1]


class QueueFilter(NameFilter):
    title = parameter_name = "queue"

    def names(self):
        return known_names()[0]


class StateFilter(admin.SimpleListFilter):
    title = parameter_name = "state"

    def lookups(self, request, model_admin):
        return [(name, name.capitalize()) for name in STATES]

    def queryset(self, request, queryset):
        if (state := self.value()) is None:
            return queryset
        if state not in STATES:
            raise IncorrectLookupParameters
        return queryset.filter(STATES[state])


class ReadOnlyAdmin(admin.ModelAdmin):
    """Searches by columns that have an index, and sorts by one."""

    ordering = ["-created_at"]
    sortable_by = ["created_at"]
    list_filter = ["state", "created_at"]
    list_select_related = ["owner"]
    paginator = LatestPages
    show_facets = admin.ShowFacets.NEVER  # they count all rows
    show_full_result_count = False
    search_fields = ["pk"]  # shows the search box
    search_help_text = "An id, or the full user name of an owner"
    conditions = {}  # of actions: which rows they can change

    def get_search_results(self, request, queryset, search_term):
        return queryset.filter(**self.find(search_term)) if search_term else queryset, False

    def find(self, term):
        """Return the condition for this search term. It has no join, which would hide the owner's index."""
        try:
            return {"pk": uuid.UUID(term)}
        except ValueError:
            users = get_user_model()
            return {"owner__in": list(users.objects.filter(**{users.USERNAME_FIELD: term}))}

    def response_action(self, request, queryset, **kwargs):
        if request.POST.get("select_across") == "1":  # at most as many as the paginator counts
            most, action = LatestPages.most, request.POST.get("action")
            rows = queryset.filter(self.conditions.get(action, Q()))
            ids = list(rows.values_list("pk", flat=True)[: most + 1])
            queryset = queryset.filter(pk__in=ids[:most])
            if ids[most:]:
                text = f"These were the first {most:,}. More are left: choose the action again."
                messages.warning(request, text)
        return super().response_action(request, queryset, **kwargs)

    def log(self, request, jobs, done):
        """Say in the log how many jobs were changed, and which filter was set."""
        ids = request.POST.getlist(ACTION_CHECKBOX_NAME)
        is_one = len(ids) == 1 and request.POST.get("select_across") != "1"
        shown = [item for item in request.GET.items() if item[0] not in (PAGE_VAR, ORDER_VAR)]
        filters = ", ".join(f"{name}={value}" for name, value in shown) or "none"
        text = f"{jobs} job{pluralize(jobs)} {done}. Filter: {filters}"
        log(request, self.model, text, pk=ids[0] if is_one else None)

    def followed_by(self, row):
        jobs = what_follows(row.pk).only("label", "task")
        links = (
            (reverse("admin:durable_jobs_job_change", args=[job.pk]), job.label or job)
            for job in jobs
        )
        return format_html_join(", ", '<a href="{}">{}</a>', links)

    def has_add_permission(self, request):
        return False

    def has_change_permission(self, request, obj=None):
        return False  # a form would bypass JobQuerySet, which keeps a job and its worker consistent


@admin.register(Job)
class JobAdmin(ReadOnlyAdmin):
    list_display = ["task", "label", "state", "short_error", "queue", "owner"]
    list_display += ["created_at", "finished_at", "progress"]
    search_help_text = (
        'An id, the full user name of an owner, or the key of a limit, such as "tenant:7"'
    )
    list_filter = [StateFilter, TaskFilter, QueueFilter, "created_at"]
    actions = ["run_again", "cancel"]
    conditions = {"run_again": ~UNFINISHED, "cancel": STATES["active"]}
    inlines = [FailureInline]
    fieldsets = [
        (None, {"fields": TASK_FIELDS}),
        ("How it went", {"fields": OUTCOME_FIELDS}),
        ("Internals", {"fields": KEYS + INTERNALS, "classes": ["collapse"]}),
    ]

    def get_changelist_instance(self, request):
        changelist = super().get_changelist_instance(request)
        large = ["args", "kwargs", "cursor", "result"]
        changelist.result_list = changelist.result_list.defer(*large)
        return changelist

    def find(self, term):
        is_key = name_of(term) in conf.LIMITS
        return {"limit_key": term} if is_key else super().find(term)

    @admin.display(description="follows")
    def follows_link(self, job):
        if job.follows is None:
            return None
        kind = "batch" if Batch.objects.filter(pk=job.follows).exists() else "job"
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
        again = actions.run_all_again(queryset)
        rest = f"{count - len(again)} skipped, because they are active or can no longer run."
        announce(request, again, "queued again", rest)
        self.log(request, len(again), "queued again")

    @admin.action(description="Cancel", permissions=["delete"])
    def cancel(self, request, queryset):
        count, cancelled = queryset.count(), actions.cancel(queryset)
        rest = f"{count - cancelled} had already ended."
        self.message_user(request, f"{cancelled} job{pluralize(cancelled)} cancelled. {rest}")
        self.log(request, cancelled, "cancelled")


@admin.register(Batch)
class BatchAdmin(ReadOnlyAdmin):
    """The permissions for jobs apply."""

    list_display = ["__str__", "state", "members", "owner", "created_at", "ended_at"]
    actions = ["run_failed_again", "cancel"]
    conditions = {"cancel": Q(ended_at=None)}
    fields = [
        "label",
        "owner",
        "state",
        "members",
        "error",
        "followed_by",
        "created_at",
        "ended_at",
    ]
    fields += ["id", "on_success", "on_finish"]

    def has_view_permission(self, request, obj=None):
        return request.user.has_perm("durable_jobs.view_job")

    def has_delete_permission(self, request, obj=None):
        return request.user.has_perm("durable_jobs.delete_job")

    def get_changelist_instance(self, request):
        changelist = super().get_changelist_instance(request)
        self.set_counts(changelist.result_list)
        return changelist

    def set_counts(self, rows):
        for batch, counts in zip(rows, count_jobs(rows).values(), strict=True):
            batch.counts = counts

    def get_object(self, request, *args):
        if batch := super().get_object(request, *args):
            self.set_counts([batch])
        return batch

    @admin.display(description="jobs")
    def members(self, batch):
        counts = [(state, batch.counts.get(state)) for state in FINAL + ACTIVE]
        text = ", ".join(f"{count:,} {state}" for state, count in counts if count)
        url = reverse("admin:durable_jobs_job_changelist")
        return format_html('<a href="{}?batch={}">{}</a>', url, batch.pk, text or "none")

    @admin.action(description="Run failed jobs again", permissions=["delete"])
    def run_failed_again(self, request, queryset):
        again = [job for batch in queryset for job in batches.run_failed_again(batch)]
        announce(request, again, "enqueued again")
        self.log(request, len(again), "enqueued again")

    @admin.action(description="Cancel", permissions=["delete"])
    def cancel(self, request, queryset):
        cancelled = sum(batches.cancel(batch) for batch in queryset.filter(ended_at=None))
        self.message_user(request, f"{cancelled} job{pluralize(cancelled)} cancelled.")
        self.log(request, cancelled, "cancelled")


class PauseForm(forms.Form):
    pause = forms.CharField(required=False)
    resume = forms.CharField(required=False)
    reason = forms.CharField(required=False, max_length=255)


class PageAdmin(admin.ModelAdmin):
    """A page with what queues.py returns for it, in place of a list. The permissions for jobs apply."""

    def get_urls(self):
        name = f"durable_jobs_{self.opts.model_name}_changelist"
        return [url for url in super().get_urls() if url.name == name]

    def has_view_permission(self, request, obj=None):
        return request.user.has_perm("durable_jobs.view_job")

    def has_change_permission(self, request, obj=None):
        return False

    def changelist_view(self, request, extra_context=None):
        if not self.has_view_permission(request):
            raise PermissionDenied
        context = {**self.admin_site.each_context(request), **self.page(), "opts": self.opts}
        context |= {"title": self.opts.verbose_name_plural.title(), **(extra_context or {})}
        name = f"admin/durable_jobs/{self.opts.model_name}/change_list.html"
        return TemplateResponse(request, name, context)


@admin.register(Worker)
class WorkersAdmin(PageAdmin):
    page = staticmethod(pages.workers_page)


@admin.register(Pause)
class QueuesAdmin(PageAdmin):
    page = staticmethod(pages.page)

    def has_change_permission(self, request, obj=None):
        return request.user.has_perm("durable_jobs.delete_job")

    def changelist_view(self, request, extra_context=None):
        may_pause = self.has_change_permission(request)
        if request.method == "POST":
            if not (may_pause and self.has_view_permission(request)):
                raise PermissionDenied
            self.pause_or_resume(request)
            return HttpResponseRedirect(request.path)
        return super().changelist_view(request, {"may_pause": may_pause})

    def pause_or_resume(self, request):
        form = PauseForm(request.POST)
        if not form.is_valid():
            messages.error(request, form.errors.as_text())
            return
        name, reason = form.cleaned_data["pause"], form.cleaned_data["reason"]
        try:
            if name:
                pauses.pause(name, reason)
                text = f"Paused {name}: {reason}" if reason else f"Paused {name}"
            else:
                name = form.cleaned_data["resume"]
                text = f"Resumed {name}" if pauses.resume(name) else ""
        except ValueError as error:
            messages.error(request, str(error))
            return
        if text:
            log(request, Pause, text)
            messages.success(request, f"{text}.")


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
