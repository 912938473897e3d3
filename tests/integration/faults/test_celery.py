"""Jobs that Celery's own calls start, here or in another app, are jobs like any other."""

from harness.faults import on_each, ran_once


@on_each
def test_a_task_that_another_app_sends_is_a_job(stack, gate):
    send = """
from celery import Celery
from config.celery import app
result = Celery.send_task(app, "faults.tasks.hold", [gate], queue="cpu").id
"""
    job = stack.ask(send, gate=str(gate))
    stack.wait_until_started(job)
    assert stack.row(job)["state"] == "running"
    gate.touch()
    stack.wait_until_succeeded(job, crashes=0)
    assert ran_once(stack, [job])
