"""What the app `durable_jobs` needs: no broker, and SQLite unless DATABASE_URL names PostgreSQL."""

import os
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import django

SOURCE = Path(__file__).parents[1] / "src"
sys.path.insert(0, str(SOURCE))

from durable_jobs.celery import Celery  # noqa: E402

app = Celery("library", set_as_current=True)
app.conf.update(
    broker_url="memory://",
    broker_transport_options={"polling_interval": 0.01},  # seconds; kombu's is 1
    result_backend="cache+memory://",
    task_store_eager_result=True,
    task_acks_late=True,
    task_send_sent_event=True,
    task_queues={"celery": {}, "cpu": {}, "io": {}},
    task_soft_time_limit=540,
    task_time_limit=600,
    worker_timer_precision=0.01,  # seconds until a worker's timer ends
    worker_soft_shutdown_timeout=20,
)

SECRET_KEY = "library"  # noqa: S105
ROOT_URLCONF = "urls"
USE_TZ = True
STATIC_URL = "static/"
INSTALLED_APPS = [
    *({"django_tasks"} if django.VERSION < (6,) else {}),
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "rest_framework",
    "rest_framework.authtoken",
    "django_celery_beat",
    "django_filters",
    "drf_spectacular",
    "durable_jobs",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
url = urlsplit(os.environ.get("DATABASE_URL", ""))
if url.scheme:
    DATABASE = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url.path[1:],
        "USER": url.username,
    }
    DATABASE |= {"PASSWORD": url.password, "HOST": url.hostname, "PORT": url.port}
else:
    # A file, because tests use threads
    file = Path(tempfile.gettempdir(), f"library-{os.getpid()}.sqlite3")
    options = {"transaction_mode": "IMMEDIATE", "timeout": 20}
    options["init_command"] = "PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF"
    DATABASE = {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": file,
        "OPTIONS": options,
        "TEST": {"NAME": file},
    }
DATABASES = {"default": DATABASE | {"CONN_MAX_AGE": 60, "CONN_HEALTH_CHECKS": True}}
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "rest_framework.authentication.TokenAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_THROTTLE_CLASSES": ["rest_framework.throttling.UserRateThrottle"],
    "DEFAULT_THROTTLE_RATES": {"user": "600/min"},
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
}
QUEUES = ["default", "celery", "cpu", "io"]
TASKS = {"default": {"BACKEND": "durable_jobs.contrib.django_tasks.TaskBackend", "QUEUES": QUEUES}}
DURABLE_JOBS = {"LIMITS": {"one": "1", "tenant": "2", "api": "5, 3/h"}}
