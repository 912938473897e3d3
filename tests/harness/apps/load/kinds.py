"""Sends a task or a job of each kind, and returns its id: KINDS["chord"]()."""

from importlib.util import find_spec

from django.conf import settings
from trials.tasks import nap, retry_later

from orders import tasks as orders
from orders.models import Order

EMAIL, PRODUCT = "you@example.com", "Coffee"
has_results = hasattr(settings, "CELERY_RESULT_BACKEND")

KINDS = {
    "short": lambda: nap.delay(0).id,
    "retry": lambda: retry_later.apply_async([2], ignore_result=False).id,
    "countdown": lambda: nap.apply_async([0], countdown=3).id,
    "rest": lambda: nap.delay(3).id,
    "long": lambda: nap.delay(12).id,
    "longest": lambda: nap.delay(24).id,  # longer than the visibility timeout
}

if find_spec("durable_jobs"):
    from faults.tasks import rest, run

    from durable_jobs import batches
    from durable_jobs.enqueue import enqueue

    RETRY = "if not self.request.retries: raise self.retry(countdown=2)"

    def send_batch():
        pks = Order.objects.values_list("pk", flat=True)[:2]
        members = [orders.count_ordered.s([pk]) for pk in pks]
        return batches.enqueue(members, on_success=orders.mail_sum.s(EMAIL)).pk

    KINDS |= {
        "batch": send_batch,
        "job-retry": lambda: enqueue(run, [RETRY]).pk,
        "job-countdown": lambda: enqueue(rest, [0], countdown=3).pk,
        "job-rest": lambda: enqueue(rest, [3]).pk,
        "job-long": lambda: enqueue(rest, [12]).pk,
    }
elif has_results:
    from celery import chord

    def send_chord():
        members = [orders.forecast_demand.s(PRODUCT, 30, 50)] * 2
        return chord(members)(orders.email_forecasts.s(EMAIL)).id

    KINDS["chord"] = send_chord
