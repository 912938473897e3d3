{% import "imports.jinja" as imports %}
{% import "text.jinja" as text %}
{% from "chosen.jinja" import include_example, broker, result_backend, durable_jobs, worker_pool, periodic_tasks, servers, has_example, has_flower, has_jobs, has_results, flower_port with context %}
{% set lines %}
from django.core.exceptions import ImproperlyConfigured
from kombu import Queue
{% print periodic_tasks.imports | default %}
{% print result_backend.settings_import | default %}
{% endset %}
"""Settings. What differs between machines comes from the environment: see .env.example."""

import logging
from datetime import timedelta
from pathlib import Path

{{ imports.sort(lines) }}
from config import logs
from config.env import env

BASE_DIR = Path(__file__).resolve().parent.parent
required = "SECRET_KEY ALLOWED_HOSTS DATABASE_URL EMAIL_URL DEFAULT_FROM_EMAIL".split()
required += ["{{ [broker.required, result_backend.required | default] | select | join('", "') }}"]
if missing := [name for name in required if name not in env.ENVIRON]:
    raise ImproperlyConfigured(f"Missing in the environment: {', '.join(missing)}.")

DEBUG = env.bool("DEBUG", default=False)

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
{% if has_jobs %}
    "django_filters",
{% endif %}
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "django_structlog",
    "axes",
{% for app in [result_backend.app, periodic_tasks.app] | select %}
    "{{ app }}",
{% endfor %}
{% if has_jobs %}
    "django_tasks",
    "durable_jobs",
{% else %}
    "config",  # for its templates and static files
{% endif %}
    "users",
{% if has_example %}
    "orders",
{% endif %}
]
MIDDLEWARE = [
    "config.health.HealthMiddleware",  # before middleware that checks the host or redirects
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
{% if not has_jobs %}
    "config.api.ErrorMiddleware",  # an unavailable broker is a 503
{% endif %}
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
TIME_ZONE = env.zone("TIME_ZONE", default="UTC")
STATIC_URL = "static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
DATABASES = {"default": env.db("DATABASE_URL")}
# Seconds that requests and tasks reuse a connection. Under ASGI, none: see config/asgi.py.
DATABASES["default"]["CONN_MAX_AGE"] = env.int("CONN_MAX_AGE", default=60)
DATABASES["default"]["CONN_HEALTH_CHECKS"] = True  # replace one that the server has closed
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    DATABASES["default"]["NAME"] = BASE_DIR / DATABASES["default"]["NAME"]
    # The web server, the worker and Beat share one file: wait for a lock instead of failing.
    pragmas = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL"
    sqlite = {"transaction_mode": "IMMEDIATE", "timeout": 20, "init_command": pragmas}
    DATABASES["default"]["OPTIONS"] = sqlite
{% if has_jobs %}
    DATABASES["default"]["TEST"] = {"NAME": BASE_DIR / "test.sqlite3"}  # a file, for live tests
{% endif %}
else:  # don't wait long for a server that has disappeared
    timeouts = {"connect_timeout": 5, "tcp_user_timeout": 10_000}  # seconds; milliseconds
    DATABASES["default"]["OPTIONS"] = timeouts | DATABASES["default"].get("OPTIONS", {})
    if size := DATABASES["default"]["OPTIONS"].get("pool"):  # DATABASE_URL=postgres://…?pool=8
        DATABASES["default"]["OPTIONS"]["pool"] = {"min_size": 0, "max_size": size}
        DATABASES["default"]["CONN_MAX_AGE"] = 0  # Django's own pool reuses connections
CACHES = {"default": env.cache("CACHE_URL", default="locmemcache://")}
{% for server in servers if server.settings is defined %}
{{ server.settings | trim }}
{% endfor %}
{% print durable_jobs.files %}
vars().update(env.email("EMAIL_URL"))  # EMAIL_BACKEND, EMAIL_HOST and so on
EMAIL_TIMEOUT = 10  # seconds; without it a task would wait forever for a mail server that hangs
DEFAULT_FROM_EMAIL = env.str("DEFAULT_FROM_EMAIL")

# Security
SECRET_KEY = env.str("SECRET_KEY")
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", cast=str.strip)
CSRF_TRUSTED_ORIGINS = env.list("CSRF_TRUSTED_ORIGINS", cast=str.strip, default=[])
SECURE_SSL_REDIRECT = SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = not DEBUG
{% if has_jobs %}
SECURE_REDIRECT_EXEMPT = [r"^metrics$"]  # for a Prometheus in the same private network
{% endif %}
SECURE_HSTS_SECONDS = 0 if DEBUG else 3600
SILENCED_SYSTEM_CHECKS = ["security.W005", "security.W021"]  # HSTS for subdomains: your decision
NUM_PROXIES = env.int("NUM_PROXIES", default=0 if DEBUG else 1)
IPWARE_META_PRECEDENCE_ORDER = ["REMOTE_ADDR"]
if NUM_PROXIES:  # without a proxy, these headers could only come from a client: don't trust them
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    IPWARE_META_PRECEDENCE_ORDER = ["HTTP_X_FORWARDED_FOR", "REMOTE_ADDR"]
    IPWARE_META_PROXY_COUNT = NUM_PROXIES - 1  # ipware does not count the last proxy
    IPWARE_STRICT = False  # ignore extra addresses, which a client can send
CONTENT_SECURITY_POLICY = {  # pages run only the project's own scripts
    "DIRECTIVES": {
        "default-src": ["'self'"],
        "style-src": ["'self'", "'unsafe-inline'"],  # for {{ '' if has_jobs else 'the page, ' }}Swagger UI and DRF's pages
        "img-src": ["'self'", "data:"],
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
AUTHENTICATION_BACKENDS = [
    "axes.backends.AxesStandaloneBackend",
    "django.contrib.auth.backends.ModelBackend",
]
AXES_FAILURE_LIMIT = 10  # wrong passwords lock an IP address out
AXES_COOLOFF_TIME = timedelta(minutes=15)
AXES_RESET_COOL_OFF_ON_FAILURE_DURING_LOCKOUT = False  # attempts during a lockout don't extend it
AXES_DISABLE_ACCESS_LOG = True  # the log of successful logins would grow forever

# API
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "rest_framework.authentication.TokenAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
{% if has_jobs %}
    "DEFAULT_PARSER_CLASSES": ["config.api.Parser"],
{% endif %}
    "DEFAULT_PAGINATION_CLASS": "rest_framework.pagination.PageNumberPagination",
    "PAGE_SIZE": 20,
    "DEFAULT_THROTTLE_CLASSES": ["config.api.Throttle"],
    "DEFAULT_THROTTLE_RATES": {"user": env.rate("THROTTLE", default="600/min")},
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "NUM_PROXIES": NUM_PROXIES,
    "TEST_REQUEST_DEFAULT_FORMAT": "json",
}
SPECTACULAR_SETTINGS = {
    "TITLE": {{ text.python(cookiecutter.project_name) }},
    "VERSION": "1.0.0",
{% if has_jobs %}
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "config.api.add_errors",
    ],
    "COMPONENT_SPLIT_REQUEST": True,  # responses may have blank texts, requests may not
{% endif %}
    "SERVE_PERMISSIONS": ["rest_framework.permissions.IsAuthenticated"],
    "SWAGGER_UI_DIST": "SIDECAR",  # from this server, not from a CDN
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
}

# Celery: tasks
{% if has_jobs %}
# Redelivery, here and below, concerns plain tasks: Beat recovers jobs.
{% endif %}
CELERY_TASK_ACKS_LATE = True  # if a worker is killed, the broker delivers its tasks again
CELERY_TASK_TIME_LIMIT = env.int("TASK_TIME_LIMIT", default=600)  # seconds
{% print worker_pool.task_settings | default %}
# The queues that a worker consumes by default; `--queues cpu` limits it to that one.
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
CELERY_ACCEPT_CONTENT = ["json"]  # never pickle: a message could run any code
CELERY_TIMEZONE = TIME_ZONE
{% print periodic_tasks.settings %}

{% print durable_jobs.settings | default %}
# Celery: broker
{% print broker.settings %}
CELERY_BROKER_CONNECTION_TIMEOUT = CELERY_BROKER_POOL_ACQUIRE_TIMEOUT = 1  # seconds
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True  # a worker waits for its broker

# Celery: results
{% if has_results %}
{% print result_backend.settings %}
CELERY_RESULT_EXPIRES = 24 * 60 * 60  # seconds
CELERY_TASK_TRACK_STARTED = True  # clients see that a task is running
{% elif not has_jobs %}
CELERY_TASK_IGNORE_RESULT = True
{% endif %}

# Celery: workers
{% print worker_pool.settings %}
{% if has_flower %}

# Flower
CELERY_TASK_SEND_SENT_EVENT = CELERY_WORKER_SEND_TASK_EVENTS = True  # it shows each task's state
FLOWER_BASIC_AUTH = env.str("FLOWER_BASIC_AUTH", default="")  # Flower refuses to start without it
FLOWER_PORT = env.int("FLOWER_PORT", default={{ flower_port }})
# The page's link for staff. In production, only you know the address.
FLOWER_URL = env.address("FLOWER_URL", default=f"http://127.0.0.1:{FLOWER_PORT}/" if DEBUG else "")
{% endif %}

# Logs and errors
if dsn := env.address("SENTRY_DSN", default=""):
    import sentry_sdk  # only if needed, because it slows each start by a sixth
    from sentry_sdk.integrations.logging import ignore_logger

    sentry_sdk.init(dsn, release=env.str("RELEASE", default=None), before_send=logs.add_ids)
    ignore_logger("django_structlog.*")  # it logs the exceptions that Sentry catches itself

if env.str("OTEL_EXPORTER_OTLP_ENDPOINT", default=""):
    INSTALLED_APPS += ["config.tracing.Tracing"]  # traces: see docs/production.md

LOGGING = logs.configure(DEBUG, level=env.level("LOG_LEVEL", default="INFO").upper())
DJANGO_STRUCTLOG_STATUS_START_LOG_LEVEL = logging.DEBUG  # INFO shows only the end of a request
DJANGO_STRUCTLOG_CELERY_ENABLED = True  # a message carries the request's id to the worker
