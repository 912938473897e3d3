"""For celery -A: the project, with a Beat that starts jobs every second."""

from config.celery import app

app.conf.beat_schedule = {
    "every second": {"task": "faults.tasks.tick", "schedule": 1},
    "a function": {"task": "faults.tasks.add", "schedule": 1, "args": [1, 2]},
}
