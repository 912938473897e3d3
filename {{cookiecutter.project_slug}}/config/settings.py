{% import "imports.jinja" as imports %}
{% import "text.jinja" as text %}
{% from "chosen.jinja" import include_example, broker, result_backend, durable_jobs, worker_pool, periodic_tasks, servers, has_example, has_flower, has_jobs, has_results, has_cache, has_schedule_table, flower_port with context %}
{% set lines %}
from dotenv import load_dotenv
from environs import Env, validate
from kombu import Queue
{% print periodic_tasks.settings_imports | default %}
{% endset %}
"""Settings. What differs between machines comes from the environment: see .env.example."""

import logging
from contextlib import suppress
from pathlib import Path

{{ imports.sort(lines) }}
from config import database, logs
from config.rest import *  # noqa: F403  the API and its schema
from config.security import *  # noqa: F403  the policy of pages, passwords, lockout

BASE_DIR = Path(__file__).resolve().parent.parent

# The environment. Its variables win over the lines of .env.
with suppress(PermissionError):  # in a container of `make dev`, the file belongs to somebody else
    load_dotenv(BASE_DIR / ".env", interpolate=False)
env = Env(eager=False)  # lower-case names below aren't settings, so nothing prints them
DEBUG = env.bool("DEBUG", False)
SECRET_KEY = env.str("SECRET_KEY")
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", subcast=str.strip)
CSRF_TRUSTED_ORIGINS = env.list("CSRF_TRUSTED_ORIGINS", [], subcast=str.strip)
TIME_ZONE = env.str("TIME_ZONE", "UTC")
log_level = env.log_level("LOG_LEVEL", logging.INFO)

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "rest_framework.authtoken",
{% if has_jobs %}
    "django_filters",
{% endif %}
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "django_structlog",
    "celery_steady",  # `manage.py check` also finds tasks that would never run
    "axes",
    "csp",
{% if result_backend.app is defined %}
    "{{ result_backend.app }}",
{% endif %}
{% if has_schedule_table %}
    "django_celery_beat",
{% endif %}
{% if has_jobs %}
    "django_tasks",
    "durable_jobs",
{% endif %}
    "api",
    "users",
{% if has_example %}
    "orders",
{% endif %}
]
MIDDLEWARE = [
    "config.middleware.HealthMiddleware",  # before middleware that checks the host or redirects
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_structlog.middlewares.RequestMiddleware",
{% if not has_jobs %}
    "config.middleware.UnavailableMiddleware",  # an unavailable broker is a 503
{% endif %}
    "axes.middleware.AxesMiddleware",  # last
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
{% if not has_jobs %}
        "DIRS": [BASE_DIR / "templates"],
{% endif %}
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
ROOT_URLCONF = "config.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "index"
LOGOUT_REDIRECT_URL = "index"

# Files
STATIC_URL = "static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
{% if not has_jobs %}
STATICFILES_DIRS = [BASE_DIR / "static"]
{% endif %}
WHITENOISE_KEEP_ONLY_HASHED_FILES = True
MEDIA_ROOT = env.str("MEDIA_ROOT", str(BASE_DIR / ".data/media"))  # uploads
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    # Browsers keep these files until they change: their names have a hash, but not with DEBUG.
    "staticfiles": {"BACKEND": "whitenoise.storage.CompressedManifestStaticFilesStorage"},
}
{% print durable_jobs.storage_settings | default %}

# Database and cache
parsed = env.dj_db_url(
    "DATABASE_URL",
    conn_max_age=env.int("CONN_MAX_AGE", 60),  # seconds; under ASGI, 0: see config/asgi.py
    conn_health_checks=True,  # replace a connection that the server has closed
    disable_server_side_cursors=env.bool("DISABLE_SERVER_SIDE_CURSORS", False),  # for PgBouncer
)
DATABASES = {"default": database.configure(parsed, BASE_DIR)}
{% if has_cache %}
if cache_url := env.str("CACHE_URL", ""):
    CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": cache_url,
            "KEY_PREFIX": "{{ "{" ~ cookiecutter.project_slug ~ "}" }}",  # Celery's keys have these braces, too
            # If the cache hangs, a request waits only one or two seconds.
            "OPTIONS": {"socket_timeout": 1, "socket_connect_timeout": 1},
        }
    }
{% endif %}

# Email
email = "filebased" if DEBUG else "smtp"
EMAIL_BACKEND = env.str("EMAIL_BACKEND", f"django.core.mail.backends.{email}.EmailBackend")
EMAIL_FILE_PATH = BASE_DIR / ".data/mail"  # for the backend "filebased"
EMAIL_HOST = env.str("EMAIL_HOST") if ".smtp." in EMAIL_BACKEND else env.str("EMAIL_HOST", "")
EMAIL_PORT = env.int("EMAIL_PORT", 587)
EMAIL_HOST_USER = env.str("EMAIL_HOST_USER", "")
EMAIL_HOST_PASSWORD = env.str("EMAIL_HOST_PASSWORD", "")
EMAIL_USE_SSL = env.bool("EMAIL_USE_SSL", False)  # TLS from the first byte: port 465
EMAIL_USE_TLS = env.bool("EMAIL_USE_TLS", not EMAIL_USE_SSL)
EMAIL_TIMEOUT = 10  # seconds; without it a task would wait forever for a mail server that hangs
DEFAULT_FROM_EMAIL = env.str("DEFAULT_FROM_EMAIL")

