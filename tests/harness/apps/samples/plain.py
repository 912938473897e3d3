"""Sends plain tasks, as a view would."""

import time

from celery import chord
from celery.result import AsyncResult

from .tasks import add, add_all, note_time


def use(path, has_results):
    """Send note_time() with a countdown of 2 s. Return when, and results if there is a backend."""
    sent = time.time()
    note_time.apply_async([path], countdown=2)
    results = []
    if has_results:
        results.append(AsyncResult(add.delay(1, 2).id).get(timeout=60))
        results.append(chord([add.s(1, 2), add.s(3, 4)])(add_all.s()).get(timeout=60))
    return sent, results
