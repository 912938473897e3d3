from celery import signals
from django.apps import AppConfig


class JobsConfig(AppConfig):
    name = "jobs"

    def ready(self):
        from jobs import checks, sweep, tasks  # noqa: F401

        signals.worker_init.connect(tasks.follow_revokes)
        signals.beat_init.connect(sweep.start)
        signals.beat_embedded_init.connect(sweep.start)  # celery worker --beat
