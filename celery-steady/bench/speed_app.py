"""The app of speed.py: a task that does nothing, and how it is sent."""

import json
import os
import time

import celery
from redis import Redis

app = celery.Celery("speed_app")
app.conf.update(json.loads(os.environ["CONF"]))
STARTED = "bench-started"  # a list of times


@app.task(ignore_result=True)
def nothing(): ...


@app.task(ignore_result=True)
def note():
    Redis.from_url(app.conf.broker_url).rpush(STARTED, time.time())


def send(count, countdown=None):
    """Send so many tasks. Return the seconds, and those of CPU."""
    nothing.apply_async(countdown=countdown)
    start, cpu = time.monotonic(), time.process_time()
    for _ in range(count):
        nothing.apply_async(countdown=countdown)
    return time.monotonic() - start, time.process_time() - cpu


def until_started(count):
    """Send so many tasks, each when the one before has started. Return their seconds."""
    client, seconds = Redis.from_url(app.conf.broker_url), []
    for _ in range(count):
        sent = time.time()
        note.delay()
        _, started = client.blpop(STARTED)
        seconds.append(float(started) - sent)
    return seconds
