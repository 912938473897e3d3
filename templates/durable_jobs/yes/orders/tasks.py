"""One example of each pattern of background work. Keep what you need, delete the rest."""

import csv
import json
import random
import time
from collections import Counter
from datetime import timedelta
from http.client import HTTPException
from io import TextIOWrapper
from itertools import islice
from urllib.parse import urlencode
from urllib.request import urlopen

from celery import shared_task
from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.core.mail import get_connection, send_mail
from django.core.validators import ProhibitNullCharactersValidator
from django.db import transaction
from django.db.models import Sum
from django.utils import timezone
from durable_jobs.exceptions import JobError
from durable_jobs.tasks import job

from .emails import send_email
from .models import Import, Newsletter, Order

CHUNK = 100  # emails, or lines of a file


@job(autoretry_for=(OSError,), retry_backoff=True, max_retries=8)
def send_confirmation(self, order_id):
    """A job for one user. If the mail server fails, it is retried, with growing pauses.

    It is safe to repeat: an order that is already confirmed gets no second email. Only a crash
    between the email and the UPDATE repeats it.
    """
    order = Order.objects.get(pk=order_id)
    if order.confirmed_at:
        return
    # Send only to the user's own address. If the request supplied it, anyone could email anyone.
    send_email(order.owner.email, "Your order", f"Thank you! You ordered {order}.")
    Order.objects.filter(pk=order.pk).update(confirmed_at=timezone.now())
    self.report(100, message=f"Sent to {order.owner.email}")


@job(autoretry_for=(OSError,), retry_backoff=True, max_retries=50)
def send_newsletter(self, newsletter_id):
    """A long job, which stores each step and reports its progress. A crash repeats one email at most.

    It is one job, not one for each recipient, because nobody needs the state of a single email.
    """
    newsletter = Newsletter.objects.get(pk=newsletter_id)
    total = newsletter.recipients.count()
    waiting = newsletter.recipients.filter(sent_at=None)
    done = total - waiting.count()
    while chunk := waiting.order_by("attempts", "pk")[:CHUNK]:
        with get_connection() as connection:  # mail servers limit the emails of a connection
            for to in chunk:
                # After a failure, the others come first.
                waiting.filter(pk=to.pk).update(attempts=to.attempts + 1)
                send_email(to.email, newsletter.subject, newsletter.body, connection)
                waiting.filter(pk=to.pk).update(sent_at=timezone.now())
                done += 1
                # With a cursor, the job ends here if its worker is stopping.
                self.report(done, total, f"Sent {done} of {total}", cursor=done)
    return {"sent": done}


@job
def import_orders(self, import_id):
    """A job that reads an uploaded file. Each line becomes exactly one order, whatever crashes.

    To ensure this, one transaction stores the orders of a chunk and the cursor. All lines are
    checked before anything is stored: if one is wrong, the job fails, and the owner can fix the
    file and upload it again.
    """
    upload = Import.objects.get(pk=import_id)
    total = sum(1 for order in read_orders(upload))  # checks every line, stores none
    done = self.cursor or 0
    orders = islice(read_orders(upload), done, None)  # skips what an earlier run has stored
    while chunk := list(islice(orders, CHUNK)):
        done += len(chunk)
        with transaction.atomic():
            Order.objects.bulk_create(chunk)
            self.report(done, total, f"Imported {done} of {total}", cursor=done)
    self.enqueue_next(mail_summary.using(label=f"Summary of {upload}").s(import_id, done))
    return {"imported": done}


@job(autoretry_for=(OSError,), retry_backoff=True, max_retries=8)
def mail_summary(self, import_id, count):
    """The next job. It is stored exactly once, together with the success of the import."""
    upload = Import.objects.get(pk=import_id)
    upload.owner.email_user("Your import", f"{count} orders were imported from {upload}.")