# Security
# Projects on one host, such as localhost, share its cookies whatever their port.
SESSION_COOKIE_NAME = "{{ cookiecutter.project_slug }}_session"
CSRF_COOKIE_NAME = "{{ cookiecutter.project_slug }}_csrf"
SECURE_SSL_REDIRECT = SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = not DEBUG
{% if has_jobs %}
SECURE_REDIRECT_EXEMPT = [r"^metrics$"]  # for a Prometheus in the same private network
{% endif %}
SECURE_HSTS_SECONDS = 0 if DEBUG else 3600  # raise it once HTTPS works
SILENCED_SYSTEM_CHECKS = ["security.W005", "security.W021"]  # HSTS for subdomains, preload
num_proxies = env.int("NUM_PROXIES", 0 if DEBUG else 1)
IPWARE_META_PRECEDENCE_ORDER = ["REMOTE_ADDR"]
if num_proxies:  # trust these headers only behind a proxy: otherwise a client may have sent them
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    IPWARE_META_PRECEDENCE_ORDER = ["HTTP_X_FORWARDED_FOR", "REMOTE_ADDR"]
    IPWARE_META_PROXY_COUNT = num_proxies - 1  # ipware does not count the last proxy
    IPWARE_STRICT = False  # ignore extra addresses, which a client can send
AUTH_USER_MODEL = "users.User"

# API
throttle = env.str("THROTTLE", "600/min", validate=validate.Regexp(r"\d+/[smhd]"))
REST_FRAMEWORK |= {"DEFAULT_THROTTLE_RATES": {"user": throttle}, "NUM_PROXIES": num_proxies}  # noqa: F405

# Errors and traces
if sentry_dsn := env.str("SENTRY_DSN", ""):
    logs.send_errors(sentry_dsn, release=env.str("RELEASE", "") or None)
if env.str("OTEL_EXPORTER_OTLP_ENDPOINT", ""):
    INSTALLED_APPS += ["config.tracing.Tracing"]  # traces: see docs/production.md

# Celery: what differs between machines
{% print broker.env_settings %}
{% print result_backend.env_settings | default %}
CELERY_TASK_TIME_LIMIT = env.int("TASK_TIME_LIMIT", 600)  # seconds
{% print worker_pool.env_settings %}
{% print durable_jobs.env_settings | default %}
{% if has_flower %}
FLOWER_BASIC_AUTH = env.str("FLOWER_BASIC_AUTH", "")  # flowerconfig.py requires it
FLOWER_PORT = env.int("FLOWER_PORT", {{ flower_port }})
FLOWER_URL = env.str("FLOWER_URL", f"http://127.0.0.1:{FLOWER_PORT}/" if DEBUG else "")
{% endif %}
env.seal()  # raises one error for all that are missing or wrong, which are None until here

# Celery: only what is this project's. It overrides the defaults of {{ "durable_jobs.celery" if has_jobs else "celery_steady" }}.Celery.
# `celery -A config report` prints those, such as task_acks_late; celery-steady's README says why.
{% print worker_pool.task_settings | default %}
# The queues that a worker consumes by default; `--queues celery` limits it to that one.
{% if broker.queue_options is defined %}
# Quorum queues survive the loss of a node, and count how often a message was redelivered.
CELERY_TASK_QUEUES = [
    Queue(name, routing_key=name, {{ broker.queue_options }}){{ "\n    " if has_example else " " }}for name in ["{{ include_example.queues | join('", "') }}"]
]
{% else %}
CELERY_TASK_QUEUES = [Queue(name, routing_key=name) for name in ["{{ include_example.queues | join('", "') }}"]]
{% endif %}
{% if has_example %}
CELERY_TASK_ROUTES = {  # a queue for each kind of load, so that each can have its own workers
    "orders.tasks.forecast_demand": {"queue": "cpu"},
    "orders.tasks.{{ "ask_supplier" if has_jobs else "check_stock" }}": {"queue": "io"},
}
{% else %}
CELERY_TASK_ROUTES = {}
{% endif %}
{% if not has_jobs %}
CELERY_TASK_CREATE_MISSING_QUEUES = False  # sending a task to another queue is an error
{% endif %}
{% print periodic_tasks.settings | default %}

{% print durable_jobs.settings | default %}
{% print broker.settings %}
{% if has_results %}
{% print result_backend.settings | default %}
CELERY_TASK_TRACK_STARTED = True  # clients see that a task is running
{% elif not has_jobs %}
CELERY_TASK_IGNORE_RESULT = True
{% endif %}
{% print worker_pool.settings %}
{% if has_flower %}
CELERY_WORKER_SEND_TASK_EVENTS = True  # Flower shows each task's state
{% endif %}

# Logs
LOGGING = logs.configure(DEBUG, level=log_level)
DJANGO_STRUCTLOG_STATUS_START_LOG_LEVEL = logging.DEBUG  # INFO shows only the end of a request
DJANGO_STRUCTLOG_CELERY_ENABLED = True  # a message carries the request's id to the worker
