{% import "text.jinja" as text %}
{% from "chosen.jinja" import broker, result_backend, servers, worker_pool, periodic_tasks, has_example, has_flower, flower_port with context %}
"""Settings. What differs between machines comes from the environment: see .env.example."""

import logging
import os
import re
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import environ
{% print periodic_tasks.imports | default %}
from django.core.exceptions import ImproperlyConfigured

from config import logs

BASE_DIR = Path(__file__).resolve().parent.parent

env = environ.Env()
env.read_env(BASE_DIR / ".env")
env.escape_proxy = True  # "$" is a character, and no reference to another variable
values = {name: value.strip().replace("$", r"\$") for name, value in os.environ.items()}
env.ENVIRON = {name: value for name, value in values.items() if value}  # empty means missing

REQUIRED = [
{% for name in ["SECRET_KEY", "ALLOWED_HOSTS", "DATABASE_URL", "EMAIL_URL", "DEFAULT_FROM_EMAIL", broker.required, result_backend.required | default] | select %}
    "{{ name }}",
{% endfor %}
]
if missing := [name for name in REQUIRED if name not in env.ENVIRON]:
    raise ImproperlyConfigured(f"Missing in the environment: {', '.join(missing)}.")

DEBUG = env.bool("DEBUG", default=False)

# Security

SECRET_KEY = env.str("SECRET_KEY")
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", cast=str.strip)
CSRF_TRUSTED_ORIGINS = env.list("CSRF_TRUSTED_ORIGINS", cast=str.strip, default=[])
SECURE_SSL_REDIRECT = SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = not DEBUG
SECURE_REDIRECT_EXEMPT = [r"^metrics$"]  # for a Prometheus in the same private network
NUM_PROXIES = env.int("NUM_PROXIES", default=0 if DEBUG else 1)
IPWARE_META_PRECEDENCE_ORDER = ["REMOTE_ADDR"]
if NUM_PROXIES:  # without a proxy, only a client can send these headers
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    # Each proxy appends an address to X-Forwarded-For. A client can forge the addresses before these.
    IPWARE_META_PRECEDENCE_ORDER = ["HTTP_X_FORWARDED_FOR", "REMOTE_ADDR"]
    IPWARE_META_PROXY_COUNT = NUM_PROXIES - 1  # ipware does not count the last proxy
    IPWARE_STRICT = False  # ignore additional addresses, which a client can send
SECURE_HSTS_SECONDS = 0 if DEBUG else 3600
# HSTS for subdomains and the preload list affect more than this project: decide for yourself.
SILENCED_SYSTEM_CHECKS = ["security.W005", "security.W021"]
# A page runs only the project's own scripts, not those that an attacker injects.
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": ["'self'"],
        "style-src": ["'self'", "'unsafe-inline'"],  # for Swagger UI and the browsable API
        "img-src": ["'self'", "data:"],
        "object-src": ["'none'"],
        "base-uri": ["'none'"],
        "form-action": ["'self'"],
        "frame-ancestors": ["'none'"],
    }
}
AUTH_USER_MODEL = "users.User"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}Validator"}
    for name in ["UserAttributeSimilarity", "MinimumLength", "CommonPassword", "NumericPassword"]
]
# Ten wrong passwords lock an IP address out. Then its logins are refused before a password is hashed.
AUTHENTICATION_BACKENDS = [
    "axes.backends.AxesStandaloneBackend",
    "django.contrib.auth.backends.ModelBackend",
]
AXES_FAILURE_LIMIT = 10
AXES_COOLOFF_TIME = timedelta(minutes=15)
AXES_RESET_COOL_OFF_ON_FAILURE_DURING_LOCKOUT = False  # an attempt while locked out writes nothing
AXES_DISABLE_ACCESS_LOG = True  # the log of successful logins would grow forever

