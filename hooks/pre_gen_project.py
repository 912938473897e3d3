"""Refuse answers that cannot work: all of them at once, each with its remedy."""

import json
import keyword
import re
import sys
import unicodedata

# As JSON, so that a quote, a brace or a backslash in an answer stays text.
ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")

# Cookiecutter checks no choice of a replay file; a test holds these to cookiecutter.json.
CHOICES = {
    "broker": ["redis", "rabbitmq", "sqs"],
    "result_backend": ["redis", "database", "dynamodb", "none"],
    "worker_pool": ["prefork", "threads", "gevent"],
    "periodic_tasks": ["code", "admin"],
    "deployment": ["docker", "kubernetes", "none"],
    "ci": ["github", "gitlab", "none"],
    "include_example": [True, False],
}
TEXTS = ("project_name", "project_slug", "description", "author_name", "author_email")

SLUG = r"[a-z]([a-z0-9_]{0,38}[a-z0-9])?"  # fits packages, containers and databases too
# The project's own modules, then what it may import or install.
PACKAGES = """config dev jobs manage orders test tests
    amqp asgiref axes billiard boto3 botocore celery csp django django_axes
    django_celery_beat django_celery_results django_csp django_environ django_filter
    django_filters django_structlog djangorestframework drf_spectacular
    drf_spectacular_sidecar environ fakeredis flower gevent greenlet gunicorn honcho
    httpx kombu moto psycopg psycopg_binary pycurl pytest pytest_django redis
    rest_framework ruff sentry_sdk sqlparse structlog tornado vine whitenoise""".split()
TAKEN = {*PACKAGES, *keyword.kwlist, *keyword.softkwlist, *sys.stdlib_module_names}
ATOM, LABEL = r"[\w!#$%&'*+/=?^`{|}~-]+", r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
EMAIL = rf"{ATOM}(\.{ATOM})*@{LABEL}(\.{LABEL})+"  # what RFC 5322 allows without quotes
DISGUISE = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufffe\uffff"


def faults():
    for option, choices in CHOICES.items():
        if repr(ANSWERS[option]) not in map(repr, choices):  # 1 == True, but "1" != "True"
            yield option, f"choose one of {json.dumps(choices)[1:-1]}"
    for option in TEXTS:
        text = str(ANSWERS[option])
        if text != ANSWERS[option] or not text.strip():
            yield option, "write a text that is not empty"
        if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in DISGUISE for c in text):
            yield option, "leave out line breaks, control and text direction characters"
    if not re.fullmatch(SLUG, slug := str(ANSWERS["project_slug"])):
        yield "project_slug", "use up to 40 of a-z, 0-9 and _; begin with a letter, end without _"
    if slug in TAKEN:
        yield "project_slug", f"Python or a package has this name; try {slug}_project"
    if not re.fullmatch(EMAIL, str(ANSWERS["author_email"]), re.ASCII | re.IGNORECASE):
        yield "author_email", "write one plain address, such as you@example.com"


if messages := [f"  {option} {ANSWERS[option]!r}: {remedy}." for option, remedy in faults()]:
    end = "Cookiecutter's own report of this follows."
    sys.exit("\n".join(["No project was made. Please correct:", *messages, "", end]))
