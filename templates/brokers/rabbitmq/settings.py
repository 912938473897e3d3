CELERY_BROKER_URL = env.str("CELERY_BROKER_URL")
if CELERY_BROKER_URL.startswith("amqps:"):
    CELERY_BROKER_USE_SSL = {"server_hostname": None}  # that of the URL, else none is checked
# Quorum queues survive the loss of a node, and count how often a message came back.
CELERY_TASK_DEFAULT_QUEUE_TYPE = CELERY_TASK_CREATE_MISSING_QUEUE_TYPE = "quorum"
# Through topic exchanges a countdown waits in the broker, not in a worker.
CELERY_TASK_DEFAULT_EXCHANGE_TYPE = CELERY_TASK_CREATE_MISSING_QUEUE_EXCHANGE_TYPE = "topic"
CELERY_BROKER_TRANSPORT_OPTIONS = {
    # A message counts as sent once RabbitMQ has stored it.
    "confirm_publish": True,
    # A RabbitMQ that hangs costs a request a second or two.
    "connect_timeout": 1,
    "read_timeout": 1,
    "write_timeout": 1,
    "max_retries": 1,
}
# Seconds, as rabbitmq.conf has it: a worker that holds a message longer is cut off.
RABBITMQ_CONSUMER_TIMEOUT = env.int("RABBITMQ_CONSUMER_TIMEOUT", default=1800)
