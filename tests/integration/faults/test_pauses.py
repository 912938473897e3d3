"""A pause lasts: nothing of the queue or task starts, whatever is restarted. Then all jobs run."""

import time

import pytest

from harness.faults import on_prefork_and_threads, ran_once
from harness.project import wait_for
from harness.stack import RESEND


def manage(stack, *words):
    """Run manage.py durable_jobs."""
    return stack.project.manage("durable_jobs", *words, **stack.variables)


def enqueue(stack, task, count, *args, queue="cpu"):
    code = f"""
jobs = enqueue_many([{task}.using(queue=queue).s(*args)] * count)
result = [str(job.pk) for job in jobs]
"""
    return stack.ask(code, args=[str(arg) for arg in args], count=count, queue=queue)


def wait_until_put_back(stack, name, count):
    """Wait until so many jobs of this paused name have no message."""
    ask = """
from durable_jobs.pauses import is_paused
result = Job.objects.filter(is_paused([name]), state="queued", times_sent=0).count()
"""
    wait_for(lambda: stack.ask(ask, name=name) == count)


def started(stack, jobs):
    """Return these jobs in the order in which they started, without those that have not."""
    ask = """
rows = Job.objects.filter(pk__in=jobs, started_at__isnull=False).order_by("started_at")
result = [str(pk) for pk in rows.values_list("pk", flat=True)]
"""
    return stack.ask(ask, jobs=jobs)


def check_neighbours(stack):
    """Jobs of another queue run: no message of a paused job fills a worker."""
    stack.wait_until_succeeded(*enqueue(stack, "quick", 10, queue="io"), crashes=0)


@pytest.mark.promise("A pause lasts")
@on_prefork_and_threads
def test_a_paused_queue_starts_no_job_whatever_is_restarted(stack, gate):
    running = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(running)
    before = enqueue(stack, "rest", 40, 0.05)
    wait_for(lambda: started(stack, before))
    printed = manage(stack, "pause", "cpu", "--reason", "SMTP is down")
    assert printed.startswith("cpu: Paused since ") and "SMTP is down" in printed
    time.sleep(1)  # a claim that began before may still start its job
    ran = len(started(stack, before))
    new = enqueue(stack, "quick", 5)
    check_neighbours(stack)
    wait_until_put_back(stack, "cpu", len(before) - ran + len(new))
    with stack.supervised():
        gate.touch()
        stack.wait_until_succeeded(running, crashes=0)  # running jobs end
        for process in [*stack.workers, stack.beat, stack.broker]:
            process.kill()
        stack.broker.start()
        stack.empty("cpu")
        new += enqueue(stack, "quick", 5)
        stack.database.kill()
        stack.database.start()
        check_neighbours(stack)
        wait_until_put_back(stack, "cpu", len(before) - ran + len(new))
        time.sleep(RESEND + 1)  # lost messages are sent again in this time
        assert not stack.messages_in("cpu")
        assert len(started(stack, before + new)) == ran
    manage(stack, "resume", "cpu")
    stack.wait_until_succeeded(*before, *new, crashes=0)
    assert ran_once(stack, before + new)
