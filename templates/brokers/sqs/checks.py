

@register(deploy=True)
def check_visibility_timeout(app_configs, **kwargs):
    current_app.loader.import_default_modules()
    timeout = settings.SQS_VISIBILITY_TIMEOUT
    for task in current_app.tasks.values():
        limit = task.time_limit or settings.CELERY_TASK_TIME_LIMIT
        if task.acks_late and limit >= timeout:
            yield Warning(
                f"{task.name} may take {limit} s, but after {timeout} s SQS gives it out again.",
                hint="Raise the queues' visibility timeout, then SQS_VISIBILITY_TIMEOUT.",
                id="jobs.W004",
            )
