"""Sends plain tasks, as a view would."""

import time

from celery import chord
from celery.result import AsyncResult

from .tasks import add, add_all, note_time


def use(path, has_results):
    """Send note_time() with a countdown of 2 s. Return when, and the results of a task and a chord.

    Without a result backend, these are the names of the errors.
    """
    sent = time.time()
    note_time.apply_async([path], countdown=2)
    if has_results:
        return sent, [get_result(), get_result_of_chord()]
    return sent, [error_of(get_result), error_of(get_result_of_chord)]


def get_result():
    return AsyncResult(add.delay(1, 2).id).get(timeout=60)


def get_result_of_chord():
    return chord([add.s(1, 2), add.s(3, 4)])(add_all.s()).get(timeout=60)


def error_of(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
