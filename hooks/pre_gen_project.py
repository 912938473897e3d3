"""Refuse answers that cannot work: all of them at once, each with its remedy."""

import json
import keyword
import os
import re
import sys

ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")  # JSON: quotes and braces stay text
CHOICES = {  # Cookiecutter checks none of a replay; a test holds these to cookiecutter.json
    "broker": ["redis", "rabbitmq", "sqs"], "worker_pool": ["prefork", "threads", "gevent"],
    "result_backend": ["redis", "database", "dynamodb", "none"], "include_example": [True, False],
    "deployment": ["docker", "kubernetes", "none"], "periodic_tasks": ["code", "admin"],
    "ci": ["github", "gitlab", "none"]}  # fmt: skip
SLUG = r"(?!pg_|.*___)[a-z]([a-z0-9_]{0,38}[a-z0-9])?"  # fits packages, images, databases
TAKEN = """config dev jobs manage orders users test tests default false guest n no none null off on
    postgres public template0 template1 true y yes amqp asgiref axes billiard boto3 botocore celery
    csp django django_axes django_celery_beat django_celery_results django_csp django_environ
    django_filter django_filters django_structlog djangorestframework drf_spectacular
    drf_spectacular_sidecar environ fakeredis flower gevent greenlet gunicorn honcho httpx kombu
    moto prometheus_client psycopg psycopg_binary pycurl pytest pytest_django redis rest_framework
    ruff sentry_sdk sqlparse structlog tornado vine
    whitenoise""".split()  # its own, of servers, YAML, imports
ATOM, LABEL = r"[\w!#$%&'*+/=?^`{|}~-]+", r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
EMAIL = rf"{ATOM}(\.{ATOM})*@{LABEL}(\.{LABEL})+"  # what RFC 5322 allows without quotes


def faults():
    for option, choices in CHOICES.items():
        if repr(ANSWERS[option]) not in map(repr, choices):  # 1 == True, but "1" != "True"
            yield option, f"choose one of {json.dumps(choices)[1:-1]}"
    for option in ("project_name", "project_slug", "description", "author_name", "author_email"):
        text = str(ANSWERS[option])
        if text != ANSWERS[option] or not text.strip():
            yield option, "write a text that is not empty"
        if re.search("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]", text):
            yield option, "leave out line breaks, control and text direction characters"
    if not re.fullmatch(SLUG, slug := str(ANSWERS["project_slug"])):
        yield "project_slug", "use 1-40 of a-z, 0-9 and _; letter first, no ___, no pg_, no final _"
    if slug in [*TAKEN, *keyword.kwlist, *keyword.softkwlist, *sys.stdlib_module_names]:
        yield "project_slug", f"Python, a package or a server has this name; try {slug}_project"
    if not re.fullmatch(EMAIL, str(ANSWERS["author_email"]), re.ASCII | re.IGNORECASE):
        yield "author_email", "write one plain address, such as you@example.com"


folder, parent = str(ANSWERS["project_slug"]), None
ANSWERS["project_slug"] = "-" in folder and ANSWERS.get("__refused_slug") or ANSWERS["project_slug"]
if messages := [f"  {option} {ANSWERS[option]!r}: {remedy}." for option, remedy in faults()]:
    if os.isatty(0) or folder != os.path.basename(os.getcwd()):  # a person; a path, another's
        import signal
        import time  # not above: they cost every user time

        os.kill(parent := os.getppid(), 15 if signal.getsignal(2) == signal.SIG_IGN else 2)
        path, new = os.path.join(ANSWERS["_output_dir"], folder, ""), os.stat(__file__)[8] - 1
        while path != (path := os.path.dirname(path)):  # new by atime and mtime, empty: ours
            if os.path.isdir(path) and min(os.stat(path)[7:9]) >= new and not os.listdir(path):
                os.rmdir(os.path.realpath(path))
    print("No project was made. Please correct:", *messages, "", sep="\n", file=sys.stderr)
    while os.getppid() == parent:  # Ctrl-C stops it; after a mere refusal it removes all there
        time.sleep(0.01)
    sys.exit(1 if parent else "Cookiecutter's own report of this follows.")
