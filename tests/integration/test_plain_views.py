"""Each way to start a task, from each kind of view, with a broker that is up, down or hangs."""

import socket
import time

import pytest

from harness.bake import CHOICES, DEFAULTS
from harness.outputs import outputs
from harness.project import Console, free_ports, started
from harness.servers import Redis

plain = outputs(DEFAULTS)
VIEWS = """

import json
from asgiref.sync import sync_to_async
from celery import chain, chord, group
from django.contrib.auth.decorators import login_required
from django.db import transaction
from django.views import View
from rest_framework.decorators import api_view
from config.celery import app
from config.task_status import accepted
from orders.tasks import email_forecasts, forecast_demand, send_newsletter

OPTIONS = [
    {"countdown": 1}, {"eta": "2026-01-01T00:00:00+00:00"}, {"expires": 60}, {"queue": "cpu"}, {"priority": 3},
    {"retry": False}, {"headers": {"a": 1}}, {"task_id": "0b0e4b0e"}, {"ignore_result": True}, {"link": True},
    {"link_error": True}, {"time_limit": 9}, {"shadow": "x"}, {"compression": "zlib"}, {"routing_key": "io"},
]
task, callback = send_newsletter, email_forecasts.si([], "a@example.com")


def with_options(options):
    linked = {name: callback if value is True and "link" in name else value for name, value in options.items()}
    return lambda: task.apply_async([0], **linked)


WAYS = {
    "delay": lambda: task.delay(0),
    "delay_on_commit": lambda: task.delay_on_commit(0),
    "apply_async_on_commit": lambda: task.apply_async_on_commit([0]),
    "in a transaction": lambda: transaction.atomic(lambda: task.delay_on_commit(0))(),
    "signature": lambda: task.s(0).delay(),
    "send_task": lambda: app.send_task(task.name, [0]),
    "chain": lambda: chain(task.si(0), task.si(0)).delay(),
    "group": lambda: group(task.si(0), task.si(0)).delay(),
    "chord": lambda: chord([task.si(0), task.si(0)])(callback),
    "map": lambda: task.map([0, 0]).delay(),
    "starmap": lambda: task.starmap([[0], [0]]).delay(),
    "chunks": lambda: task.chunks([[0], [0]], 2).delay(),
    **{str(options): with_options(options) for options in OPTIONS},
}


def answer(request):
    result = WAYS[request.GET["way"]]()
    return accepted(request, result or task.AsyncResult("none"))


class Viewed(View):
    def post(self, request):
        return answer(request)


class Api(views.APIView if "views" in globals() else __import__("rest_framework.views").views.APIView):
    def post(self, request):
        return answer(request._request if False else request)


async def asynchronous(request):
    return await sync_to_async(answer)(request)


KINDS = {
    "function": login_required(answer),
    "class": Viewed.as_view(),
    "async": asynchronous,
    "atomic": transaction.atomic(answer),
    "api_view": api_view(["POST"])(answer),
    "APIView": Api.as_view(),
}
urlpatterns += [path(f"kinds/{kind}/", view) for kind, view in KINDS.items()]
"""
