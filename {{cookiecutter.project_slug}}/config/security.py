{% from "chosen.jinja" import has_jobs with context %}
"""Settings that protect pages and logins, the same on each machine."""

from datetime import timedelta

CONTENT_SECURITY_POLICY = {  # pages run only the project's own scripts
    "DIRECTIVES": {
        "default-src": ["'self'"],
        "style-src": ["'self'", "'unsafe-inline'"],  # for {{ '' if has_jobs else 'the page, ' }}Swagger UI and DRF's pages
        "img-src": ["'self'", "data:"],
        "base-uri": ["'none'"],
    }
}
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
    {"NAME": "django.contrib.auth.password_validation.NumericPasswordValidator"},
]
AUTHENTICATION_BACKENDS = [
    "axes.backends.AxesStandaloneBackend",
    "django.contrib.auth.backends.ModelBackend",
]
AXES_FAILURE_LIMIT = 10  # wrong passwords lock an IP address out
AXES_COOLOFF_TIME = timedelta(minutes=15)
AXES_RESET_COOL_OFF_ON_FAILURE_DURING_LOCKOUT = False  # attempts during a lockout don't extend it
AXES_DISABLE_ACCESS_LOG = True  # the log of successful logins would grow forever
