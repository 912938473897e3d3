CELERY_WORKER_CONCURRENCY = env.int("WORKER_CONCURRENCY", default=100)
CELERY_WORKER_PREFETCH_MULTIPLIER = 4  # the next tasks are here while acknowledgements wait
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = True  # they are delivered again
CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT = env.float("SOFT_SHUTDOWN_SECONDS", default=20)
CELERY_DB_REUSE_MAX = 0  # each task has a greenlet and a connection of its own: close it
{% include "brokers/" ~ cookiecutter.broker ~ "/gevent.py" %}
