"""The page of a job alone, and that of the admin alone, say why it does not move: seven causes."""

import re

import pytest

from harness.browser import browser
from harness.faults import on_one
from harness.project import fetch, free_ports, wait_for

WHY = "document.querySelector('.job [data-part=why]')?.innerText"
USERS = """
from django.test import Client
from users.models import User
owner, _ = User.objects.get_or_create(username="owner")
staff, _ = User.objects.get_or_create(username="staff", is_staff=True, is_superuser=True)
"""
LOG_IN = """
result = []
for user in owner, staff:
    client = Client()
    client.force_login(user)
    result.append(client.cookies["sessionid"].value)
"""


@pytest.fixture
def say(stack, tmp_path):
    """A function: wait until both pages of a job have these texts."""
    owner, staff = stack.ask(USERS + LOG_IN)
    [port] = free_ports(1)
    web = f"http://127.0.0.1:{port}"
    # With DEBUG, pages are served over plain HTTP, with their scripts. A browser may open a
    # connection ahead of its requests, which occupies one process.
    command = f"gunicorn config.wsgi --bind 127.0.0.1:{port}"
    stack.process(command, "pages", says="Booting worker", DEBUG="True").start()
    with browser(tmp_path) as tab:

        def open_as(session, path):
            tab.send("Network.setCookie", name="sessionid", value=session, url=web)
            tab.open(f"{web}/{path}")

        def in_admin(job):
            url = f"{web}/admin/durable_jobs/job/{job}/change/"
            _, _, page = fetch(url, cookies={"sessionid": staff})
            return re.sub(r"<.*?>", "", page).replace("&#x27;", "'")

        def say(job, text, admin=None):
            open_as(owner, f"jobs/{job}/")
            wait_for(lambda: re.search(text, tab.run(WHY) or ""))
            wait_for(lambda: re.search(admin or text, in_admin(job)))
            tab.picture(tmp_path / "page.png")
            open_as(staff, f"admin/durable_jobs/job/{job}/change/")
            tab.picture(tmp_path / "admin.png")

        yield say


def enqueue(stack, code):
    """Enqueue a job of the user who looks at the pages. `code` makes it a `job`."""
    return stack.ask(f"{USERS}\n{code}\nresult = str(job.pk)")


def hold(stack, gate, **options):
    """Return a running job. A worker runs it until the gate opens."""
    options = "".join(f", {name}={value!r}" for name, value in options.items())
    job = enqueue(stack, f"job = hold.using(owner=owner{options}).enqueue({str(gate)!r})")
    stack.wait_until_started(job)
    return job


@on_one
def test_nobody_takes_from_its_queue(stack, say):
    job = enqueue(stack, "job = quick.using(owner=owner, queue='nobody').enqueue()")
    say(job, "No worker consumes the queue nobody")


@on_one
def test_its_worker_has_died(stack, say, gate):
    job = hold(stack, gate, queue="cpu")
    stack.worker.kill()
    stopped = "The worker running this job stopped unexpectedly"
    say(job, f"Crash 1 of 3: {stopped}", "Crash 1 of 3: Its worker died")


@on_one
def test_its_worker_and_beat_have_died(stack, say, gate):
    job = hold(stack, gate, queue="cpu")
    stack.kill(stack.worker, stack.beat)
    text = r"Its worker hasn't responded for \d+ s\. "
    say(job, text + r"Beat is down: last seen \d+ s ago")


@on_one
def test_all_workers_and_beat_have_died(stack, say, gate):
    job = hold(stack, gate, queue="cpu")
    stack.kill(*stack.workers, stack.beat)
    say(job, "Its worker hasn.t responded .* No heartbeat from Beat or any worker: they are down")


@on_one
def test_beat_has_died(stack, say):
    stack.beat.kill()
    job = enqueue(stack, "job = quick.using(owner=owner, countdown=1).enqueue()")
    say(job, r"^Beat is down: last seen \d+ s ago", "Beat is down")


@on_one
def test_the_broker_is_away(stack, say):
    stack.broker.kill()
    job = enqueue(stack, "job = quick.using(owner=owner, queue='cpu').enqueue()")
    say(job, "The broker refuses messages for the queue cpu")


@on_one
def test_it_is_due_later(stack, say):
    job = enqueue(stack, "job = quick.using(owner=owner, countdown=3 * 86400 - 1).enqueue()")
    say(job, r"^Starts on .+ at .+ \(in 3 days\)$", r"Due at:\s+\w+\. \d+, 20\d\d")


@on_one
def test_it_is_blocked_by_a_limit(stack, say, gate):
    code = f"for _ in 'ab': job = limited.using(owner=owner).enqueue('one:a', {str(gate)!r})"
    job = enqueue(stack, code)
    text = r"Waiting: limit one:a is full \(1 of 1 slots taken\)"
    say(job, f"^{text}", text)


@on_one
def test_its_queue_is_paused(stack, say):
    stack.ask("pauses.pause('cpu', 'SMTP is down')")
    job = enqueue(stack, "job = quick.using(owner=owner, queue='cpu').enqueue()")
    say(job, r"^Paused for \d+ s: SMTP is down", "Paused for .*: SMTP is down")
