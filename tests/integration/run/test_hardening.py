"""Attacks on a running output. Those that need no server are in the output's own tests."""

import socket

import pytest

from harness.browser import browser
from harness.outputs import default_output
from harness.project import free_ports, wait_for


@pytest.mark.parametrize("fault", ["dead", "hung"])
@default_output
def test_an_unavailable_cache_stops_no_request(project, fault):
    """A hung cache never answers, so a request that waits for it exceeds the 60 s of fetch()."""
    with socket.socket() as cache:  # accepts, and never answers
        cache.bind(("127.0.0.1", 0))
        cache.listen(100)
        port = cache.getsockname()[1] if fault == "hung" else free_ports(1)[0]
        with project.up(CACHE_URL=f"redis://127.0.0.1:{port}/0") as site:
            for _ in range(5):
                assert site.request("/api/jobs/")[0] == 200
            wait_for(lambda: "requests are not throttled" in site.log, site=site)


PAGES = {  # besides those of the next test
    "/api/docs/": "/api/jobs/",
    "/admin/": "Site administration",
    "/admin/durable_jobs/pause/": "Oldest wait",
    "/admin/users/user/add/": "Add user",
    "/api/jobs/?format=api": "Job List",
}


@default_output
def test_the_pages_work_under_their_content_security_policy(project, tmp_path):
    """In a browser, logged in: what the scripts add appears, and no violation is logged."""
    with project.up() as site, browser(tmp_path) as tab:
        tab.send("Log.enable")
        tab.log_in(site)
        for page, words in PAGES.items():
            tab.open(site.web + page)
            tab.wait(f"document.body.innerHTML.includes({words!r})")
        violations = [event for event in tab.events if "Content Security Policy" in str(event)]
        assert not violations


MARKUP = "<img src=x onerror=hack()><a href=javascript:hack()>link</a>"
# Jobs with markup in each text: the name of a file, a message, a result, an error.
WITH_MARKUP = """
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.utils.timezone import now
from durable_jobs import batches
from durable_jobs.actions import cancel
from durable_jobs.enqueue import enqueue_many
from durable_jobs.models import Failure, Job
from orders.models import Order
from orders.tasks import write_report
from users.models import User

owner = User.objects.get()
Order.objects.create(owner=owner, product=text)
client = Client(HTTP_HOST="localhost")
client.force_login(owner)
file = SimpleUploadedFile(text, b"product,quantity")
assert client.post("/api/imports/", {"file": file}).status_code == 202

texts = [
    {"label": text, "message": text, "worker": text},
    {"state": "failed", "error": text, "public_error": text, "task": text},
    *({"state": "succeeded", "result": result} for result in [text, [text], text + "\\n" * 9]),
]
jobs = enqueue_many([write_report.using(owner=owner, countdown=999).s(owner.pk)] * len(texts))
cancel(Job.objects.filter(pk__in=[job.pk for job in jobs[1:]]))
for job, fields in zip(jobs, texts):
    Job.objects.filter(pk=job.pk).update(**fields)
Failure.objects.create(job=jobs[1], started_at=now(), ended_at=now(), error=text, traceback=text)
batch = batches.enqueue([write_report.using(countdown=999).s(owner.pk)], owner=owner, label=text)
result = [job.pk for job in [*jobs[:2], batch]]
"""


@default_output
def test_pages_show_markup_as_text_and_other_sites_can_post_nothing(project, tmp_path):
    """In a browser, logged in. The other site has another port, so the browser sends cookies."""
    with project.up() as site, browser(tmp_path) as tab:
        active, failed, batch = site.ask(f"text = {MARKUP!r}\n{WITH_MARKUP}")
        tab.send("Log.enable")
        tab.log_in(site)
        pages = {
            "/": 7,
            "/?#state=batches": 0,
            f"/?#batch={batch}": 1,
            f"/jobs/{active}/": 2,
            f"/jobs/{failed}/": 2,
        }
        pages["/admin/orders/order/"] = 1
        jobs, batches = "/admin/durable_jobs/job/", "/admin/durable_jobs/batch/"
        pages |= {batches: 1, f"{batches}{batch}/change/": 2, f"{jobs}?batch={batch}": 0}
        pages |= {jobs: 1, f"{jobs}{active}/change/": 3, f"{jobs}{failed}/change/": 4}
        for page, times in pages.items():
            tab.open(site.web + page)
            tab.wait(f"document.body.textContent.split({MARKUP!r}).length > {times}")
            assert tab.run("document.querySelectorAll('[onerror], [href^=javascript]').length") == 0
        seen = f"""
from durable_jobs.models import Job, Pause
states = Job.objects.filter(state="queued").count(), Job.objects.get(pk={active!r}).state
result = [Job.objects.count(), *states, Pause.objects.count()]
"""
        wait_for(lambda: site.ask(seen)[1] == 2, site=site)  # the import has ended, too
        before = site.ask(seen)
        violations = [event for event in tab.events if "Content Security Policy" in str(event)]
        assert not violations

        for path, fields in {
            "/api/orders/report/": {},
            f"/api/jobs/{active}/cancel/": {},
            f"/api/jobs/{failed}/run_again/": {},
            f"/api/batches/{batch}/cancel/": {},
            jobs: {"action": "cancel", "_selected_action": active},
            batches: {"action": "cancel", "_selected_action": batch},
            "/admin/durable_jobs/pause/": {"pause": "celery"},
        }.items():
            tab.open(f"{site.flower}/healthcheck")
            inputs = [f"<input name={name} value={value}>" for name, value in fields.items()]
            form = f"<form method=post action={site.web}{path}>{''.join(inputs)}</form>"
            tab.run(f"document.body.innerHTML = {form!r}; document.forms[0].submit()")
            tab.wait(f"location.href.startsWith({site.web!r}) && document.readyState == 'complete'")
            assert "CSRF" in tab.run("document.body.textContent")
        assert site.ask(seen) == before
        assert before[2] == "queued"
