from contextlib import suppress

from celery import current_app
from celery.exceptions import NotRegistered
from django.contrib import admin

from .models import FINAL, Job


@admin.register(Job)
class JobAdmin(admin.ModelAdmin):
    list_display = ["task", "state", "progress", "owner", "created_at", "finished_at"]
    ordering = ["-created_at"]
    list_filter = ["state", "task", "queue", "created_at"]
    list_select_related = ["owner"]
    search_fields = ["id", "task", "error", "owner__username"]
    actions = ["run_again", "cancel"]

    def has_add_permission(self, request):
        return False

    def has_change_permission(self, request, obj=None):
        return False  # only the ledger's own UPDATEs keep a job and its worker in step

    @admin.action(description="Run again, as new jobs", permissions=["delete"])
    def run_again(self, request, queryset):
        current_app.loader.import_default_modules()
        again = 0
        for job in queryset.filter(state__in=FINAL):
            with suppress(NotRegistered, TypeError):  # the code has changed since
                task = current_app.tasks[job.task]
                Job.objects.enqueue(task, job.args, job.kwargs, owner=job.owner, queue=job.queue)
                again += 1
        rest = queryset.count() - again
        text = f"{again} jobs enqueued again. {rest} left alone: active, or their task is gone."
        self.message_user(request, text)

    @admin.action(description="Cancel", permissions=["delete"])
    def cancel(self, request, queryset):
        self.message_user(request, f"{queryset.cancel()} jobs cancelled.")
