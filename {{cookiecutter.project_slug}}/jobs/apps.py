from celery import signals
from django.apps import AppConfig


class JobsConfig(AppConfig):
    name = "jobs"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self):
        from . import beat, checks, liveness, worker  # noqa: F401  checks register themselves

        signals.worker_init.connect(worker.start)
        signals.worker_ready.connect(worker.watch_children)
        signals.worker_shutting_down.connect(worker.end_in_time)
        signals.task_received.connect(worker.name_run)
        signals.task_prerun.connect(worker.drop_dead_connections)
        signals.task_failure.connect(worker.notice_death)
        signals.heartbeat_sent.connect(liveness.touch_liveness_file)
        signals.beat_init.connect(beat.start)