# Django

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "rest_framework.authtoken",
    "django_filters",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "django_structlog",
    "django_tasks",
    "axes",
{% for app in [result_backend.app, periodic_tasks.app] | select %}
    "{{ app }}",
{% endfor %}
    "users",
    "durable_jobs",
{% if has_example %}
    "orders",
{% endif %}
]
MIDDLEWARE = [
    "config.health.HealthMiddleware",  # before any other that checks the host or redirects
    "django.middleware.security.SecurityMiddleware",
    "csp.middleware.CSPMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_structlog.middlewares.RequestMiddleware",
    "axes.middleware.AxesMiddleware",
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
ROOT_URLCONF = "config.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = LOGOUT_REDIRECT_URL = "index"
TIME_ZONE = env.str("TIME_ZONE", default="UTC")
STATIC_URL = "static/"
STATIC_ROOT = BASE_DIR / "staticfiles"

# Database, cache, files, mail

DATABASE = env.db("DATABASE_URL")
DATABASE["CONN_MAX_AGE"] = 60  # seconds; requests and tasks reuse connections
DATABASE["CONN_HEALTH_CHECKS"] = True  # replace one that the server has closed
if DATABASE["ENGINE"] == "django.db.backends.sqlite3":
    # Web, worker and Beat write to one file. With these options they wait instead of failing.
    pragmas = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL"
    DATABASE["OPTIONS"] = {"transaction_mode": "IMMEDIATE", "timeout": 20, "init_command": pragmas}
    DATABASE["NAME"] = BASE_DIR / DATABASE["NAME"]
    DATABASE["TEST"] = {"NAME": BASE_DIR / "test.sqlite3"}  # for tests/test_live.py: a file
else:
    # Do not wait long for a server that disappeared. The values are in seconds and in milliseconds.
    limits = {"connect_timeout": 5, "tcp_user_timeout": 10_000}
    DATABASE["OPTIONS"] = limits | DATABASE.get("OPTIONS", {})
DATABASES = {"default": DATABASE}
CACHES = {"default": env.cache("CACHE_URL", default="locmemcache://")}
{% for server in servers %}
{% print server.settings | default %}
{% endfor %}
# Uploads, which web and worker share, in a folder or an S3 bucket. No URL serves them.
MEDIA_ROOT = env.str("MEDIA_ROOT", default=str(BASE_DIR / ".data/media"))
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}
if bucket := env.str("S3_BUCKET", default=""):
    options = {"bucket_name": bucket, "file_overwrite": False}  # two uploads may have the same name
    STORAGES["default"] = {"BACKEND": "storages.backends.s3.S3Storage", "OPTIONS": options}
vars().update(env.email("EMAIL_URL"))
DEFAULT_FROM_EMAIL = env.str("DEFAULT_FROM_EMAIL")

# API

THROTTLE = env.str("THROTTLE", default="600/min")  # requests of each user
if not re.fullmatch("[1-9][0-9]*/(s|sec|second|m|min|minute|h|hour|d|day)", THROTTLE):
    raise ImproperlyConfigured(f"THROTTLE={THROTTLE}: write a number and a unit, such as 600/min.")
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "rest_framework.authentication.TokenAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    "DEFAULT_PARSER_CLASSES": ["config.api.Parser"],
    "DEFAULT_PAGINATION_CLASS": "rest_framework.pagination.PageNumberPagination",
    "PAGE_SIZE": 20,
    "DEFAULT_THROTTLE_CLASSES": ["config.api.Throttle"],
    "DEFAULT_THROTTLE_RATES": {"user": THROTTLE},
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "NUM_PROXIES": NUM_PROXIES,
    "TEST_REQUEST_DEFAULT_FORMAT": "json",  # of api.post(url, data) in tests: views parse only JSON
}
SPECTACULAR_SETTINGS = {
    "TITLE": {{ text.python(cookiecutter.project_name) }},
    "VERSION": "1.0.0",
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "config.api.add_errors",
    ],
    "COMPONENT_SPLIT_REQUEST": True,  # responses may have blank texts, requests may not
    "SERVE_PERMISSIONS": ["rest_framework.permissions.IsAuthenticated"],
    "SWAGGER_UI_DIST": "SIDECAR",  # from this server, not from a CDN
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
}

# Jobs (jobs/README.md explains how they work)

JOB_LEASE_SECONDS = env.float("JOB_LEASE_SECONDS", default=30)  # then a silent worker is dead
JOB_SWEEP_SECONDS = env.float("JOB_SWEEP_SECONDS", default=5)  # between two sweeps of Beat
JOB_RESEND_SECONDS = env.float("JOB_RESEND_SECONDS", default=30)  # until a message counts as lost
JOB_MAX_CRASHES = env.int("JOB_MAX_CRASHES", default=3)  # a job that kills so many workers fails
JOB_RETENTION_DAYS = env.float("JOB_RETENTION_DAYS", default=30)  # until an ended job is deleted
# The version of the code, on the page "Workers": without RELEASE, the commit if this is a git checkout
JOB_VERSION = RELEASE = env.str("RELEASE", default="")
with suppress(OSError, IndexError):  # each line of this file has the old and the new commit
    moves = (BASE_DIR / ".git/logs/HEAD").read_bytes().splitlines()
    JOB_VERSION = RELEASE or moves[-1].split()[1].decode()[:12]
JOB_LIMITS = {}  # {"tenant": "2"}: at most two jobs of a tenant at once, see docs/tasks.md

