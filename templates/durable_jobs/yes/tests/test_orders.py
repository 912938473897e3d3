"""The example app. It shows how to test views that enqueue jobs, and tasks that may run twice."""

import re
from datetime import timedelta
from io import BytesIO
from smtplib import SMTPRecipientsRefused, SMTPServerDisconnected

import pytest
from django.contrib.auth.models import Permission
from django.core.files.uploadedfile import SimpleUploadedFile
from django.utils import timezone
from durable_jobs.actions import run_again
from durable_jobs.models import Batch, Job
from durable_jobs.tasks import JobTask

from orders import tasks
from orders.models import Import, Newsletter, Order

pytestmark = pytest.mark.django_db

ORDER = {"product": "Tea", "quantity": 2}
LETTER = {"subject": "News", "body": "All is well.", "recipients": ["ada@example.com"]}


def post(api, url, data, key=None):
    headers = {"Idempotency-Key": key} if key else {}
    return api.post(url, data, headers=headers)


def post_order(api, key=None, **changes):
    return post(api, "/api/orders/", ORDER | changes, key)


def post_newsletter(api, count=1):
    recipients = [f"{number}@example.com" for number in range(count)]
    return post(api, "/api/newsletters/", LETTER | {"recipients": recipients})


@pytest.fixture
def order(user):
    return Order.objects.create(owner=user, **ORDER)


@pytest.fixture
def newsletter():
    return Newsletter.objects.create(subject="News", body="All is well.")


# Orders


def test_an_order_is_accepted_immediately_and_confirmed_by_email(api, run_jobs, mailoutbox):
    response = post_order(api)
    assert (response.status_code, response["Retry-After"]) == (202, "1")
    assert response.json()["confirmed_at"] is None
    assert mailoutbox == []
    run_jobs()
    job = api.get(response["Location"]).json()
    assert (job["id"], job["state"]) == (response.json()["job"], "succeeded")
    [mail] = mailoutbox
    assert (mail.to, mail.body) == (["user@example.com"], "Thank you! You ordered 2 × Tea.")
    order = api.get(f"/api/orders/{response.json()['id']}/").json()
    assert order["confirmed_at"]


@pytest.mark.parametrize(
    "bad",
    [
        {"quantity": 0},
        {"quantity": 1001},
        {"product": ""},
        {"product": "x" * 101},
        {"product": "x" * 3_000_000},
    ],
)
def test_a_bad_order_is_refused(api, bad):
    assert post_order(api, **bad).status_code == 400
    assert not Order.objects.exists() and not Job.objects.exists()


def test_an_order_is_not_shown_to_others(api, staff_api):
    order = post_order(api).json()
    assert staff_api.get(f"/api/orders/{order['id']}/").status_code == 404


def test_an_order_is_accepted_while_the_broker_is_down(
    api, django_capture_on_commit_callbacks, broker_down
):
    with django_capture_on_commit_callbacks(execute=True):
        response = post_order(api)
    assert response.status_code == 202
    assert len(broker_down) == 1
    assert api.get(response["Location"]).json()["state"] == "queued"


def test_a_confirmation_is_retried_while_the_mail_server_is_unavailable(
    api, run_jobs, mailoutbox, mail_errors
):
    mail_errors["user@example.com"] = [ConnectionRefusedError(), TimeoutError()]
    post_order(api)
    run_jobs()
    assert len(mailoutbox) == 1
    assert Job.objects.get().retries == 2


def test_a_confirmation_that_runs_twice_sends_one_mail(order, mailoutbox):
    tasks.send_confirmation(order.pk)
    tasks.send_confirmation(order.pk)
    assert len(mailoutbox) == 1


# Idempotency-Key


def test_the_same_key_gives_the_same_order(api, run_jobs, mailoutbox):
    first, second = post_order(api, key="key"), post_order(api, key="key")
    run_jobs()
    assert second.status_code == 202
    assert second.json() == first.json()
    assert second["Location"] == first["Location"]
    assert (Order.objects.count(), Job.objects.count(), len(mailoutbox)) == (1, 1, 1)


# Imports


ORDERS = "product,quantity" + "\nTea,1" * 150


def post_file(api, text):
    file = SimpleUploadedFile("tea.csv", text.encode())
    return api.post("/api/imports/", {"file": file}, format="multipart")


