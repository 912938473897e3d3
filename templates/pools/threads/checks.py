

@register(deploy=True)
def check_time_limits(app_configs, **kwargs):
    yield Info(
        "Threads have no time limit: a task that waits for ever keeps its thread.",
        hint="Give each wait a timeout of its own. Then add this id to SILENCED_SYSTEM_CHECKS.",
        id="jobs.I001",
    )
