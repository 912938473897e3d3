"""Each way to start a task, from each kind of view, with a broker that is up, down or hangs."""

import re
import socket

import pytest

from harness.bake import CHOICES, DEFAULTS
from harness.outputs import outputs
from harness.project import Console, started

each_broker = outputs(*({**DEFAULTS, "broker": broker} for broker in CHOICES["broker"]))
VIEWS = """
import json
from datetime import timedelta
from asgiref.sync import sync_to_async
from celery import chain, chord, group
from django.contrib.auth.decorators import login_required
from django.db import transaction
from django.http import JsonResponse
from django.utils import timezone
from django.views import View
from rest_framework.decorators import api_view
from rest_framework.views import APIView
from config.celery import app
from config.middleware import UNAVAILABLE
from api.views import accepted
from orders.tasks import email_forecasts, write_report as task

callback = email_forecasts.si([], "a@example.com")
OPTIONS = [
    {"countdown": 0.5},
    {"eta": timezone.now() + timedelta(hours=1)},
    {"expires": 60},
    {"queue": "cpu"},
    {"routing_key": "io"},
    {"priority": 3},
    {"retry": False},
    {"headers": {"a": 1}},
    {"task_id": "0b0e4b0e"},
    {"link": callback},
    {"link_error": callback},
    {"time_limit": 9, "soft_time_limit": 8},
    {"shadow": "x"},
    {"compression": "zlib"},
]
WAYS = {
    "delay": lambda: task.delay(0),
    "delay_on_commit": lambda: task.delay_on_commit(0),
    "apply_async_on_commit": lambda: task.apply_async_on_commit([0]),
    "signature": lambda: task.s(0).delay(),
    "send_task": lambda: app.send_task(task.name, [0]),
    "chain": lambda: chain(task.si(0), task.si(0)).delay(),
    "group": lambda: group(task.si(0), task.si(0)).delay()[0],
    "chord": lambda: chord([task.si(0), task.si(0)])(callback),
    "map": lambda: task.map([0, 0]).delay(),
    "starmap": lambda: task.starmap([[0], [0]]).delay(),
    "chunks": lambda: task.chunks([[0], [0]], 2).delay()[0],
}
for options in OPTIONS:
    WAYS[" ".join(options)] = lambda options=options: task.apply_async([0], **options)


def read(request):
    return JsonResponse(json.loads(request.body))


def answer(request):
    result = WAYS[request.GET["way"]]()
    return accepted(request, result or task.AsyncResult("none"))


class Viewed(View):
    def post(self, request):
        return answer(request)


class Api(APIView):
    def post(self, request):
        return answer(request)


async def asynchronous(request):
    return await sync_to_async(answer)(request)


def own(request):
    raise next(error for error in UNAVAILABLE if not error.__module__.startswith("kombu"))


KINDS = {
    "function": answer,
    "login": login_required(answer),
    "class": Viewed.as_view(),
    "async": asynchronous,
    "atomic": transaction.atomic(answer),
    "api_view": api_view(["POST"])(answer),
    "APIView": Api.as_view(),
}
urlpatterns += [path(f"kinds/{kind}/", view) for kind, view in KINDS.items()]
urlpatterns += [path("kinds/json/", read), path("kinds/own/", own)]
"""
CLIENT = """
import time
from django.test import Client
from orders.models import Newsletter, Order
from users.models import User
user, _ = User.objects.get_or_create(username="user", is_staff=True, is_superuser=True)
client = Client(raise_request_exception=False, headers={"host": "localhost"})
client.force_login(user)
"""
SEND = """
result = []
for kind, way in pairs:
    start = time.monotonic()
    answer = client.post(f"/kinds/{kind}/", query_params={"way": way})
    result.append([answer.status_code, time.monotonic() - start < 20, kind, way])
"""
ACT = """
data = {"action": action, "_selected_action": [1]}
Order.objects.get_or_create(pk=1, owner=user, product="Tea")
Newsletter.objects.get_or_create(pk=1)
answer = client.post(f"/admin/orders/{model}/?q=a", data, follow=True)
result = [answer.redirect_chain, "tasks are unavailable" in answer.content.decode()]
"""
ACTIONS = [("order", "forecast_demand"), ("order", "check_stock"), ("newsletter", "send")]


