"""Functions declared with Django's @task, and coroutines, run as jobs on a real worker."""

import pytest

from harness.faults import on_each_pool
from harness.project import wait_for

RESULTS = """
from django_tasks import default_task_backend
def seen(id):
    found = default_task_backend.get_result(id)
    value = found.return_value if found.status == "SUCCESSFUL" else None
    errors = [error.exception_class_path for error in found.errors]
    return [found.status, value, found.attempts, errors]
"""


@pytest.mark.parametrize("function", ["hold_a_function", "hold_a_coroutine"])
@on_each_pool
def test_a_function_is_cancelled_and_runs_again_after_a_crash(stack, gate, function):
    code = "result = [function.enqueue(gate).id for _ in range(2)]"
    killed, cancelled = jobs = stack.ask(f"function = {function}\n{code}", gate=str(gate))
    stack.wait_until_started(*jobs)
    assert stack.ask("result = cancel(Job.objects.filter(pk=job))", job=cancelled) == 1
    stack.worker.kill()
    gate.touch()
    stack.worker.start()

    stack.wait_until_succeeded(killed, crashes=1)
    assert [stack.starts(job) for job in jobs] == [2, 1]
    assert stack.ask(f"{RESULTS}\nresult = [seen(id)[0] for id in ids]", ids=jobs) == [
        "SUCCESSFUL",
        "FAILED",
    ]


@on_each_pool
def test_a_cancelled_coroutine_ends(stack, gate):
    """A job, whose report() ends it: a function of Django's Tasks has none."""
    job = stack.enqueue("report_in_a_coroutine", gate, queue="cpu")
    stack.wait_until_started(job)
    stack.ask("cancel(Job.objects.filter(pk=job))", job=job)
    wait_for(lambda: stack.notes("end", job))


@on_each_pool
def test_a_coroutine_over_its_time_limit_is_cancelled_except_in_a_thread(stack, gate, request):
    job = stack.enqueue("wait_too_long", gate, queue="cpu")
    [row] = stack.wait_until_final(job)
    assert (row["state"], row["error"]) == ("failed", "Exceeded its time limit")
    in_thread = request.node.callspec.params["running"]["pool"] == "threads"
    if in_thread:
        gate.touch()
    wait_for(lambda: stack.notes("end", job) or stack.notes("cancelled", job))
    assert bool(stack.notes("end", job)) == in_thread
