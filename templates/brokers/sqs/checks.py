

@register(deploy=True)
def check_visibility_timeout(app_configs, **kwargs):
    current_app.loader.import_default_modules()
    timeout = settings.SQS_VISIBILITY_TIMEOUT
    for task in current_app.tasks.values():
        if task.acks_late and task.time_limit >= timeout:
            yield Warning(
                f"SQS repeats {task.name} after {timeout} s, its limit is {task.time_limit} s.",
                hint="Raise the queues' visibility timeout, then SQS_VISIBILITY_TIMEOUT.",
                id="jobs.W004",
            )
