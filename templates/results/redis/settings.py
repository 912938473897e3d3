# Celery: results of plain tasks

CELERY_RESULT_BACKEND = env.str("CELERY_RESULT_BACKEND")
CELERY_REDIS_SOCKET_TIMEOUT = CELERY_REDIS_SOCKET_CONNECT_TIMEOUT = 2  # seconds
CELERY_RESULT_BACKEND_TRANSPORT_OPTIONS = {
    "global_keyprefix": "{{ cookiecutter.project_slug }}:",
    "retry_policy": {"max_retries": 1, "interval_start": 0, "timeout": 2},
}

