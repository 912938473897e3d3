"""For celery -A: the project, with a Beat that hangs when it reads its schedule."""

import time

from celery.schedules import schedule
from config.celery import app


class Endless(schedule):
    def is_due(self, last_run_at):
        time.sleep(3600)


app.conf.beat_schedule = {"endless": {"task": "faults.tasks.tick", "schedule": Endless(1)}}