def test_a_file_becomes_orders(api, user, run_jobs, mailoutbox):
    lines = [f"Tea,{number % 9 + 1}" for number in range(250)]
    response = post_file(api, "\n".join(["product,quantity", *lines]))
    assert response.status_code == 202
    run_jobs()
    job = api.get(response["Location"]).json()
    assert (job["state"], job["label"], job["result"]) == (
        "succeeded",
        "Import tea.csv",
        {"imported": 250},
    )
    assert Order.objects.filter(owner=user).count() == 250
    [mail] = mailoutbox
    assert re.fullmatch(r"250 orders were imported from imports/tea.*\.csv\.", mail.body)
    assert mail.to == [user.email]


def test_only_its_owner_can_download_a_file(api, staff_api):
    url = f"/api/imports/{post_file(api, ORDERS).json()['id']}/file/"
    assert staff_api.get(url).status_code == 404
    response = api.get(url)
    assert b"".join(response.streaming_content) == ORDERS.encode()
    assert response["Content-Disposition"].startswith("attachment")
    assert api.get(f"/{Import.objects.get().file.name}").status_code == 404  # no public address


def test_an_import_continues_at_the_chunk_that_failed(api, run_jobs, mailoutbox, monkeypatch):
    """No order and no summary is stored twice. The error stands in for a worker's death."""
    post_file(api, "\n".join(["product,quantity", *["Tea,1"] * 150]))
    report, reports = JobTask.report, []

    def fail_at_the_second_chunk(self, *args, **kwargs):
        reports.append(args)
        if len(reports) == 2:
            raise OSError
        report(self, *args, **kwargs)

    monkeypatch.setattr(JobTask, "report", fail_at_the_second_chunk)
    run_jobs()
    assert (Job.objects.get().cursor, Order.objects.count()) == (100, 100)
    run_again(Job.objects.get())
    run_jobs()
    assert (Order.objects.count(), len(mailoutbox)) == (150, 1)


@pytest.mark.parametrize("line", ["Tea", ",1", "Tea,a", "T\0,1", "Tea,0", "Tea,1001"])
def test_a_wrong_line_is_named_and_nothing_is_imported(api, run_jobs, line):
    response = post_file(api, f"{ORDERS}\n{line}\n{line}")
    run_jobs()
    error = api.get(response["Location"]).json()["error"]
    assert error == "Line 152 is invalid: expected a product and a quantity"
    assert not Order.objects.exists()
    assert Job.objects.count() == 1  # no summary


def test_a_file_that_is_too_large_is_refused(api, monkeypatch):
    monkeypatch.setattr("orders.serializers.MAX_UPLOAD_BYTES", 10)
    assert post_file(api, "product,quantity").status_code == 400


# Newsletters


@pytest.fixture
def reports(monkeypatch):
    """The progress that jobs report, in percent."""
    reported = []
    report = JobTask.report

    def record(task, done, total=100, *args, **kwargs):
        report(task, done, total, *args, **kwargs)
        reported.append(int(100 * done / total))

    monkeypatch.setattr(JobTask, "report", record)
    return reported


def test_a_newsletter_goes_to_many_and_shows_its_progress(staff_api, run_jobs, mailoutbox, reports):
    response = post_newsletter(staff_api, 1000)
    assert response.status_code == 202
    run_jobs()
    assert sorted(set(reports)) == list(range(101))
    job = staff_api.get(response["Location"]).json()
    assert (job["state"], job["result"]) == ("succeeded", {"sent": 1000})
    assert job["message"] == "Sent 1000 of 1000"
    assert len({mail.to[0] for mail in mailoutbox}) == len(mailoutbox) == 1000


def test_a_newsletter_continues_after_an_error(staff_api, run_jobs, mailoutbox, mail_errors):
    mail_errors["200@example.com"] = [SMTPServerDisconnected("bad luck")]
    post_newsletter(staff_api, 500)
    run_jobs()
    job = Job.objects.get()
    assert (job.state, job.result, job.retries) == ("succeeded", {"sent": 500}, 1)
    assert len({mail.to[0] for mail in mailoutbox}) == len(mailoutbox) == 500


def test_a_newsletter_that_runs_again_sends_no_second_email(staff_api, run_jobs, mailoutbox):
    post_newsletter(staff_api, 3)
    run_jobs()
    run_again(Job.objects.get())
    run_jobs()
    assert len(mailoutbox) == 3


def test_an_address_that_fails_every_time_holds_up_nobody(
    staff_api, run_jobs, mailoutbox, mail_errors
):
    mail_errors["1@example.com"] = [SMTPRecipientsRefused({"1@example.com": (450, b"later")})] * 99
    post_newsletter(staff_api, 3)
    run_jobs()
    assert Job.objects.get().state == "failed"
    assert {mail.to[0] for mail in mailoutbox} == {"0@example.com", "2@example.com"}


