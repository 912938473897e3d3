# Celery: results of plain tasks

CELERY_RESULT_BACKEND = "django-db"  # shown in the admin
CELERY_RESULT_EXPIRES = 24 * 60 * 60  # seconds; Beat lets a worker delete older ones each night
CELERY_RESULT_EXTENDED = True  # with the task's name, arguments and worker

