

@register(deploy=True)
def check_visibility_timeout(app_configs, **kwargs):
    current_app.loader.import_default_modules()
    timeout = settings.CELERY_BROKER_TRANSPORT_OPTIONS["visibility_timeout"]
    for task in current_app.tasks.values():
        if task.acks_late and task.time_limit >= timeout:
            yield Warning(
                f"Redis repeats {task.name} after {timeout} s, its limit is {task.time_limit} s.",
                hint="Raise TASK_TIME_LIMIT, which moves both, not the limit of one task.",
                id="jobs.W004",
            )
