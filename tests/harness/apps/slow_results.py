"""For celery -A: the project. Its worker reads the results of its children slowly."""

import time

from celery.concurrency import asynpool
from config.celery import app  # noqa: F401

read_result = asynpool.ResultHandler._recv_message


def read_slowly(*args):
    time.sleep(1)
    return asynpool.__read__(*args)


def receive(*args):
    return read_result(*args, __read__=read_slowly)


asynpool.ResultHandler._recv_message = receive
