"""For celery -A: the project, with a Beat that starts a job at once and then every hour."""

from datetime import timedelta

from config.celery import app

last = app.now() - timedelta(hours=1)
app.conf.beat_schedule = {
    "every hour": {"task": "faults.tasks.tick", "schedule": 3600, "last_run_at": last}
}
