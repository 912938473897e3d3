"""`make demo`: from the template to finished tasks, with the seconds of each step.

Arguments are answers, as for `cookiecutter`: durable_jobs=yes
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

from .bake import TEMPLATE
from .project import Project, wait_for

seconds = {}

# In production, a broker waits for 21 minutes before it delivers the tasks of a killed worker
# again. (RabbitMQ notices the lost connection, and doesn't wait.)
QUICK_REDIS = """
CELERY_BROKER_TRANSPORT_OPTIONS |= {
    "visibility_timeout": 10,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
    "unacked_mutex_expire": 5,  # if the killed worker was just looking for such tasks
}
"""
QUICK_SQS = {"SQS_VISIBILITY_TIMEOUT": 10}
NEWSLETTER = """
from orders.models import Newsletter, Recipient
from orders.tasks import send_newsletter
letter = Newsletter.objects.create(subject="News", body="It works.")
emails = [f"reader-{number}@example.com" for number in range(5000)]
Recipient.objects.bulk_create(Recipient(newsletter=letter, email=email) for email in emails)
result = send_newsletter.delay(letter.pk).id
"""
SENT = """
from orders.models import Recipient
result = Recipient.objects.exclude(sent_at=None).count()
"""


@contextmanager
def step(name):
    print(f"\n{name}", flush=True)
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def main(answers, out=TEMPLATE / "demo", **environment):
    with step(f"Bake the project into {out.name}/"):
        shutil.rmtree(out, ignore_errors=True)
        bake = [sys.executable, "-m", "cookiecutter", "--no-input", "--output-dir", out, TEMPLATE]
        subprocess.run([*bake, *answers], check=True, stdout=subprocess.DEVNULL)
        [project] = map(Project, out.iterdir())
        print(f"  {len(project.files())} files")
    with step("Install what it needs"):
        project.install()
    has_jobs, has_example = (project / "vendor").exists(), (project / "orders").exists()
    if has_jobs and not has_example:
        project.add_app("samples")
    if not has_jobs:
        make_redelivery_quick(project, environment)
    with ExitStack() as stack:
        with step("Start it: make run"):
            site = stack.enter_context(project.up(**environment))
            print(f"  {site.web}  {site.flower if site.has_flower else ''}")
        if has_jobs:
            task_id = run_jobs(site) if has_example else run_own_job(site)
        else:
            task_id = run_tasks(site) if has_example else None
        if site.has_flower and task_id:
            with step("Look for it in Flower"):
                show_in_flower(site, task_id)
        with step("Stop everything"):
            site.stop()
            wait_for(lambda: not site.processes())
    print("\nSeconds")
    for name, took in seconds.items():
        print(f"  {took:5.1f}  {name}")
    print(f"  {sum(seconds.values()):5.1f}  in all")
    print(f"\nTry it: cd {os.path.relpath(project)} && make run")
    print("The next `make demo` replaces that folder.")


def make_redelivery_quick(project, environment):
    settings = project / "config/settings.py"
    if "visibility_timeout" in settings.read_text():
        settings.write_text(settings.read_text() + QUICK_REDIS)
    environment |= QUICK_SQS


# Plain tasks


def run_tasks(site):
    with step("Place an order over HTTP; a task confirms it by email"):
        post(site, "/api/orders/", {"product": "Tea", "quantity": 2}, 201)
        confirmed = "result = __import__('orders.models').models.Order.objects.get().confirmed_at"
        wait_for(lambda: site.ask(confirmed), site=site)
        print(f"  emails in .data/mail/: {count_emails(site)}")
    with step("Start a report, as the button on the page does"):
        location = post(site, "/api/orders/report/", {}, 202)
        if location:
            watch_and_cancel(site, location)
    with step("Send a newsletter to 5,000 recipients, and kill -9 the worker in the middle"):
        task_id = site.ask(NEWSLETTER)
        wait_for(lambda: site.ask(SENT) >= 2000, site=site)
        for pid in site.find("celery.* worker"):
            os.kill(pid, signal.SIGKILL)
        print(f"  killed after {site.ask(SENT)} of 5000 emails; make run starts a new worker")
        wait_for(lambda: site.ask(SENT) == 5000, site=site)
        print("  the task ran again and continued where it had stopped: 5000 of 5000")
    return task_id


def count_emails(site):
    files = (site.project / ".data/mail").glob("*")
    return sum(file.read_text().count("\nSubject: ") for file in files)


def watch_and_cancel(site, location):
    print(f"  GET {location[:20]}…")
    canceled = False
    while True:
        _, _, task = site.request(location)
        progress = task["progress"] or {"done": 0, "total": 1, "message": ""}
        done = 100 * progress["done"] // progress["total"]
        print(f"  {task['state']:9} {'#' * (done // 5):20} {done:3} %  {progress['message']}")
        if task["state"] in ("SUCCESS", "REVOKED"):
            return
        if done >= 10 and site.has_flower and not canceled:
            canceled = site.delete(location) == 204
            print("  DELETE -> 204")
        time.sleep(0.5)


# Durable jobs


def run_jobs(site):
    with step("Place an order over HTTP and follow its job"):
        order = {"product": "Tea", "quantity": 2}
        follow(site, post(site, "/api/orders/", order, 202))
    with step("Start a report, as the button on the page does, watch it and cancel it"):
        url = post(site, "/api/orders/report/", {}, 202)
        follow(site, url, cancel_at=10)
    with step("Email a newsletter to 5,000 recipients"):
        recipients = [f"reader-{number}@example.com" for number in range(5000)]
        letter = {"subject": "News", "body": "It works.", "recipients": recipients}
        return follow(site, post(site, "/api/newsletters/", letter, 202))


def run_own_job(site):
    with step("Enqueue a job of a task of our own and follow it"):
        return follow(site, site.enqueue("count", 50))


def follow(site, url, cancel_at=None):
    print(f"  GET {url}")
    for job in site.follow(url):
        bar = "#" * (job["progress"] // 5)
        print(f"  {job['state']:9} {bar:20} {job['progress']:3} %  {job['message']}", flush=True)
        if cancel_at and job["state"] == "running" and job["progress"] >= cancel_at:
            status, _, _ = site.request(f"{url}cancel/", {})
            print(f"  POST {url}cancel/ -> {status}")
    assert job["state"] == ("cancelled" if cancel_at else "succeeded"), job
    return job["id"]


# Both


def post(site, path, data, expected):
    """Return the header Location of the answer, or None if it has none."""
    began = time.monotonic()
    status, headers, _ = site.request(path, data)
    print(f"  POST {path} -> {status} after {1000 * (time.monotonic() - began):.0f} ms")
    assert status == expected, site.log
    return headers["Location"]


def show_in_flower(site, task_id):
    status, _, _ = site.ask_flower("/api/workers", authenticated=False)
    print(f"  without its password: {status}")
    assert status == 401
    task = wait_for(lambda: site.find_in_flower(task_id), site=site)
    print(f"  {task['worker']} ran {task['name']}: {task['state']}")


if __name__ == "__main__":
    main(sys.argv[1:])
