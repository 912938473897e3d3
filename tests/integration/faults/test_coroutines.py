"""Coroutines run as jobs on a real worker."""

from harness.faults import on_each_pool
from harness.project import wait_for


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
