"""The app of the workers under test. Its tasks call the test, which tells them what to do.

CONF has its settings, as JSON, and CALLS the test's socket.
"""

import builtins
import json
import os
import signal
import socket
import time
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
        raise getattr(builtins, answer, Panic)("as the test said")
    return name


class Panic(BaseException):
    """As code in Rust raises it."""


@app.task
def clean_up(name):
    """Raise an error at the end, also when it is stopped."""
    try:
        return ask(name)
    finally:
        os.remove("a file that is gone")


@app.task
def hold(name):
    """Don't end on SIGTERM, as code in C doesn't."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    return ask(name)


@app.task
def add(x, y):
    return x + y


if "NEWER" in os.environ:  # a newer version of the code

    @app.task
    def newer():
        return "newer"


if "GATE" in os.environ:

    @signals.worker_process_init.connect
    def wait(**kwargs):
        """Let a child process need time to start."""
        while not os.path.exists(os.environ["GATE"]):
            time.sleep(0.05)


@signals.worker_ready.connect
def on_ready(sender, **kwargs):
    parts = {"consumer": sender, "backend": app.backend, "transport": sender.connection.transport}
    with call("ready", parts={name: path(part) for name, part in parts.items()}):
        pass


@signals.worker_shutting_down.connect
def on_shutting_down(**kwargs):
    with call("stopping"):
        pass
