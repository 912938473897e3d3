"""For celery -A: the project, with a Beat that starts a job every second."""

from config.celery import app

app.conf.beat_schedule = {"every second": {"task": "faults.tasks.tick", "schedule": 1}}
