{% from "chosen.jinja" import servers, worker_pool, has_example, has_flower, has_task_api with context %}
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from celery import shared_task

import dev
from config.celery import app

# The worker of this file, which imports it, has a queue of its own.
app.conf.task_create_missing_queues = True
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


@pytest.mark.parametrize("url", ["/", "/admin/", "/api/docs/"])
def test_a_page_runs_only_the_projects_own_scripts(admin_client, url):
    response = admin_client.get(url)
    assert response.status_code == 200
    assert "default-src 'self'" in response["Content-Security-Policy"]
    assert b"<script>" not in response.content


def test_everything_but_the_health_checks_requires_a_login(db, client):
    for url in "/", "/api/docs/", "/admin/":
        assert client.get(url).status_code == 302
    for url in [{{ '"/api/orders/", ' if has_example }}{{ '"/api/tasks/x/", ' if has_task_api }}"/api/schema/"]:
        assert client.get(url).status_code == 401
    for url in "/health/live", "/health/ready":
        assert client.get(url, headers={"host": "10.0.0.1"}).status_code == 200


@shared_task
def write(path, text):
    Path(path).write_text(text)


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setitem(app.conf, "task_always_eager", False)
    processes = []
    try:
{% for server in servers %}
        processes += dev.start_{{ server.name }}()
{% endfor %}
    except SystemExit as reason:
        pytest.skip(str(reason))
    command = "{{ worker_pool.command | replace("-A config", "-A test_project") }} --queues test -n test@%h"
    command = [sys.executable, "-m", *command.split()]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    processes.insert(0, subprocess.Popen(command, env=environment))
    yield
    for process in processes:
        process.terminate()
        process.wait()


@pytest.mark.live
def test_a_worker_runs_a_task(worker, tmp_path):
    """With the broker of the settings. To skip it: make test ARGS="-m 'not live'"."""
    write.apply_async([str(tmp_path / "file"), "hello"], queue="test")
    deadline = time.monotonic() + 60
    while not (tmp_path / "file").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
