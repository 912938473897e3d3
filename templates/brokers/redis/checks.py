

@register(deploy=True)
def check_visibility_timeout(app_configs, **kwargs):
    current_app.loader.import_default_modules()
    timeout = settings.CELERY_BROKER_TRANSPORT_OPTIONS["visibility_timeout"]
    for task in current_app.tasks.values():
        limit = task.time_limit or settings.CELERY_TASK_TIME_LIMIT
        if task.acks_late and limit >= timeout:
            yield Warning(
                f"{task.name} may take {limit} s, but after {timeout} s Redis gives it out again.",
                hint="Raise TASK_TIME_LIMIT, which moves both, not the limit of one task.",
                id="jobs.W004",
            )
