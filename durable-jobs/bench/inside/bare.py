"""Celery without Django, with the guarantees of the template's plain tasks."""

import os

from celery import Celery

results = os.environ.get("RESULTS")  # Celery's chords need them
app = Celery("bare", broker=os.environ["CELERY_BROKER_URL"], backend=results)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_default_queue="bare",
    task_ignore_result=not results,
    task_reject_on_worker_lost=True,
    task_send_sent_event=True,
    task_soft_time_limit=540,
    task_time_limit=600,
    worker_concurrency=int(os.environ.get("WORKER_CONCURRENCY", 1)),
    worker_prefetch_multiplier=1,
    worker_send_task_events=True,
)
if app.conf.broker_url.startswith("amqp"):
    app.conf.task_default_queue_type = "quorum"
    app.conf.broker_transport_options = {"confirm_publish": True}
app.set_default()