# Seconds, for each job and task. With threads, a job over its limit fails, but its code is not killed.
CELERY_TASK_TIME_LIMIT = env.int("TASK_TIME_LIMIT", default=600)

# The queues of a worker without --queues. Add new queues here.
CELERY_TASK_QUEUES = {"celery": {}{{ ', "cpu": {}, "io": {}' if has_example }}}

# Functions declared with @task run as jobs. Django's queue "default" means: the queue that
# CELERY_TASK_ROUTES names for the task, or else "celery".
QUEUES = ["default", *CELERY_TASK_QUEUES]
TASKS = {"default": {"BACKEND": "durable_jobs.backends.TaskBackend", "QUEUES": QUEUES}}

# Celery: the broker

{% print broker.settings_with_jobs %}

{% print result_backend.settings_with_jobs | default %}
# Celery: delivery

CELERY_TASK_ACKS_LATE = True  # the plain tasks of a killed worker are delivered again
CELERY_TASK_REJECT_ON_WORKER_LOST = True  # those of a killed child too
CELERY_TASK_RETRY_ON_WORKER_LOST = True  # a task that kills its child fails after max_retries
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True  # a worker waits for its broker
CELERY_TIMEZONE = TIME_ZONE
{% if has_example %}
CELERY_TASK_ROUTES = {  # a queue for each kind of load, so that one does not delay another
    "orders.tasks.forecast_demand": {"queue": "cpu"},
}
{% endif %}

# Celery: the web does not wait for a broker that hangs

CELERY_BROKER_CONNECTION_TIMEOUT = 1  # seconds
CELERY_BROKER_POOL_ACQUIRE_TIMEOUT = 1
CELERY_TASK_PUBLISH_RETRY_POLICY = {"max_retries": 1, "interval_start": 0}

# Celery: workers

CELERY_WORKER_PREFETCH_MULTIPLIER = 1  # a long task does not keep other tasks waiting
CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT = env.float("SOFT_SHUTDOWN_SECONDS", default=20)
# How many tasks a worker runs at once. None means the default of its pool.
CELERY_WORKER_CONCURRENCY = env.int("WORKER_CONCURRENCY", default=None)
# For prefork only
CELERY_TASK_SOFT_TIME_LIMIT = CELERY_TASK_TIME_LIMIT * 0.9  # raises SoftTimeLimitExceeded
CELERY_WORKER_MAX_TASKS_PER_CHILD = 1000  # then a new child replaces it, which ends memory leaks
CELERY_WORKER_MAX_MEMORY_PER_CHILD = env.int("WORKER_MAX_KILOBYTES", default=500_000)

# What depends on the pool, under the names of Celery's `app.conf`. Each worker may use another pool:
# celery -A config worker --pool threads
REUSE = {"CELERY_DB_REUSE_MAX": 1000}  # tasks reuse database connections
WORKER_POOLS = {
    # When the broker is lost, end the tasks that it will deliver again. Threads cannot be ended.
    "prefork": REUSE | {"worker_cancel_long_running_tasks_on_connection_loss": True},
    # Celery has read WORKER_CONCURRENCY before this, and prefers it.
    "threads": REUSE | {"worker_concurrency": 20},
    "solo": REUSE,
}
{% print worker_pool.settings_with_jobs | default %}

{% if has_flower %}
# Flower, see flowerconfig.py

FLOWER_BASIC_AUTH = env.str("FLOWER_BASIC_AUTH", default="")  # without it Flower does not start
FLOWER_PORT = env.int("FLOWER_PORT", default={{ flower_port }})
FLOWER_URL = env.str("FLOWER_URL", default=f"http://127.0.0.1:{FLOWER_PORT}/")  # a link for staff
CELERY_TASK_SEND_SENT_EVENT = True  # it shows the whole life of a task
CELERY_WORKER_SEND_TASK_EVENTS = True

{% endif %}
# Celery: Beat

{% print periodic_tasks.settings %}

# Logs, errors and traces

if dsn := env.str("SENTRY_DSN", default=""):
    import sentry_sdk  # only if needed: it makes each start a sixth longer

    sentry_sdk.init(dsn, release=RELEASE or None)

if env.str("OTEL_EXPORTER_OTLP_ENDPOINT", default=""):
    INSTALLED_APPS += ["config.tracing.Tracing"]  # traces: see docs/operation.md

LOGGING = logs.configure(DEBUG, level=env.str("LOG_LEVEL", default="INFO"))
DJANGO_STRUCTLOG_STATUS_START_LOG_LEVEL = logging.DEBUG  # INFO shows only the end of a request
DJANGO_STRUCTLOG_CELERY_ENABLED = True  # the message takes the request's id to the worker
