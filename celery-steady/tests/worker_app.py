"""The app of the workers under test. Its tasks call the test, which tells them what to do.

CONF has its settings, as JSON, and CALLS the test's socket.
"""

import builtins
import json
import os
import socket
from contextlib import contextmanager

from celery import Celery, signals

app = Celery("worker_app")
app.conf.update(json.loads(os.environ["CONF"]))


@contextmanager
def call(name, **more):
    """Call the test. Give the line, for its answer."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(os.environ["CALLS"])
        sent = {"name": name, "group": os.getpgrp(), **more}  # the processes of this worker
        line.sendall(json.dumps(sent).encode() + b"\n")
        yield line


def path(thing):
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


@app.task
def ask(name):
    """Raise the built-in exception that the test answers, if it names one."""
    with call(name) as line:
        answer = line.recv(100).decode()
    if answer:
        raise getattr(builtins, answer)("as the test said")
    return name


@app.task
def add(x, y):
    return x + y


if "NEWER" in os.environ:  # a newer version of the code

    @app.task
    def newer():
        return "newer"


@signals.worker_ready.connect
def on_ready(sender, **kwargs):
    parts = {"consumer": sender, "backend": app.backend, "transport": sender.connection.transport}
    with call("ready", parts={name: path(part) for name, part in parts.items()}):
        pass


@signals.worker_shutting_down.connect
def on_shutting_down(**kwargs):
    with call("stopping"):
        pass
