"""What fails is seen: one event of Sentry, a log line that names the task, a test's report."""

import gzip
import json
import re

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

from harness.outputs import both_outputs, plain_output, working
from harness.project import fetch, free_ports, started, wait_for

TASKS = """
import logging
import os
import signal
from celery import shared_task

@shared_task
def fail():
    raise LookupError("of the task")

@shared_task(bind=True, max_retries=1)
def retry(self):
    raise self.retry(exc=LookupError("of the retry"), countdown=0)

@shared_task
def succeed():
    pass

@shared_task(max_retries=0)
def kill():
    os.kill(os.getpid(), signal.SIGKILL)

@shared_task
def apply():
    fail.apply()
    logging.getLogger("outer").warning("after apply")
"""
VIEWS = """
from django.http import UnreadablePostError


def broken(request):
    raise LookupError("of the view")


def hung_up(request):
    raise UnreadablePostError("the client is gone")


urlpatterns += [path("broken/", broken), path("hung-up/", hung_up)]
"""
EVENTS = ["task_started", "task_retrying", "task_failed", "task_succeeded"]


class Sentry(HTTPServer):
    """Collects the events, and the signs of life of scheduled tasks, that it is sent."""

    def __init__(self):
        super().__init__(threaded=True)
        self.kept = {"event": [], "check_in": []}
        self.expect_request("/api/1/envelope/").respond_with_handler(self.keep)

    def keep(self, request):
        is_packed = request.content_encoding == "gzip"
        body = gzip.decompress(request.data) if is_packed else request.data
        head, item = body.split(b"\n")[1:3]
        if (kind := json.loads(head)["type"]) in self.kept:
            self.kept[kind].append(json.loads(item))
        return Response()


@pytest.fixture(scope="module")
def running(project, tmp_path_factory):
    """A console, a function that reads the log lines of a worker, and what Sentry got."""
    project.append("orders/tasks.py", TASKS)
    project.append("config/urls.py", VIEWS)
    variables = {"DEBUG": "False", "ALLOWED_HOSTS": "localhost", "WORKER_CONCURRENCY": 1}

    def lines(event):
        texts = worker.printed.splitlines()
        found = [json.loads(text) for text in texts if text.startswith("{")]
        return [line for line in found if line["event"] == event]

    with Sentry() as sentry:
        variables["SENTRY_DSN"] = f"http://key@127.0.0.1:{sentry.port}/1"
        with working(project, tmp_path_factory.mktemp("logs"), **variables) as (worker, console):
            yield console, lines, sentry.kept


def send(console, task):
    code = f"from orders import tasks; result = tasks.{task}.delay().id"
    return console.ask(code)


@both_outputs
def test_each_failure_is_one_event_in_sentry(running):
    """With its exception, and the ids that log lines have."""
    console, _, kept = running
    events = kept["event"]
    events.clear()
    failed = [send(console, task) for task in ("fail", "fail", "retry")]
    wait_for(lambda: len(events) >= 3)
    for path in "/broken/", "/broken/":
        code = f"""
from django.test import Client
client = Client(raise_request_exception=False)
headers = {{"host": "localhost", "x-forwarded-proto": "https"}}
result = client.get("{path}", headers=headers).status_code
"""
        assert console.ask(code) == 500
    succeeded = send(console, "succeed")
    wait_for(lambda: succeeded in str(running[1]("task_started")))
    wait_for(lambda: len(events) >= 5)
    assert len(events) == 5, events
    assert all("LookupError" in str(event["exception"]) for event in events)
    assert {event["tags"].get("task_id") for event in events} == {*failed, None}
    assert sum("request_id" in event["tags"] for event in events) == 2
    assert not any("ip" in event["tags"] for event in events)
    send(console, "kill")  # the death of a process is an event, too
    wait_for(lambda: "WorkerLostError" in str(events[5:]))
    assert len(events) == 7, events[5:]


@both_outputs
def test_a_scanner_and_a_client_that_hangs_up_are_no_events(running):
    console, _, kept = running
    events = kept["event"]
    events.clear()
    code = """
from django.test import Client
client = Client(raise_request_exception=False)
requests = ("scanner", "/"), ("localhost", "/hung-up/"), ("localhost", "/broken/")
get = lambda host, path: client.get(path, headers={"host": host, "x-forwarded-proto": "https"})
result = [get(*request).status_code for request in requests]
"""
    assert console.ask(code) == [400, 500, 500]
    wait_for(lambda: events)  # they arrive in order
    assert ["LookupError" in str(event) for event in events] == [True]


@both_outputs
def test_lines_of_a_request_with_a_token_name_its_user(running):
    """Also those of its tasks."""
    console, lines, _ = running
    code = """
from django.test import Client
from rest_framework.authtoken.models import Token
from users.models import User
user, _ = User.objects.get_or_create(username="tea", email="tea@example.com")
token, _ = Token.objects.get_or_create(user=user)
headers = {"host": "localhost", "x-forwarded-proto": "https", "authorization": f"Token {token}"}
status = Client().post("/api/orders/", {"product": "Tea"}, "application/json", headers=headers)
result = [status.status_code, user.pk]
"""
    status, pk = console.ask(code)
    assert status in (201, 202)
    wait_for(lambda: [line for line in lines("task_started") if line.get("user_id") == pk])


