from celery import current_app
from django.contrib import admin

from .models import ACTIVE, Job


@admin.register(Job)
class JobAdmin(admin.ModelAdmin):
    list_display = ["id", "task", "state", "progress", "owner", "created_at", "finished_at"]
    list_filter = ["state", "task", "queue", "created_at"]
    list_select_related = ["owner"]
    search_fields = ["id", "task", "error", "owner__username"]
    date_hierarchy = "created_at"
    actions = ["run_again", "cancel"]

    def has_add_permission(self, request):
        return False

    def has_change_permission(self, request, obj=None):
        return False  # only the ledger's own UPDATEs keep a job and its worker in step

    @admin.action(description="Run again, as new jobs", permissions=["delete"])
    def run_again(self, request, queryset):
        current_app.loader.import_default_modules()
        jobs = queryset.exclude(state__in=ACTIVE)
        for job in jobs:
            task = current_app.tasks[job.task]
            Job.objects.enqueue(task, job.args, job.kwargs, owner=job.owner, queue=job.queue)
        self.message_user(request, f"{len(jobs)} jobs enqueued again; active ones were left alone.")

    @admin.action(description="Cancel", permissions=["delete"])
    def cancel(self, request, queryset):
        self.message_user(request, f"{queryset.cancel()} jobs cancelled.")
