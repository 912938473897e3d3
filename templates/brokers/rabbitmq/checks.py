

@register(deploy=True)
def check_consumer_timeout(app_configs, **kwargs):
    current_app.loader.import_default_modules()
    timeout = settings.RABBITMQ_CONSUMER_TIMEOUT
    for task in current_app.tasks.values():
        limit = task.time_limit or settings.CELERY_TASK_TIME_LIMIT
        if task.acks_late and 2 * limit >= timeout:  # it may wait for another one in the worker
            yield Warning(
                f"{task.name} may take {limit} s, but after {timeout} s RabbitMQ cuts its worker off.",
                hint="Raise consumer_timeout in rabbitmq.conf, then RABBITMQ_CONSUMER_TIMEOUT.",
                id="jobs.W004",
            )
