"""The app of the workers under test. Its tasks call the test, which tells them what to do.

CONF has its settings, as JSON, and CALLS the test's socket.
"""

import ctypes
import json
import os
import socket
import time
from contextlib import contextmanager

import poisons
from celery import Celery, signals

app = Celery("worker_app")
RUNS = os.path.abspath("runs")
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
    with call(name) as line:
        line.recv(100)  # until the test answers
    return name


@app.task
def block(name):
    """Run in C code, which lets no greenlet run, until the file `unblock` exists."""
    with call(name):
        pass
    while not os.path.exists("unblock"):
        ctypes.CDLL(None).usleep(100_000)
    return name


@app.task
def poison(name, when):
    """Run a function of poisons.py: now, before or after a wait for the test, or if that is interrupted."""
    with open(RUNS, "a") as file:
        file.write(f"{name}\n")
    function = poisons.FUNCTIONS[name]
    if when == "now":
        return function()
    if when == "before":
        function()
        return ask(name)
    if when == "after":
        ask(name)
        return function()
    try:
        return ask(name)
    except BaseException:
        return function()


@app.task
def add(x, y):
    return x + y


if "BACKEND_USED" in os.environ:
    assert app.backend.__module__ == "celery.backends.redis"


@app.task
def backend():
    return path(app.backend)


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


if "THREAD" in os.environ:

    @signals.worker_ready.connect
    def leave_a_thread(**kwargs):
        poisons.leave(poisons.forever)


@signals.worker_ready.connect
def on_ready(sender, **kwargs):
    parts = {"consumer": sender, "backend": app.backend, "transport": sender.connection.transport}
    with call("ready", parts={name: path(part) for name, part in parts.items()}):
        pass


@signals.worker_shutting_down.connect
def on_shutting_down(**kwargs):
    with call("stopping"):
        pass
