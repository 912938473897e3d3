CELERY_BROKER_URL = "sqs://"  # AWS's own variables and roles say where, and who asks
SQS_REGION = env.str("AWS_DEFAULT_REGION")
SQS_ENDPOINT = env.str("AWS_ENDPOINT_URL", default=f"https://sqs.{SQS_REGION}.amazonaws.com")
SQS_ADDRESS = f"{SQS_ENDPOINT}/{env.str('AWS_ACCOUNT_ID')}/{{ cookiecutter.project_slug }}"
# A worker creates no queue: a new one is added here, then made, see README.md. "test" is for tests.
SQS_QUEUES = ["celery", {{ '"cpu", "io", ' if cookiecutter.include_example }}"test"]
# What the queues have: SQS gives a task out again after this time, also one that still runs.
SQS_VISIBILITY_TIMEOUT = env.int("SQS_VISIBILITY_TIMEOUT", default=660)
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "region": SQS_REGION,
    "predefined_queues": {name: {"url": f"{SQS_ADDRESS}-{name}"} for name in SQS_QUEUES},
    "wait_time_seconds": env.int("SQS_WAIT_SECONDS", default=20),  # long polling
    # An SQS that hangs costs a request one or two seconds.
    "client-config": {
        "connect_timeout": 1,
        "read_timeout": 1,
        "retries": {"total_max_attempts": 1},
    },
}
CELERY_TASK_PUBLISH_RETRY = False  # each message is a request of its own: nothing to reconnect
CELERY_WORKER_ENABLE_REMOTE_CONTROL = False  # SQS cannot send to all workers
logging.getLogger("botocore").setLevel("WARNING")  # not how each connection found its address
