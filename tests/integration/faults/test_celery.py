"""Jobs that Celery's own calls start, here or in another app, are jobs like any other."""

from harness.faults import on_each, on_one, ran_once
from harness.project import wait_for


@on_one
def test_jobs_of_delay_and_apply_async_outlive_their_workers(stack, gate):
    """They are jobs like any other, and AsyncResult reads how they ended."""
    jobs = [stack.ask("result = hold.delay(gate).id", gate=str(gate))]
    code = "result = hold.apply_async([gate], queue='cpu', countdown=1).id"
    jobs.append(stack.ask(code, gate=str(gate)))
    stack.wait_until_started(*jobs)
    for worker in stack.workers:
        worker.kill()
    gate.touch()
    for worker in stack.workers:
        worker.start()
    stack.wait_until_succeeded(*jobs, crashes=1)
    assert stack.ask("result = hold.AsyncResult(job).state", job=jobs[0]) == "SUCCESS"


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


@on_one
def test_a_task_is_a_job_in_a_process_that_uses_no_view(stack):
    """A web process that has just started has not imported the tasks for a view yet."""
    send = """
from config.celery import app
print(app.send_task("faults.tasks.quick", countdown=60).id)
"""
    job = stack.project.shell(send, **stack.variables)
    assert stack.row(job)["state"] == "queued"


@on_one
def test_a_task_that_flower_sends_is_a_job(stack):
    stack.flower.start()
    _, _, sent = stack.ask_flower("/api/task/send-task/faults.tasks.quick", {"args": []})
    job = sent["task-id"]
    wait_for(lambda: stack.ask("result = Job.objects.filter(pk=job).exists()", job=job))
    stack.wait_until_succeeded(job, crashes=0)
