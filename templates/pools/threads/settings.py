CELERY_DB_REUSE_MAX = 1000  # no new database connection for each task
CELERY_WORKER_CONCURRENCY = env.int("WORKER_CONCURRENCY", default=20)
CELERY_WORKER_PREFETCH_MULTIPLIER = 1  # a long task does not hold others hostage
CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT = env.float("SOFT_SHUTDOWN_SECONDS", default=20)
