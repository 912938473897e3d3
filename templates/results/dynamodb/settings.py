# Celery: results of plain tasks

CELERY_RESULT_BACKEND = env.str("CELERY_RESULT_BACKEND")

