"""The library changes nothing for plain tasks, compared with celery_steady.Celery."""

import os
import subprocess
import sys

import pytest
from settings import SOURCE

# Sends a plain task in each way, and prints the messages without what is random or of this process.
SEND = """
import os, sys, re, uuid
from importlib import import_module

uuid.uuid3 = uuid.uuid4 = uuid.uuid5 = lambda *args: uuid.UUID(int=1)
os.getpid = lambda: 1
with_library = sys.argv[1] == "with"

import django
from django.conf import settings
settings.configure(
    USE_TZ=True,
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"]
    + ["durable_jobs"] * with_library,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    CELERY_BROKER_URL=sys.argv[2],
    CELERY_TASK_TIME_LIMIT=600,
)
app = import_module("durable_jobs.celery" if with_library else "celery_steady").Celery("plain")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.set_current()
django.setup()

@app.task(name="add")
def add(x, y):
    pass

def publish(self, body, *args, **kwargs):
    print(body, *args, sorted(kwargs.items(), key=str))

from kombu import Producer
Producer._publish = publish
app.conf.timezone = "UTC"
app.now = lambda: __import__("datetime").datetime(2026, 1, 1, tzinfo=__import__("datetime").UTC)
add.delay(1, y=2)
add.apply_async([1, 2], countdown=5, expires=60, priority=3, queue="other", headers={"a": 1})
add.apply_async([1, 2], link=add.s(3))
(add.s(1, 2) | add.s(3)).delay()
app.send_task("add", [1, 2])
"""


@pytest.mark.parametrize("url", ["redis://", "amqp://"])
def test_messages_of_plain_tasks_are_the_same_bytes_with_and_without_the_library(url):
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "DJANGO_SETTINGS_MODULE": ""}
    with_library, without = (
        subprocess.check_output([sys.executable, "-c", SEND, library, url], env=env, text=True)
        for library in ("with", "without")
    )
    assert with_library == without
    assert with_library.count("'argsrepr'") == 5
