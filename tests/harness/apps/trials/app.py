"""For celery -A: the project, with the fault that the variable FAULT names."""

import ctypes
import os
import threading
import time

from celery import signals
from celery.schedules import schedule
from celery.worker.consumer import Consumer
from config.celery import app


def every_second():
    """Beat starts jobs every second."""
    app.conf.beat_schedule = {
        "every second": {"task": "faults.tasks.tick", "schedule": 1},
        "a function": {"task": "faults.tasks.add", "schedule": 1, "args": [1, 2]},
    }


class Endless(schedule):
    def is_due(self, last_run_at):
        time.sleep(3600)


def hanging_beat():
    """Beat hangs when it reads its schedule."""
    app.conf.beat_schedule = {"endless": {"task": "faults.tasks.tick", "schedule": Endless(1)}}


def ending_sweeper():
    """Beat's sweeper ends after two seconds, by what no `except Exception` catches."""

    def end():
        [sweeper] = [t.ident for t in threading.enumerate() if t.name == "sweeper"]
        raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
        raise_in(ctypes.c_ulong(sweeper), ctypes.py_object(SystemExit))

    signals.beat_init.connect(lambda **_: threading.Timer(2, end).start(), weak=False)


def quick_heartbeat():
    """A worker's heartbeat comes each second."""

    def hurry(**kwargs):
        from durable_jobs.worker import heartbeat  # not earlier: Django's models are loaded now

        heartbeat.BEAT_SECONDS = 1

    signals.worker_init.connect(hurry, weak=False)


def no_reconnect():
    """A worker does not survive the loss of its broker.

    Celery has had errors there, such as one of Gossip while a connection was lost.
    """

    def fail(consumer, error):
        raise RuntimeError("an error of Celery")

    quick_heartbeat()
    Consumer.on_connection_error_after_connected = fail


globals()[os.environ["FAULT"]]()
