"""`make demo`: from the template to finished tasks.

Arguments are answers, as for `cookiecutter`: durable_jobs=yes
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

from .bake import TEMPLATE
from .mails import NEWSLETTER, mails
from .project import Project, wait_for

# Seconds until a killed worker's tasks and jobs run again, shorter than the defaults
QUICK = {"VISIBILITY_SECONDS": 10, "JOB_LEASE_SECONDS": 5}
LETTER = {
    "subject": "News",
    "body": "It works.",
    "recipients": [f"reader-{number}@example.com" for number in range(5000)],
}
SENT = """
from orders.models import Recipient
result = Recipient.objects.exclude(sent_at=None).count()
"""


def main(answers, out=TEMPLATE / "demo", **environment):
    print(f"\nBake the project into {out.name}/")
    shutil.rmtree(out, ignore_errors=True)
    bake = [sys.executable, "-m", "cookiecutter", "--no-input", "--output-dir", out, TEMPLATE]
    subprocess.run([*bake, *answers], check=True, stdout=subprocess.DEVNULL)
    [project] = map(Project, out.iterdir())
    print(f"  {len(project.files())} files")
    print("\nInstall what it needs")
    project.install()
    has_jobs = "durable_jobs=yes" in answers
    print("\nStart it: make run")
    settings = project.read("config/settings.py")
    for name, seconds in QUICK.items():
        if default := re.search(rf'"{name}", (\d+)', settings):
            environment[name] = seconds
            print(f"  with {name}={seconds}, for this run only; the default is {default[1]}")
    with project.up(**environment) as site:
        print(f"  {site.web}  {site.flower if site.has_flower else ''}")
        if (project / "orders").exists():
            task_id = run_jobs(site) if has_jobs else run_tasks(site)
            if site.has_flower:
                show_in_flower(site, task_id)
        print("\nStop everything")
    wait_for(lambda: not site.processes())
    print(f"\nTry it: cd {os.path.relpath(project)} && make run")
    print("The next `make demo` replaces that folder.")


def run_tasks(site):
    print("\nPlace an order over HTTP; a task confirms it by email")
    post(site, "/api/orders/", {"product": "Tea", "quantity": 2}, 201)
    confirmed = "result = __import__('orders.models').models.Order.objects.get().confirmed_at"
    wait_for(lambda: site.ask(confirmed), site=site)
    print("\nStart a report, as the button on the page does")
    location = post(site, "/api/orders/report/", {}, 202)
    if location:
        watch_and_cancel(site, location)
    print("\nSend a newsletter to 5,000 recipients, and kill -9 the worker in the middle")
    task_id = site.ask(f"count = 5000{NEWSLETTER}result = send_newsletter.delay(newsletter.pk).id")
    wait_for(lambda: site.ask(SENT) >= 2000, site=site)
    kill_worker(site)
    print(f"  killed after {site.ask(SENT)} of 5000 emails; make run starts a new worker")
    wait_for(lambda: site.ask(SENT) == 5000, site=site)
    print("  the task ran again and continued where it had stopped")
    show_emails(site.project, most_lost=1, most_twice=0)
    return task_id


def show_emails(project, most_lost, most_twice):
    """Count those that arrived. A killed worker may have lost one, or another sent it twice."""
    emails = mails(project).split("Subject: News")[1:]
    to = [re.search(r"^To: (.*)", email, re.MULTILINE)[1] for email in emails]
    lost, twice = 5000 - len({*to}), len(to) - len({*to})
    print(f"  {len({*to})} of 5000 recipients have the email, {twice} of them twice")
    assert lost <= most_lost and twice <= most_twice


def kill_worker(site):
    for pid in site.find("bin/celery.* worker"):
        os.kill(pid, signal.SIGKILL)


def watch_and_cancel(site, location):
    print(f"  GET {location[:20]}…")
    cancelled = False
    while True:
        _, _, task = site.request(location)
        progress = task["progress"] or {"done": 0, "total": 1, "message": ""}
        percent = 100 * progress["done"] // progress["total"]
        show(task["state"], percent, progress["message"])
        if task["state"] in ("SUCCESS", "REVOKED"):
            return
        if percent >= 10 and site.has_flower and not cancelled:
            cancelled = site.delete(location) == 204
            print("  DELETE -> 204")
        time.sleep(0.5)


def run_jobs(site):
    print("\nPlace an order over HTTP and follow its job")
    order = {"product": "Tea", "quantity": 2}
    follow(site, post(site, "/api/orders/", order, 202))
    print("\nStart a report, as the button on the page does, watch it and cancel it")
    url = post(site, "/api/orders/report/", {}, 202)
    follow(site, url, lambda: cancel(site, url), ends="cancelled")
    print("\nEmail a newsletter to 5,000 recipients, and kill -9 the worker in the middle")
    job = follow(site, post(site, "/api/newsletters/", LETTER, 202), lambda: kill_worker(site))
    show_emails(site.project, most_lost=0, most_twice=1)
    return job


def cancel(site, url):
    status, _, _ = site.request(f"{url}cancel/", {})
    print(f"  POST {url}cancel/ -> {status}")


def follow(site, url, act=None, ends="succeeded"):
    """Show a job until it ends. Call act() once it has done a tenth. Return its id."""
    print(f"  GET {url}")
    for job in site.follow(url):
        show(job["state"], job["progress"], job["message"])
        if act and job["state"] == "running" and job["progress"] >= 10:
            act()
            act = None
    assert job["state"] == ends and not act, job
    return job["id"]


def show(state, percent, message):
    print(f"  {state:9} {'#' * (percent // 5):20} {percent:3} %  {message}")


def post(site, path, data, expected):
    """Return the header Location of the answer, or None if it has none."""
    began = time.monotonic()
    status, headers, _ = site.request(path, data)
    print(f"  POST {path} -> {status} after {1000 * (time.monotonic() - began):.0f} ms")
    assert status == expected, site.log
    return headers.get("Location")


def show_in_flower(site, task_id):
    print("\nLook for it in Flower")
    status, _, _ = site.ask_flower("/api/workers", authenticated=False)
    print(f"  without its password: {status}")
    assert status == 401
    task = wait_for(lambda: site.find_in_flower(task_id), site=site)
    print(f"  {task['worker']} ran {task['name']}: {task['state']}")


if __name__ == "__main__":
    main(sys.argv[1:])
