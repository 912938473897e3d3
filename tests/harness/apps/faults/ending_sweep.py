"""For celery -A: the project, with a Beat whose sweeper ends after two seconds."""

import ctypes
import threading

from celery import signals
from config.celery import app  # noqa: F401


@signals.beat_init.connect
def start(**kwargs):
    threading.Timer(2, end_sweeper).start()


def end_sweeper():
    [sweeper] = [t.ident for t in threading.enumerate() if t.name == "sweeper"]
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    # No `except Exception` catches it.
    raise_in(ctypes.c_ulong(sweeper), ctypes.py_object(SystemExit))
