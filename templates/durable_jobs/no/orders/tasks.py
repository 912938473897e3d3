{% from "chosen.jinja" import has_results with context %}
"""One example of each pattern. A task may run twice: at worst, an email is then sent twice."""

import json
import random
import time
from collections import Counter
from datetime import timedelta
from urllib.parse import urlencode
from urllib.request import urlopen

from celery import shared_task
{% if not has_results %}
from django.contrib.auth import get_user_model
{% endif %}
from django.core.mail import get_connection
from django.db.models import Sum
from django.utils import timezone

from .emails import send_email
from .models import Newsletter, Order


@shared_task(ignore_result=True, autoretry_for=(OSError,), retry_backoff=True, max_retries=8)
def send_confirmation(order_id):
    """If the mail server fails, the task is retried after up to 1, 2, 4, … seconds."""
    order = Order.objects.get(pk=order_id)
    if order.confirmed_at:
        return
    send_email(order.owner.email, "Your order", f"Thank you! You ordered {order}.")
    Order.objects.filter(pk=order.pk).update(confirmed_at=timezone.now())


@shared_task(ignore_result=True)
def confirm_forgotten_orders():
    """Beat starts this every hour. It finds orders whose task was lost, and sends a new one."""
    now = timezone.now()
    # A younger order's task may still be waiting. Older orders are given up on.
    age = now - timedelta(days=7), now - timedelta(hours=1)
    forgotten = Order.objects.filter(confirmed_at=None, created_at__range=age)
    for pk in forgotten.values_list("pk", flat=True):
        send_confirmation.delay(pk)


{% if has_results %}
@shared_task(bind=True)
def write_report(self, owner_id, days=30):
    """A long task with progress and a result, started by the button on the page."""
    ordered, today = Counter(), timezone.localdate()
    for done in range(days):
        meta = {"done": done, "total": days, "message": f"Reading day {done + 1} of {days}"}
        self.update_state(state="PROGRESS", meta=meta)
        orders = Order.objects.filter(owner=owner_id, created_at__date=today - timedelta(done))
        ordered.update(dict(orders.values_list("product").annotate(Sum("quantity"))))
        time.sleep(0.5)  # slow enough to watch
    return {"ordered": ordered}


@shared_task
def forecast_demand(product, days=30, rounds=100_000):
    """CPU-bound, so it has its own queue. The admin runs a chord of these, one per product."""
    quantities = list(Order.objects.filter(product=product).values_list("quantity", flat=True))
    totals = sorted(sum(random.choices(quantities, k=days)) for _ in range(rounds))
    median, high = totals[rounds // 2], totals[rounds * 95 // 100]
    return f"{product}: {median}, and in 95% of cases at most {high}"


@shared_task(ignore_result=True, autoretry_for=(OSError,), retry_backoff=True, max_retries=8)
def email_forecasts(forecasts, email):
    """The callback of the chord: it gets the results of all its tasks."""
    send_email(email, "Demand for the next 30 days", "\n".join(forecasts))
{% else %}
@shared_task(ignore_result=True, autoretry_for=(OSError,), retry_backoff=True, max_retries=8)
def email_report(owner_id, days=30):
    """A long task, started by the button on the page. Its result is an email."""
    ordered, today = Counter(), timezone.localdate()
    for day in range(days):
        orders = Order.objects.filter(owner=owner_id, created_at__date=today - timedelta(day))
        ordered.update(dict(orders.values_list("product").annotate(Sum("quantity"))))
        time.sleep(0.5)  # slow, as real reports are
    lines = [f"{count} × {product}" for product, count in ordered.items()]
    get_user_model().objects.get(pk=owner_id).email_user("Your orders", "\n".join(lines))


@shared_task(ignore_result=True, autoretry_for=(OSError,), retry_backoff=True, max_retries=8)
def forecast_demand(product, email, days=30, rounds=100_000):
    """CPU-bound, so it has its own queue. The admin starts a group of these, one per product."""
    quantities = list(Order.objects.filter(product=product).values_list("quantity", flat=True))
    totals = sorted(sum(random.choices(quantities, k=days)) for _ in range(rounds))
    median, high = totals[rounds // 2], totals[rounds * 95 // 100]
    text = f"{median}, and in 95% of cases at most {high}"
    send_email(email, f"Demand for {product} for the next 30 days", text)
{% endif %}


@shared_task(ignore_result=True, autoretry_for=(Exception,), retry_backoff=True, max_retries=8)
def check_stock(order_id):
    """I/O-bound: it waits for another server, with a timeout. The result goes into the database."""
    order = Order.objects.get(pk=order_id)
    query = urlencode({"product": order.product})
    # Never let users choose a task's URL.
    with urlopen(f"https://supplier.example/stock?{query}", timeout=10) as response:
        quantity = json.load(response)["quantity"]
    Order.objects.filter(pk=order_id).update(in_stock=quantity >= order.quantity)


@shared_task(ignore_result=True, autoretry_for=(Exception,), retry_backoff=True, max_retries=50)
def send_newsletter(newsletter_id):
    """Sends 100 emails, then starts the next run. Mail servers limit the emails of a connection.

    Each recipient is claimed first, so two runs at once send one email. If a worker is killed, the
    email that it was sending counts as sent. After an error, it is sent again.
    """
    newsletter = Newsletter.objects.get(pk=newsletter_id)
    waiting = newsletter.recipients.filter(sent_at=None)
    with get_connection() as connection:
        for to in waiting.order_by("attempts", "pk")[:100]:  # after a failure, others come first
            if waiting.filter(pk=to.pk).update(sent_at=timezone.now(), attempts=to.attempts + 1):
                try:
                    send_email(to.email, newsletter.subject, newsletter.body, connection)
                except Exception:
                    newsletter.recipients.filter(pk=to.pk).update(sent_at=None)
                    raise
    if waiting.exists():
        send_newsletter.delay(newsletter_id)
