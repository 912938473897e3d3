"""Every variable of the README, and every type of Python as an argument and as a result."""

import ast
import json
import re

import pytest

from harness.bake import CHOICES, DEFAULTS
from harness.outputs import outputs, working

each_broker = outputs(
    DEFAULTS,
    {**DEFAULTS, "broker": "rabbitmq", "result_backend": "database", "worker_pool": "threads"},
    {**DEFAULTS, "broker": "sqs", "result_backend": "dynamodb", "worker_pool": "gevent"},
)
# All that have results
backends = outputs(
    *({**DEFAULTS, "result_backend": each} for each in CHOICES["result_backend"] if each != "none")
)
NUMBER = "9", "nine"
VARIABLES = {  # {variable: (another legal value, an illegal one, if there is one)}
    "SECRET_KEY": ("$" + "0123456789abcdefghijklmnopqrstuvwxyz" * 2, None),
    "ALLOWED_HOSTS": ("a.example,testserver,localhost", None),
    "DATABASE_URL": ("sqlite:///other.sqlite3", "postgres://user:pass/word@host:5432/name"),
    "EMAIL_BACKEND": ("django.core.mail.backends.console.EmailBackend", None),
    "EMAIL_HOST": ("smtp.example.com", None),
    "EMAIL_PORT": ("25", "smtp"),
    "EMAIL_HOST_USER": ("user", None),
    "EMAIL_HOST_PASSWORD": ("$a#", None),
    "EMAIL_USE_TLS": ("False", "maybe"),
    "EMAIL_USE_SSL": ("True", "maybe"),
    "DEFAULT_FROM_EMAIL": ("Shop <shop@example.com>", None),
    "CELERY_BROKER_URL": ("redis://:secret@example.com:6380/3", ""),
    "CELERY_RESULT_BACKEND": ("redis://:secret@example.com:6380/4", ""),
    "AWS_DEFAULT_REGION": ("us-east-1", None),
    "AWS_ACCOUNT_ID": ("123456789012", None),
    "FLOWER_BASIC_AUTH": ("user:pass", None),
    "FLOWER_READ_ONLY": ("True", None),
    "FLOWER_PERSISTENT": ("True", None),
    "FLOWER_DB": ("/tmp/flower", None),
    "TASK_TIME_LIMIT": ("60", "1 minute"),
    "VISIBILITY_SECONDS": NUMBER,
    "RABBITMQ_CONSUMER_TIMEOUT": ("3600", "nine"),
    "WORKER_CONCURRENCY": NUMBER,
    "WORKER_MAX_KILOBYTES": ("900000", "much"),
    "SOFT_SHUTDOWN_SECONDS": ("2.5", "2,5"),
    "WEB_CONCURRENCY": ("2", None),
    "CACHE_URL": ("redis://:secret@example.com/1", None),
    "THROTTLE": ("9/hour", "nine"),
    "NUM_PROXIES": ("2", "one"),
    "CSRF_TRUSTED_ORIGINS": ("https://example.com", "example.com"),
    "FLOWER_URL": ("https://flower.example.com/", None),
    "MEDIA_ROOT": ("/tmp/media", None),
    "TIME_ZONE": ("America/St_Johns", None),  # Django itself refuses a wrong one
    "LOG_LEVEL": ("debug", "verbose"),
    "SENTRY_DSN": ("http://key@127.0.0.1:1/1", None),
    "RELEASE": ("1.2.3", None),
    "LIVENESS_FILE": ("/tmp/alive", None),
}
CACHE = {"CACHE_URL": ""}
OF_CHOICES = {
    "rabbitmq": {"CELERY_BROKER_URL": "amqps://user:secret@example.com/host"} | CACHE,
    "sqs": {"CELERY_RESULT_BACKEND": "dynamodb://@us-east-1/other?ttl_seconds=60"} | CACHE,
}
SWITCH = {"DEBUG": ("0", "maybe"), "FLOWER_PORT": ("5556", "http")}  # in other places


def documented(project):
    """Return the variables in the tables of the README."""
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \|", project.read("README.md"), re.MULTILINE)
    return set(re.findall("[A-Z_]+", " ".join(rows)))


