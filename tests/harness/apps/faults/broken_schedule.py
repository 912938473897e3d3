"""For celery -A: the project, with a Beat that can never start the task of its schedule."""

from config.celery import app

app.conf.beat_schedule = {
    "broken": {"task": "faults.tasks.tick", "schedule": 1, "options": {"expires": 60}}
}
