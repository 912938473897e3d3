{% from "chosen.jinja" import has_results, has_task_api with context %}
from datetime import timedelta
from io import BytesIO
from smtplib import SMTPDataError, SMTPRecipientsRefused, SMTPServerDisconnected
from unittest.mock import Mock
from urllib.error import URLError

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from django.core.mail.backends.locmem import EmailBackend
from django.utils import timezone

from orders import emails, tasks
from orders.models import Newsletter, Order, Recipient


@pytest.fixture
def order(user):
    return Order.objects.create(owner=user, product="Tea", quantity=2)


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_an_order_is_confirmed_by_email(
    api, admin_api, mailoutbox, django_capture_on_commit_callbacks
):
    with django_capture_on_commit_callbacks(execute=True):
        response = api.post("/api/orders/", {"product": "Tea"})
    assert response.status_code == 201
    assert [mail.to for mail in mailoutbox] == [["user@example.com"]]
    assert api.get("/api/orders/").data["results"][0]["confirmed_at"]
    assert admin_api.get("/api/orders/").data["results"] == []  # only one's own orders
    tasks.send_confirmation(response.data["id"])  # as if the message were delivered twice
    assert len(mailoutbox) == 1


def test_a_confirmation_is_retried_while_the_mail_server_fails(order, monkeypatch):
    monkeypatch.setattr(emails, "send_mail", send := Mock(side_effect=[OSError, None]))
    tasks.send_confirmation.delay(order.pk)
    order.refresh_from_db()
    assert order.confirmed_at and send.call_count == 2


def test_a_confirmation_that_is_refused_is_not_sent_again(order, mail_errors):
    mail_errors["user@example.com"] = [SMTPDataError(554, b"no")] * 2
    tasks.send_confirmation.delay(order.pk)
    order.refresh_from_db()
    assert order.confirmed_at and len(mail_errors["user@example.com"]) == 1


@pytest.mark.django_db(transaction=True)  # on_commit() then runs as in production
def test_without_a_broker_orders_are_accepted_but_no_report_is_promised(api, broker_down):
    assert api.post("/api/orders/", {"product": "Tea"}).status_code == 201
    assert api.post("/api/orders/report/").status_code == 503


def test_forgotten_orders_are_confirmed(order, mailoutbox):
    tasks.confirm_forgotten_orders()
    assert mailoutbox == []  # the order is new: its own task may still be waiting
    Order.objects.update(created_at=timezone.now() - timedelta(hours=2))
    tasks.confirm_forgotten_orders()
    assert len(mailoutbox) == 1


{% if has_results %}
def test_a_report_counts_the_orders_of_its_owner(order, admin_user):
    Order.objects.create(owner=admin_user, product="Coffee")
    assert tasks.write_report.delay(order.owner_id).result == {"ordered": {"Tea": 2}}
{% else %}
def test_a_report_is_emailed(api, order, admin_user, mailoutbox):
    Order.objects.create(owner=admin_user, product="Coffee")
    assert api.post("/api/orders/report/").status_code == 202
    assert [mail.body for mail in mailoutbox] == ["2 × Tea"]
{% endif %}


def test_forecasts_are_emailed(order, admin_client, mailoutbox):
    data = {"action": "forecast_demand", "_selected_action": [order.pk]}
    assert admin_client.post("/admin/orders/order/", data).status_code == 302
    assert mailoutbox[0].body.startswith({{ '"Tea: 60"' if has_results else '"60"' }})  # 2 × 30 days


def test_the_stock_is_checked_with_the_supplier(order, admin_client, monkeypatch):
    supplier = Mock(side_effect=[URLError("down"), BytesIO(b"busy"), BytesIO(b'{"quantity": 1}')])
    monkeypatch.setattr(tasks, "urlopen", supplier)
    tasks.check_stock.delay(order.pk)
    order.refresh_from_db()
    assert order.in_stock is False
    supplier.assert_called_with("https://supplier.example/stock?product=Tea", timeout=10)


@pytest.fixture
def newsletter(db):
    """It has five recipients, one of whom has already received it."""
    newsletter = Newsletter.objects.create(subject="News", body="…")
    for number in range(5):
        newsletter.recipients.create(email=f"{number}@example.com")
    newsletter.recipients.filter(email="0@example.com").update(sent_at=timezone.now())
    return newsletter


def sent(mailoutbox):
    """Return who got an email, without "@example.com"."""
    return "".join(sorted(mail.to[0].split("@")[0] for mail in mailoutbox))


def test_a_newsletter_goes_to_those_who_have_not_received_it(newsletter, mailoutbox):
    tasks.send_newsletter.delay(newsletter.pk)
    assert sent(mailoutbox) == "1234"


def test_a_newsletter_to_many_takes_several_runs(newsletter, mailoutbox):
    emails = [f"{number}@example.com" for number in range(5, 300)]
    Recipient.objects.bulk_create(Recipient(newsletter=newsletter, email=email) for email in emails)
    tasks.send_newsletter.delay(newsletter.pk)
    assert len(mailoutbox) == 299


def test_a_second_click_sends_no_second_email(newsletter, mailoutbox, monkeypatch):
    send = EmailBackend.send_messages

    def click_again(self, messages):
        monkeypatch.setattr(EmailBackend, "send_messages", send)
        tasks.send_newsletter.delay(newsletter.pk)
        return send(self, messages)

    monkeypatch.setattr(EmailBackend, "send_messages", click_again)
    tasks.send_newsletter.delay(newsletter.pk)
    assert sent(mailoutbox) == "1234"


@pytest.mark.parametrize("error", [SMTPServerDisconnected, SoftTimeLimitExceeded, ValueError])
def test_a_newsletter_continues_after_an_error(newsletter, mailoutbox, mail_errors, error):
    mail_errors["2@example.com"] = [error("bad luck")]
    tasks.send_newsletter.delay(newsletter.pk)
    assert sent(mailoutbox) == "1234"


def test_an_address_that_fails_every_time_holds_up_nobody(newsletter, mailoutbox, mail_errors):
    mail_errors["2@example.com"] = [SMTPRecipientsRefused({"2@example.com": (450, b"later")})] * 99
    assert tasks.send_newsletter.delay(newsletter.pk).failed()
    assert sent(mailoutbox) == "134"
    [failed] = newsletter.recipients.filter(sent_at=None)
    assert (failed.email, failed.attempts) == ("2@example.com", 51)


def test_an_address_that_the_mail_server_refuses_is_tried_once(newsletter, mailoutbox, refused):
    tasks.send_newsletter.delay(newsletter.pk)
    assert sent(mailoutbox) == "24"
    assert not newsletter.recipients.filter(sent_at=None).exists()
{% if has_task_api %}


def test_the_answer_to_a_report_says_where_its_status_is(api, order):
    response = api.post("/api/orders/report/")
    assert response.status_code == 202
    status = api.get(response["Location"]).data
    assert (status["state"], status["result"]) == ("SUCCESS", {"ordered": {"Tea": 2}})
{% endif %}
