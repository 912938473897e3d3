"""Refuse answers that cannot work. Report all of them at once, each with a remedy.

After a refusal, Cookiecutter removes the project's folder, if this run created it.
"""

import json
import keyword
import re
import sys

ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")  # in JSON, quotes and braces stay text
SLUG = str(ANSWERS["project_slug"])
if SLUG.startswith("refused-"):  # cookiecutter.json renamed the folder: show what was typed
    ANSWERS["project_slug"] = ANSWERS.get("__refused_slug", SLUG)
# A copy of the choices in cookiecutter.json, because Cookiecutter does not check replay files.
CHOICES = {
    "broker": ["redis", "rabbitmq", "sqs"], "worker_pool": ["prefork", "threads", "gevent"],
    "result_backend": ["redis", "database", "dynamodb", "none"], "include_example": ["yes", "no"],
    "deployment": ["docker", "kubernetes", "none"], "periodic_tasks": ["code", "admin"],
    "ci": ["github", "gitlab", "none"]}  # fmt: skip
IDENTIFIER = r"(?!pg_|.*___)[a-z]([a-z0-9_]{0,38}[a-z0-9])?"  # for packages, images, databases
TAKEN = """config dev jobs manage orders users test tests default false guest n no none null off on
    postgres public template0 template1 true y yes amqp asgiref axes billiard boto3 botocore celery
    csp django django_axes django_celery_beat django_celery_results django_csp django_environ
    django_filter django_filters django_structlog django_tasks djangorestframework drf_spectacular
    drf_spectacular_sidecar environ fakeredis flower gevent greenlet gunicorn honcho httpx kombu
    moto prometheus_client psycopg psycopg_binary pycurl pytest pytest_django redis rest_framework
    ruff sentry_sdk sqlparse structlog tornado vine
    whitenoise""".split()  # names of own modules, servers, YAML words, packages
ATOM, LABEL = r"[\w!#$%&'*+/=?^`{|}~-]+", r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
EMAIL = rf"{ATOM}(\.{ATOM})*@{LABEL}(\.{LABEL})+"  # what RFC 5322 allows without quotes


def faults():
    for option, choices in CHOICES.items():
        if ANSWERS[option] not in choices:
            yield option, f"choose one of {json.dumps(choices)[1:-1]}"
    for option in ("project_name", "project_slug", "description", "author_name", "author_email"):
        text = str(ANSWERS[option])
        if text != ANSWERS[option] or not text.strip():
            yield option, "write a text that is not empty"
        if re.search("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]", text):
            yield option, "leave out line breaks, control and text direction characters"
    if not re.fullmatch(IDENTIFIER, SLUG):
        letters = "use 1-40 of a-z, 0-9 and _; begin with a letter"
        yield "project_slug", f"{letters}, but not with pg_; do not end with _ or write ___"
    elif SLUG in [*TAKEN, *keyword.kwlist, *keyword.softkwlist, *sys.stdlib_module_names]:
        yield "project_slug", f"this name is reserved or in use; try {SLUG}_project"
    if not re.fullmatch(EMAIL, str(ANSWERS["author_email"]), re.ASCII | re.IGNORECASE):
        yield "author_email", "write one plain address, such as you@example.com"


if messages := [f"  {option} {ANSWERS[option]!r}: {remedy}." for option, remedy in faults()]:
    print("No project was made. Please correct:", *messages, "", sep="\n", file=sys.stderr)
    sys.exit("Cookiecutter's own error report follows.")  # the exit status is 1