def read_orders(upload):
    """Yield an unsaved order for each line of the file. Raises JobError if a line is wrong."""
    with upload.file.open("rb") as file, TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.DictReader(text)
        try:
            for line in reader:
                fields = {name: line[name] for name in ("product", "quantity")}
                order = Order(owner=upload.owner, **fields)
                # Checking the owner would cost a query per line.
                order.clean_fields(exclude=["job", "owner"])
                ProhibitNullCharactersValidator()(order.product)  # PostgreSQL cannot store them
                yield order
        except ValidationError as error:
            message = f"Line {reader.line_num} is invalid: expected a product and a quantity"
            raise JobError(message) from error
        except (KeyError, UnicodeDecodeError, csv.Error) as error:
            message = "Expected: a CSV file in UTF-8, with the columns product and quantity"
            raise JobError(message) from error


@job
def write_report(self, owner_id, days=30):
    """A job to watch and to cancel. A button on the jobs page starts it.

    A task does not know its job's owner, so the owner's id is an argument too.
    """
    today, ordered = timezone.localdate(), Counter()
    for done in range(days):
        day = today - timedelta(days=done)
        self.report(done, days, f"Reading the orders of {day}")
        ordered.update(sum_by_product(Order.objects.filter(owner=owner_id, created_at__date=day)))
        time.sleep(0.5)  # makes the example slow enough to watch
    self.report(100, message=f"Read the orders of {days} days")
    return {"ordered": ordered}


def sum_by_product(orders):
    return dict(orders.values_list("product").annotate(Sum("quantity")))


@job
def forecast_demand(self, product, days=30, rounds=100_000):
    """A CPU-bound job. It has its own queue, so that emails don't wait for it."""
    quantities = list(Order.objects.filter(product=product).values_list("quantity", flat=True))
    totals = []
    for done in range(rounds):
        if done % 1000 == 0:
            self.report(done, rounds)
        totals.append(sum(random.choices(quantities, k=days)))
    totals.sort()
    return {"median": totals[rounds // 2], "95th percentile": totals[rounds * 95 // 100]}


@job
def ask_supplier(self, products):
    """An I/O-bound job: it waits for another server.

    So it has its own queue (see CELERY_TASK_ROUTES), and each wait has a timeout.
    """
    stock = {}
    for done, product in enumerate(products):
        self.report(done, len(products), f"Asking about {product}")
        query = urlencode({"product": product})
        try:
            # Never let users choose which server is called.
            with urlopen(f"https://supplier.example/stock?{query}", timeout=10) as response:
                stock[product] = json.load(response)
        except (OSError, HTTPException, ValueError) as error:
            stock[product] = str(error)
    return stock


@shared_task
def send_preview(newsletter_id, email):
    """A plain task, sent with delay_on_commit(). Use one if a loss does no harm.

    If the preview is lost, its user requests another. A plain task has no row and no progress.
    """
    newsletter = Newsletter.objects.get(pk=newsletter_id)
    send_mail(f"Preview: {newsletter.subject}", newsletter.body, None, [email])


@job
def count_ordered(self, order_ids):
    """A member of a batch. Its result is passed to mail_sum()."""
    return sum_by_product(Order.objects.filter(pk__in=order_ids))


@job(autoretry_for=(OSError,), retry_backoff=True, max_retries=8)
def mail_sum(self, counts, email):
    """The `on_success` of a batch. It gets the results of all members when all have succeeded."""
    total = sum(map(Counter, counts), Counter())
    lines = [f"{count} × {product}" for product, count in total.items()]
    send_mail("What was ordered", "\n".join(lines), None, [email])


@shared_task
def send_daily_report():
    """A plain task that Beat starts every morning."""
    orders = Order.objects.filter(created_at__gte=timezone.now() - timedelta(days=1))
    staff = get_user_model().objects.filter(is_staff=True).exclude(email="")
    emails = list(staff.values_list("email", flat=True))
    send_mail("Daily report", f"Orders since yesterday: {orders.count()}", None, emails)