@each_broker
def test_the_projects_checks_and_tests_pass_with_other_values(project):
    variables = {name: VARIABLES[name][0] for name in documented(project)}
    variables |= OF_CHOICES.get(project.answers["broker"], {})
    project.manage("check", **variables)
    project.call(".venv/bin/python", "-m", "pytest", "-q", "-m", "not live", **variables)


@each_broker
def test_one_error_names_every_wrong_value(project):
    """And shows no password."""
    asked = set(re.findall(r'env\.\w+\("(\w+)"', project.read("config/settings.py")))
    wrong = {
        n: value
        for n, (_, value) in {**VARIABLES, **SWITCH}.items()
        if n in asked and value is not None
    }
    origins = {"CSRF_TRUSTED_ORIGINS": wrong.pop("CSRF_TRUSTED_ORIGINS")}  # a check of Django
    with pytest.raises(AssertionError) as error:
        project.manage("check", **wrong)
    said = re.search("Environment variables invalid: (.*)", str(error.value))[1]
    assert ast.literal_eval(said).keys() == wrong.keys(), said
    assert "pass/word" not in str(error.value)
    with pytest.raises(AssertionError, match="CSRF_TRUSTED_ORIGINS"):
        project.manage("check", **origins)


TASKS = """
import datetime, decimal, enum, uuid
from celery import shared_task

VALUES = {
    "none": None, "true": True, "integer": 7, "long": 2**70, "float": 1.5, "text": "é\\0",
    "list": [1, [2]], "object": {"a": {"b": None}}, "tuple": (1, (2, 3)), "keys": {1: 2},
    "uuid": uuid.UUID(int=7), "decimal": decimal.Decimal("1.10"), "bytes": b"\\xff",
    "date": datetime.date(2026, 1, 2), "time": datetime.time(3, 4), 
    "enum": enum.IntEnum("E", "A").A,
    "datetime": datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.timezone.utc),
    "set": {1}, "frozenset": frozenset([1]), "timedelta": datetime.timedelta(1), "complex": 1j,
    "instance": object(), "function": len, "class": int, "range": range(3),
    "generator": iter([1]),
    "nan": float("nan"), "ellipsis": ..., "exception": ValueError(),
    "bytearray": bytearray(b"a"),
}

@shared_task
def argument(value, name):
    return repr(value)

@shared_task
def result(name):
    return VALUES[name]
"""
# What a task gets for these; it gets all others as they were sent. REFUSED by delay().
ARGUMENTS = {"tuple": "[1, [2, 3]]", "keys": "{'1': 2}", "enum": "1"}
REFUSED = "set frozenset timedelta complex instance function class range generator ellipsis"
REFUSED += " exception bytearray"
SEND = """
from orders import tasks
result = {}
for name, value in tasks.VALUES.items():
    try:
        got = tasks.argument.delay(value, name).get(timeout=60)
    except TypeError as error:
        got = "refused"
    except Exception as error:
        got = f"refused {type(error).__name__}"
    result[name] = [repr(value), got]
"""
RETURN = """
from orders import tasks
result = {}
sent = {name: tasks.result.delay(name) for name in tasks.VALUES}
for name, each in sent.items():
    try:
        got = each.get(timeout=60)
    except Exception as error:
        got = error
    result[name] = [each.state, repr(got)]
"""


@pytest.fixture(scope="module")
def console(project, tmp_path_factory):
    project.append("orders/tasks.py", TASKS)
    with working(project, tmp_path_factory.mktemp("kinds")) as (_, console):
        yield console


@backends
def test_a_task_gets_its_argument_or_the_sender_an_error(console):
    found = console.ask(SEND)
    print(json.dumps(found, indent=1))
    wrong = {}
    for name, (sent, got) in found.items():
        right = "refused" if name in REFUSED.split() else ARGUMENTS.get(name, sent)
        if not got.startswith(right):
            wrong[name] = sent, got
    assert wrong == {}


@backends
def test_a_result_arrives_or_the_task_has_failed(console):
    found = console.ask(RETURN)
    print(json.dumps(found, indent=1))
    states = {name: state for name, (state, _) in found.items()}
    failed = {name for name, state in states.items() if state != "SUCCESS"}
    assert failed == set(REFUSED.split()), states
