{% from "chosen.jinja" import broker with context %}
from celery import signals
from django.apps import AppConfig


class JobsConfig(AppConfig):
    name = "jobs"

    def ready(self):
        from jobs import checks, sweep{{ ", tasks" if broker.flower }}  # noqa: F401

{% if broker.flower %}
        signals.worker_init.connect(tasks.follow_revokes)
{% endif %}
        signals.heartbeat_sent.connect(sweep.show_life)  # by a worker
        signals.beat_init.connect(sweep.start)
        signals.beat_embedded_init.connect(sweep.start)  # celery worker --beat
