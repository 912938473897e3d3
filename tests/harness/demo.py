"""`make demo`: from the template to a finished job, with the seconds of each step.

Arguments are answers, as for `cookiecutter`: include_example=no
"""

import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .bake import TEMPLATE
from .project import Project, wait_for

seconds = {}


@contextmanager
def step(name):
    print(f"\n{name}", flush=True)
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def main(answers):
    with step("Bake the project into demo/"):
        out = TEMPLATE / "demo"
        shutil.rmtree(out, ignore_errors=True)
        bake = [sys.executable, "-m", "cookiecutter", "--no-input", "--output-dir", out, TEMPLATE]
        subprocess.run([*bake, "durable_jobs=yes", *answers], check=True, stdout=subprocess.DEVNULL)
        [project] = map(Project, out.iterdir())
        print(f"  {len(project.files())} files")
    with step("Install what it needs"):
        project.install()
    run = run_example if (project / "orders").exists() else run_own_task
    if run is run_own_task:
        project.add_app("samples")
    with ExitStack() as stack:
        with step("Start it: make run"):
            site = stack.enter_context(project.up())
            print(f"  {site.web}  {site.flower if site.has_flower else ''}")
        job = run(site)
        if site.has_flower:
            with step("Look for it in Flower"):
                show_in_flower(site, job)
        with step("Stop everything"):
            site.stop()
            wait_for(lambda: not site.processes())
    print("\nSeconds")
    for name, took in seconds.items():
        print(f"  {took:5.1f}  {name}")
    print(f"  {sum(seconds.values()):5.1f}  in all")
    print(f"\nTry it: cd {project.relative_to(Path.cwd())} && make run")
    print("The next `make demo` replaces that folder.")


def run_example(site):
    with step("Place an order over HTTP and follow its job"):
        order = {"product": "Tea", "quantity": 2}
        follow(site, post(site, "/api/orders/", order))
    with step("Start a report, as the button on the page does, watch it and cancel it"):
        url = post(site, "/api/orders/report/", {})
        follow(site, url, cancel_at=10)
    with step("Mail a newsletter to 5,000 recipients"):
        recipients = [f"reader-{number}@example.com" for number in range(5000)]
        letter = {"subject": "News", "body": "It works.", "recipients": recipients}
        return follow(site, post(site, "/api/newsletters/", letter))


def run_own_task(site):
    with step("Enqueue a job of a task of our own and follow it"):
        return follow(site, site.enqueue("count", 50))


def post(site, path, data):
    began = time.monotonic()
    status, headers, _ = site.request(path, data)
    print(f"  POST {path} -> {status} after {1000 * (time.monotonic() - began):.0f} ms")
    assert status == 202, site.log
    return headers["Location"]


def follow(site, url, cancel_at=None):
    print(f"  GET {url}")
    for job in site.follow(url):
        bar = "#" * (job["progress"] // 5)
        print(f"  {job['state']:9} {bar:20} {job['progress']:3} %  {job['message']}", flush=True)
        if cancel_at and job["state"] == "running" and job["progress"] >= cancel_at:
            status, _, _ = site.request(f"{url}cancel/", {})
            print(f"  POST {url}cancel/ -> {status}")
    assert job["state"] == ("cancelled" if cancel_at else "succeeded"), job
    return job


def show_in_flower(site, job):
    status, _, _ = site.ask_flower("/api/workers", authenticated=False)
    print(f"  without its password: {status}")
    assert status == 401
    task = wait_for(lambda: site.find_in_flower(job["id"]))
    print(f"  {task['worker']} ran {task['name']}: {task['state']}")


if __name__ == "__main__":
    main(sys.argv[1:])