PROCESSES = {  # {command: what the log says once it runs}
    "gunicorn config.wsgi": "Booting worker",
    "celery -A config worker": " ready.",
    "celery -A config beat": "odd",
    "celery -A config flower": "odd",
}


@plain_output
def test_every_line_of_each_process_is_json(copied, addresses, tmp_path):
    """Warnings, and those of a scanner, too. A client's header changes no path."""
    copied.append("orders/tasks.py", '\nimport warnings\nwarnings.warn("odd")\n')
    [quiet] = re.findall("CELERY_QUIET=.*", copied.read("Dockerfile"))
    port, flower = free_ports(2)
    variables = {**addresses, "DEBUG": "False", "ALLOWED_HOSTS": "localhost", "PORT": port}
    variables |= {"FLOWER_PORT": flower, **dict([quiet.split("=")])}
    variables["DATABASE_URL"] = f"sqlite:///{tmp_path}/db.sqlite3"
    copied.manage("migrate", "-v0", **variables)
    copied.manage("collectstatic", "-v0", "--noinput", **variables)
    processes = [
        copied.process(command, tmp_path / str(number), says=says, **variables)
        for number, (command, says) in enumerate(PROCESSES.items())
    ]
    web = f"http://localhost:{port}"
    https = {"X-Forwarded-Proto": "https"}
    with started(*processes):
        assert fetch(f"{web}/login/", headers=https)[0] == 200
        assert fetch(f"{web}/login/", headers={**https, "Host": "scanner"})[0] == 400
        assert fetch(f"{web}/x/login/", headers={**https, "SCRIPT_NAME": "/x"})[0] == 404
        for process in processes:
            process.stop()
    for process in processes:
        printed = process.printed.splitlines()
        # Celery's handler of SIGQUIT writes to standard output itself, because it mustn't log.
        printed = [line for line in printed if line and not line.startswith("worker: ")]
        assert [line for line in printed if not line.startswith("{")] == []
        lines = [json.loads(line) for line in printed]
        assert "odd" in str(lines)
        assert not [line for line in lines if line["level"] in ("error", "critical")]


SCHEDULED = """
from celery.beat import Scheduler
from celery.schedules import schedule
from config.celery import app
beat = Scheduler(app, lazy=True)
for name in "succeed", "fail":
    entry = beat.Entry(name=name, task=f"orders.tasks.{name}", schedule=schedule(3600), app=app)
    beat.apply_entry(entry)
result = None
"""


@both_outputs
def test_sentry_sees_how_each_scheduled_task_ends(running):
    console, _, kept = running
    console.ask(SCHEDULED)

    def ended():
        found = {(each["monitor_slug"], each["status"]) for each in kept["check_in"]}
        return found >= {("succeed", "ok"), ("fail", "error")}

    wait_for(ended)


@plain_output
def test_each_line_of_a_task_names_it(running):
    """Also that of the main process, if the task's process was killed."""
    console, lines, _ = running
    sent = {send(console, name): name for name in ("fail", "retry", "succeed", "kill")}

    def found(event):
        return [line for line in lines(event) if line["task_id"] in sent]

    wait_for(lambda: len(found("task_failed")) == 3 and found("task_succeeded"))
    for event in EVENTS:
        assert found(event)
        for line in found(event):
            assert line["task"] == f"orders.tasks.{sent[line['task_id']]}", line
    failed = found("task_failed")
    assert all(line["error"] and line["exception"] for line in failed)
    assert all("duration_ms" in line for line in failed if sent[line["task_id"]] != "kill")


LOG = """
import logging
import sys
import structlog
logging.getLogger().handlers[0].setStream(sys.stdout)
structlog.get_logger().exception("task_failed", exception=TimeoutError("time is up"))
logging.getLogger("own").warning("said", extra={"order_id": 77})
"""


@plain_output
@pytest.mark.parametrize("debug", ["True", "False"])
def test_time_limits_and_the_fields_of_extra_are_logged(project, debug):
    """A time limit is logged by the worker's main process, outside of any `except`."""
    printed = project.manage("shell", "-v0", "-c", LOG, DEBUG=debug, ALLOWED_HOSTS="localhost")
    assert re.search("TimeoutError: time is up.*order_id.*77", printed, re.DOTALL), printed


@plain_output
def test_after_apply_the_lines_of_a_task_have_its_own_id(running):
    console, lines, _ = running
    sent = send(console, "apply")
    [line] = wait_for(lambda: lines("after apply"))
    assert (line["task_id"], line["task"]) == (sent, "orders.tasks.apply")
    wait_for(lambda: [line for line in lines("task_succeeded") if line["task_id"] == sent])


TEST = """
def test_it():
    from orders.tasks import fail
    fail.delay()
    assert False
"""


@plain_output
def test_the_report_of_a_test_shows_why_a_task_failed(running, project):
    (project / "tests/test_own.py").write_text(TEST)
    with pytest.raises(AssertionError, match="LookupError: of the task"):
        project.call(".venv/bin/python", "-m", "pytest", "-q", "tests/test_own.py")
