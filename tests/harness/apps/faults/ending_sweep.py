"""For celery -A: the project, with a Beat whose sweep ends after two seconds."""

import ctypes
import threading

from celery import signals
from config.celery import app  # noqa: F401


@signals.beat_init.connect
def start(**kwargs):
    threading.Timer(2, end_sweep).start()


def end_sweep():
    [sweep] = [thread.ident for thread in threading.enumerate() if thread.name == "sweep"]
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    # No `except Exception` catches it.
    raise_in(ctypes.c_ulong(sweep), ctypes.py_object(SystemExit))
