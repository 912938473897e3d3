

@register(deploy=True)
def check_consumer_timeout(app_configs, **kwargs):
    current_app.loader.import_default_modules()
    # Twice the limit, because a message may wait for another one in the worker.
    timeout = settings.RABBITMQ_CONSUMER_TIMEOUT
    for task in current_app.tasks.values():
        if task.acks_late and 2 * task.time_limit >= timeout:
            yield Warning(
                f"{task.name} has {task.time_limit} s; RabbitMQ cuts workers off after {timeout} s.",
                hint="Raise consumer_timeout in rabbitmq.conf, then RABBITMQ_CONSUMER_TIMEOUT.",
                id="jobs.W004",
            )
