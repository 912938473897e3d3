from celery import signals
from django.apps import AppConfig


class JobsConfig(AppConfig):
    name = "jobs"

    def ready(self):
        from jobs import checks, sweep, worker  # noqa: F401

        signals.heartbeat_sent.connect(worker.show_life)
        signals.beat_init.connect(sweep.start)
        signals.beat_embedded_init.connect(sweep.start)  # celery worker --beat