@pytest.fixture(scope="module")
def console(project, tmp_path_factory):
    """A function that starts a console of the project, with more variables."""
    folder, consoles = tmp_path_factory.mktemp("views"), []
    project.append("config/urls.py", VIEWS)
    database = {"DATABASE_URL": f"sqlite:///{folder}/db.sqlite3"}
    project.manage("migrate", "-v0", **database)

    def start(**variables):
        consoles.append(Console(project, folder / "log", **database, **variables).start())
        return consoles[-1]

    yield start
    for each in consoles:
        each.end()


@pytest.fixture(scope="module")
def hanging():
    """The port of a server that accepts connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as server:
        yield server.getsockname()[1]


def send(console, pairs):
    """Use these views in these ways. Return the status of each, and whether it came soon."""
    return console.ask(f"{CLIENT}pairs = {pairs!r}{SEND}")


def every_pair(console):
    """Return each kind of view with each way to start a task."""
    pairs = "[(kind, way) for kind in urls.KINDS for way in urls.WAYS]"
    return console.ask(f"from config import urls; result = {pairs}")


def act(console):
    """Run each action of the admin. Return whether it said that it could not."""
    said = []
    for model, action in ACTIONS:
        [[url, status]], unavailable = console.ask(
            f"{CLIENT}model, action = {model!r}, {action!r}{ACT}"
        )
        assert (url, status) == (f"/admin/orders/{model}/?q=a", 302)
        said.append(unavailable)
    return said


@each_broker
def test_every_view_sends_a_task_in_every_way(addresses, console, project, tmp_path):
    command, log = "celery -A config worker", tmp_path / "worker.log"
    with started(project.process(command, log, says=" ready.", **addresses)):
        pass  # it has declared where RabbitMQ keeps countdowns
    up = console(**addresses)
    found = send(up, every_pair(up))
    assert [each for each in found if each[0] != 202] == []
    assert act(up) == [False] * 3


@pytest.mark.promise("A failing broker doesn't take your site down")
@each_broker
def test_without_a_broker_every_view_answers_503(console, project):
    down = console(**project.free_servers())
    found = send(down, every_pair(down))
    assert [each for each in found if each[:2] != [503, True]] == []
    assert act(down) == [True] * 3


@pytest.mark.promise("A failing broker doesn't take your site down")
@each_broker
def test_a_broker_that_hangs_is_a_503_too(console, project, hanging):
    here = {n: re.sub(r":\d+", f":{hanging}", u) for n, u in project.addresses().items()}
    stuck = console(**here)
    pairs = [pair for pair in every_pair(stuck) if "function" in pair or "delay" in pair]
    found = send(stuck, pairs)
    assert [each for each in found if each[:2] != [503, True]] == []
    assert act(stuck) == [True] * 3


@each_broker
def test_an_error_of_a_client_of_ones_own_is_not_the_brokers(console):
    assert console().ask(CLIENT + 'result = client.get("/kinds/own/").status_code') == 500


DEEP = """
bodies = ["[" * 100_000, '{"product": %s1%s}' % ("[" * 5000, "]" * 5000), '{"a":' * 5000]
post = lambda path, body: client.post(path, body, content_type="application/json").status_code
result = [post(path, body) for path in ("/api/orders/", "/kinds/json/") for body in bodies]
"""


@each_broker
def test_json_that_is_nested_too_deeply_is_refused(console, project):
    """By a view of DRF and by one of Django."""
    assert console().ask(CLIENT + DEEP) == [400] * 6
