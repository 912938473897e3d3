"""A Django project with only the durable queues that people could choose instead."""

import os
from urllib.parse import urlsplit

url = urlsplit(os.environ["DATABASE_URL"])
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": url.hostname,
        "PORT": url.port,
        "USER": url.username,
        "NAME": url.path[1:],
        "CONN_MAX_AGE": 60,  # otherwise django-tasks-db opens a connection for each task
    }
}
INSTALLED_APPS = ["procrastinate.contrib.django", "django_tasks_db", "rivals"]
TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
SECRET_KEY = "of the bench"
USE_TZ = True
