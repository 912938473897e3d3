# Celery: results of plain tasks

DYNAMODB = "dynamodb://@us-east-1/{{ cookiecutter.project_slug }}-results?ttl_seconds=86400"  # in development
CELERY_RESULT_BACKEND = required("CELERY_RESULT_BACKEND", DYNAMODB)