def test_an_address_that_the_mail_server_refuses_is_tried_once(
    staff_api, run_jobs, mailoutbox, refused
):
    post_newsletter(staff_api, 5)
    run_jobs()
    job = Job.objects.get()
    assert (job.state, job.retries) == ("succeeded", 0)
    assert {mail.to[0][0] for mail in mailoutbox} == {"0", "2", "4"}


# Started on the page


def test_a_report_can_be_watched_for_ten_seconds(api, user, order, run_jobs, reports, monkeypatch):
    slept = []
    monkeypatch.setattr(tasks.time, "sleep", slept.append)
    response = api.post("/api/orders/report/")
    assert (response.status_code, response["Retry-After"]) == (202, "1")
    run_jobs()
    job = api.get(response["Location"]).json()
    assert (job["state"], job["result"]) == ("succeeded", {"ordered": {"Tea": 2}})
    assert (job["progress"], job["message"]) == (100, "Read the orders of 30 days")
    assert sum(slept) >= 10
    assert len(set(reports)) > 20


# Started in the admin, or by Beat


def start(client, action, *selected):
    data = {"action": action, "_selected_action": [row.pk for row in selected]}
    page = f"/admin/orders/{selected[0]._meta.model_name}/"
    return client.post(page, data, follow=True).content.decode()


def test_the_admin_starts_a_forecast_on_a_queue_of_its_own(admin_client, admin_user, order):
    page = start(admin_client, "forecast_demand", order)
    job = Job.objects.get(owner=admin_user)
    assert f'<a href="/admin/durable_jobs/job/{job.pk}/change/">1 job enqueued</a>' in page
    assert (job.task, job.args, job.queue) == ("orders.tasks.forecast_demand", ["Tea"], "cpu")


def test_the_admin_mails_what_was_ordered(
    admin_client, admin_user, user, order, mailoutbox, run_jobs
):
    Order.objects.create(owner=user, product="Milk", quantity=1)
    Order.objects.create(owner=user, product="Tea", quantity=3)
    page = start(admin_client, "mail_sum", *Order.objects.all())
    assert f"The totals will be emailed to {admin_user.email}." in page
    assert mailoutbox == []  # no request waits for it
    run_jobs()
    [mail] = mailoutbox
    assert (set(mail.body.splitlines()), mail.to) == ({"5 × Tea", "1 × Milk"}, [admin_user.email])
    batch = Batch.objects.get(owner=admin_user)
    assert (batch.state, batch.counts) == ("succeeded", {"succeeded": 1})


def test_the_admin_asks_the_supplier_with_a_timeout_for_each_wait(
    admin_client, admin_user, order, run_jobs, reports, monkeypatch
):
    def urlopen(url, timeout):
        if url.endswith("=Milk"):
            raise TimeoutError("timed out")
        return BytesIO(b'{"stock": 7}')

    monkeypatch.setattr(tasks, "urlopen", urlopen)
    milk = Order.objects.create(owner=admin_user, product="Milk")
    start(admin_client, "ask_supplier", order, milk)
    run_jobs()
    job = Job.objects.get(owner=admin_user)
    assert job.queue == "io"
    assert job.result == {"Tea": {"stock": 7}, "Milk": "timed out"}
    assert reports == [0, 50]


def test_the_view_permission_starts_nothing(
    client, user, order, newsletter, django_capture_on_commit_callbacks, mailoutbox
):
    user.is_staff = True
    user.save()
    user.user_permissions.set(Permission.objects.filter(codename__startswith="view_"))
    client.force_login(user)
    with django_capture_on_commit_callbacks(execute=True):  # delay_on_commit() needs it
        for action in "forecast_demand", "ask_supplier":
            start(client, action, order)
        start(client, "send_preview", newsletter)
    assert not Job.objects.exists() and mailoutbox == []


def test_the_daily_report_counts_the_orders_of_a_day(admin_user, user, order, mailoutbox):
    old = Order.objects.create(owner=user, **ORDER)
    Order.objects.filter(pk=old.pk).update(created_at=timezone.now() - timedelta(days=2))
    tasks.send_daily_report.delay()
    [mail] = mailoutbox
    assert (mail.body, mail.to) == ("Orders since yesterday: 1", [admin_user.email])
