"""Refuse answers that cannot work. Report all of them at once, each with a remedy.

After a refusal, Cookiecutter removes the project's folder, if this run created it.
"""

import json
import re
import sys

ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")  # in JSON, quotes and braces stay text
SLUG = str(ANSWERS["project_slug"])
if SLUG == "refused-slug":  # cookiecutter.json renamed the folder: show what was typed
    ANSWERS["project_slug"] = ANSWERS.get("__refused_slug", SLUG)
# A copy of the choices in cookiecutter.json. Cookiecutter does not check replay files, and a hook
# cannot find that file: `_repo_dir` may be relative to a folder that the hook does not know.
CHOICES = {
    "broker": ["redis", "rabbitmq", "sqs"],
    "result_backend": ["redis", "database", "dynamodb", "none"],
    "durable_jobs": ["no", "yes"],
    "worker_pool": ["prefork", "threads", "gevent"],
    "periodic_tasks": ["code", "admin"],
    "deployment": ["docker", "kubernetes", "none"],
    "ci": ["github", "gitlab", "none"],
    "include_example": ["yes", "no"],
}
IDENTIFIER = r"(?!pg_|.*___)[a-z]([a-z0-9_]{0,38}[a-z0-9])?"  # for images, roles, databases
TAKEN = {  # Such a project could not start, or would replace what already has its name.
    "a YAML keyword, not text": "false n no null off on true y yes",
    "a PostgreSQL database or role": "none postgres public template0 template1",
    "a RabbitMQ user": "guest",
    "a Kubernetes namespace": "default kube_node_lease kube_public kube_system",
    "an image that the project uses": "caddy docker python rabbitmq redis",
    "a device on Windows": "aux con nul prn " + " ".join(f"com{n} lpt{n}" for n in range(1, 10)),
}
ATOM, LABEL = r"[\w!#$%&'*+/=?^`{|}~-]+", r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
EMAIL = rf"{ATOM}(\.{ATOM})*@{LABEL}(\.{LABEL})+"  # what RFC 5322 allows without quotes


def faults():
    for option, choices in CHOICES.items():
        if ANSWERS[option] not in choices:
            yield option, f"choose one of {json.dumps(choices)[1:-1]}"
    for option in ("project_name", "project_slug", "description", "author_name", "author_email"):
        text = str(ANSWERS[option])
        if text != ANSWERS[option] or not text.strip():
            yield option, "enter text that is not empty"
        if re.search("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]", text):
            yield option, "remove line breaks, control and text direction characters"
    if not re.fullmatch(IDENTIFIER, SLUG):
        letters = "use 1-40 characters: a-z, 0-9, _; begin with a letter"
        yield "project_slug", f"{letters}, but not with pg_; do not end with _ or use ___"
    for meaning, names in TAKEN.items():
        if SLUG in names.split():
            yield "project_slug", f"this is {meaning}; try {SLUG}_project"
    if not re.fullmatch(EMAIL, str(ANSWERS["author_email"]), re.ASCII | re.IGNORECASE):
        yield "author_email", "enter one plain address, such as you@example.com"


if "__prompts__" in ANSWERS and "_repo_dir" not in ANSWERS:  # older versions ignore templates/
    sys.exit("This template needs Cookiecutter 2.3 or newer: pip install --upgrade cookiecutter")
if messages := [f"  {option} {ANSWERS[option]!r}: {remedy}." for option, remedy in faults()]:
    print("No project was created. Please correct:", *messages, "", sep="\n", file=sys.stderr)
    sys.exit("Cookiecutter's own error report follows.")  # the exit status is 1
