{% from "chosen.jinja" import servers, worker_pool, has_example, has_flower with context %}
"""The project around the jobs: settings, checks, pages, login, log and probes."""

import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path
from urllib.parse import quote

import pytest
from axes.models import AccessLog
from django.db import OperationalError, connection
from durable_jobs.tasks import job

import dev
from api.throttling import Throttle
from config import urls
from config.celery import app

pytestmark = pytest.mark.django_db
{% if has_flower %}

# The Flower of `make run` doesn't see what tests send.
app.conf.update(event_exchange="test-events", control_exchange="test-control")
{% endif %}


def test_celery_prints_no_passwords():
    url = "scheme://:hidden@host/0"
    settings = {"CELERY_BROKER_URL": url, "CACHES": {"LOCATION": url}, "FLOWER_BASIC_AUTH": url}
    kind = type(app.conf.finalize())  # what `celery report` prints, among others
    printed = str(kind(settings, [{}]).table())
    assert "FLOWER_BASIC_AUTH" in printed and "hidden" not in printed


def test_each_scheduled_task_exists():
    app.loader.import_default_modules()
    assert {entry["task"] for entry in app.conf.beat_schedule.values()} <= set(app.tasks)


def test_requests_are_limited_unless_the_cache_is_unavailable(api, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("connection refused")

    monkeypatch.setitem(Throttle.THROTTLE_RATES, "user", "1/min")
    monkeypatch.setattr(Throttle, "count_again_at", 0.0)
    assert [api.get("/api/jobs/").status_code for _ in range(2)] == [200, 429]
    monkeypatch.setattr(Throttle, "get_cache_key", refuse)
    assert api.get("/api/jobs/").status_code == 200


def test_everything_but_the_health_checks_requires_a_login(client):
    for url in "/", "/api/docs/", "/admin/":
        assert client.get(url).status_code == 302
    for url in [{{ '"/api/orders/", ' if has_example }}"/api/jobs/", "/api/schema/", "/metrics"]:
        assert client.get(url).status_code == 401
    for url in "/health/live", "/health/ready":
        assert client.get(url, headers={"host": "10.0.0.1"}).status_code == 200


def test_only_probes_and_metrics_are_answered_over_plain_http(staff_api, settings):
    settings.SECURE_SSL_REDIRECT = True
    for url in "/health/live", "/health/ready", "/metrics":
        assert staff_api.get(url).status_code == 200
    for url in "/", "/api/jobs/", "/metrics/":
        assert staff_api.get(url).status_code == 301


@pytest.mark.parametrize("url", ["/", "/admin/", "/api/docs/"])
def test_a_page_runs_only_the_projects_own_scripts(admin_client, url):
    response = admin_client.get(url)
    assert response.status_code == 200
    assert "default-src 'self'" in response["Content-Security-Policy"]
    assert b"<script>" not in response.content


def test_the_page_has_buttons_and_links_for_staff(client, admin_client, user, monkeypatch):
    monkeypatch.setitem(urls.page, "buttons", {"Build it": "/api/builds/"})
    client.force_login(user)
    assert b'data-url="/api/builds/">Build it</button>' in client.get("/").content
    for label, url in urls.page["staff_links"].items():
        link = f'<a href="{url}">{label}</a>'.encode()
        assert link in admin_client.get("/").content
        assert link not in client.get("/").content


def test_an_address_that_guesses_passwords_is_locked_out(client, user, settings):
    settings.AXES_ENABLED = True
    user.set_password("secret")
    user.save()

    def log_in(password, address="192.0.2.1"):
        data = {"username": user.get_username(), "password": password}
        return client.post("/login/", data, REMOTE_ADDR=address).status_code

    for guess in range(settings.AXES_FAILURE_LIMIT - 1):
        assert log_in(guess) == 200
    assert log_in("the last one") == log_in("secret") == 429
    assert log_in("secret", "192.0.2.2") == 302
    assert not AccessLog.objects.exists()


def test_the_log_has_no_line_for_each_poll_and_probe(api, staff_api, caplog):
    caplog.set_level("INFO")
    for url in "/api/jobs/", "/api/jobs/?state=failed", "/health/live", "/health/ready", "/metrics":
        assert staff_api.get(url).status_code == 200
    assert not caplog.records
    api.get(f"/api/jobs/{uuid.uuid4()}/")
    api.get("/api/schema/")
    assert [record.msg["code"] for record in caplog.records] == [404, 200]


def test_without_a_database_the_web_is_alive_but_not_ready(client, monkeypatch):
    def refuse(*args):
        raise OperationalError("connection refused")

    monkeypatch.setattr(connection, "cursor", refuse)
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 503


@job
def double(self, number):
    return 2 * number


@pytest.fixture
def worker(transactional_db):
    """A worker for the queue "test", with the broker in the settings and the tests' database."""
    processes = []
    try:
{% for server in servers %}
        processes += dev.start_{{ server.name }}()
{% endfor %}
    except SystemExit as reason:
        pytest.skip(str(reason))
    options = "--include test_project --queues test -n test@%h"
    command = [sys.executable, "-m", *f"{{ worker_pool.command }} {options}".split()]
    name = quote(str(connection.settings_dict["NAME"]))
    # DATABASE_URL, but with the tests' database
    url = re.sub("(//[^/]*/)[^?]*", rf"\g<1>{name}", os.environ.get("DATABASE_URL", "sqlite:///"))
    folder = str(Path(__file__).parent)
    environment = {**os.environ, "DATABASE_URL": url, "PYTHONPATH": folder}
    processes.insert(0, subprocess.Popen(command, env=environment))
    yield
    for process in processes:
        process.terminate()
        process.wait()


@pytest.mark.live
def test_a_worker_runs_a_job(worker):
    """To skip it: make test ARGS="-m 'not live'"."""
    job = double.using(queue="test").enqueue(21)
    deadline = time.monotonic() + 60
    while job.state != "succeeded":
        assert time.monotonic() < deadline, job.state
        time.sleep(0.1)
        job.refresh_from_db()
    assert job.result == 42
