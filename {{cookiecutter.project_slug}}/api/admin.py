"""In the admin, under "Task results", tasks that failed can run again."""

import json
from ast import literal_eval

from celery import current_app, states
from django.contrib import admin, messages
from django.db import transaction
from django_celery_results.admin import TaskResultAdmin
from django_celery_results.models import TaskResult


@admin.action(description="Run again", permissions=["change"])
def run_again(modeladmin, request, queryset):
    """Send failed tasks again, instead of their rows. If the broker is down, the rows stay."""
    for row in queryset.filter(status=states.FAILURE):
        try:
            args, kwargs = json.loads(row.task_args), json.loads(row.task_kwargs)
            if isinstance(args, list):  # Celery stores a text once a task has started
                text = "a step of a chain or chord that did not start: start the whole again."
                messages.error(request, f"{row.task_id}: {text}")
                continue
            if "..." in args + kwargs:  # Celery has cut them
                raise ValueError
            args, kwargs = literal_eval(args), literal_eval(kwargs)
        except (SyntaxError, TypeError, ValueError):
            messages.error(request, f"{row.task_id}: its arguments were not stored as a whole.")
            continue
        with transaction.atomic():
            row.delete()
            current_app.send_task(row.task_name, args, kwargs, task_id=row.task_id)


class ResultAdmin(TaskResultAdmin):
    actions = [run_again]


admin.site.unregister(TaskResult)
admin.site.register(TaskResult, ResultAdmin)
