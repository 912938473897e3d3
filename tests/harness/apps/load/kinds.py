"""Sends a task or a job of each kind, and returns its id: KINDS["chord"]()."""

from importlib.util import find_spec

from django.conf import settings

from orders import tasks as orders
from orders.models import Order

from . import tasks

EMAIL, PRODUCT = "you@example.com", "Coffee"
has_results = hasattr(settings, "CELERY_RESULT_BACKEND")

KINDS = {
    "short": lambda: tasks.rest.delay(0).id,
    "retry": lambda: tasks.try_again.delay().id,
    "countdown": lambda: tasks.rest.apply_async([0], countdown=3).id,
    "rest": lambda: tasks.rest.delay(3).id,
    "long": lambda: tasks.rest.delay(12).id,
    "longest": lambda: tasks.rest.delay(24).id,  # longer than the visibility timeout
}

if find_spec("durable_jobs"):
    from durable_jobs import batches
    from durable_jobs.enqueue import enqueue

    def send_batch():
        pks = Order.objects.values_list("pk", flat=True)[:2]
        members = [orders.count_ordered.s([pk]) for pk in pks]
        return batches.enqueue(members, on_success=orders.mail_sum.s(EMAIL)).pk

    KINDS |= {
        "batch": send_batch,
        "job-retry": lambda: enqueue(tasks.try_job_again).pk,
        "job-countdown": lambda: enqueue(tasks.rest_job, [0], countdown=3).pk,
        "job-rest": lambda: enqueue(tasks.rest_job, [3]).pk,
        "job-long": lambda: enqueue(tasks.rest_job, [12]).pk,
    }
elif has_results:
    from celery import chord

    def send_chord():
        members = [orders.forecast_demand.s(PRODUCT, 30, 50)] * 2
        return chord(members)(orders.email_forecasts.s(EMAIL)).id

    KINDS["chord"] = send_chord
