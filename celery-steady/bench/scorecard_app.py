"""The app under load. Its task writes each start and end to the file MARKS, as `number retries kind-group time end`."""

import json
import os
import time

import celery

from celery_steady import rabbitmq

IS_STEADY = os.environ["KIND"] == "celery-steady"
app = (rabbitmq.Celery if IS_STEADY else celery.Celery)("scorecard_app")
app.conf.update(json.loads(os.environ["CONF"]))
GROUP = f"{os.environ['KIND'].split()[0]}-{os.getpgrp()}"
file = os.open(os.environ["MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def mark(task, number, what):
    words = number, task.request.retries, GROUP, time.time(), what
    os.write(file, " ".join(map(str, words)).encode() + b"\n")


@app.task(bind=True, ignore_result=True, max_retries=1)
def work(self, number, seconds, is_retried):
    mark(self, number, "start")
    time.sleep(seconds)
    mark(self, number, "end")
    if is_retried and not self.request.retries:
        raise self.retry(countdown=1)
