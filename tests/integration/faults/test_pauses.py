"""A pause lasts: nothing of the queue or task starts, whatever is restarted. Then all jobs run."""

import time

import pytest

from harness.faults import on_one, on_prefork_and_threads, ran_once
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


@on_prefork_and_threads
def test_after_a_pause_jobs_start_in_order(stack):
    """With one slot."""
    stack.make_worker("one", "--queues one", WORKER_CONCURRENCY=1).start()
    stack.wait_until_final(*enqueue(stack, "quick", 1, queue="one"))
    stack.ask("pauses.pause('one')")
    jobs = enqueue(stack, "quick", 60, queue="one")
    wait_until_put_back(stack, "one", 60)
    time.sleep(2)
    assert not started(stack, jobs)
    stack.ask("pauses.resume('one')")
    stack.wait_until_final(*jobs)
    assert started(stack, jobs) == jobs


@on_one
def test_messages_of_paused_jobs_do_not_circle(stack):
    """Each is delivered once, then its job is put back: the number of deliveries does not grow."""
    size = stack.worker.log.stat().st_size
    stack.ask("pauses.pause('faults.tasks.quick')")
    jobs = enqueue(stack, "quick", 50)
    wait_until_put_back(stack, "faults.tasks.quick", 50)
    time.sleep(3)

    def deliveries():
        lines = stack.worker.log.read_bytes()[size:].splitlines()
        return sum(b"task_started" in line and b"tasks.quick" in line for line in lines)

    seen = deliveries()
    assert seen >= 50
    time.sleep(3)
    assert deliveries() == seen
    assert not stack.messages_in("cpu")
    assert not started(stack, jobs)
    stack.wait_until_succeeded(*enqueue(stack, "read", 5, "x"), crashes=0)  # of the same queue
    stack.ask("pauses.resume('faults.tasks.quick')")
    stack.wait_until_succeeded(*jobs, crashes=0)
    assert ran_once(stack, jobs)


@on_one
def test_the_schedule_and_countdowns_continue_during_a_pause(stack):
    ticks = "Job.objects.filter(task='faults.tasks.tick')"
    stack.ask(f"pauses.pause('faults.tasks.tick')\n{ticks}.delete()")
    stack.replace_beat(FAULT="every_second")
    waiting = f"result = {ticks}.filter(state='queued').count()"
    wait_for(lambda: stack.ask(waiting) > 2)
    late = stack.enqueue("quick", countdown=1)
    stack.wait_until_final(late)
    assert not stack.ask(f"result = {ticks}.filter(started_at__isnull=False).count()")
    stack.ask("pauses.resume('faults.tasks.tick')")
    wait_for(lambda: stack.ask(f"result = {ticks}.filter(state='succeeded').count()") > 2)


@on_one
def test_a_paused_job_occupies_no_slot(stack, gate):
    """Two tasks share the only slot. One of them is paused, also while it waits for the slot."""
    key = f"one:{gate.parent.name}"
    first = stack.enqueue("limited", key, gate)
    wait_for(lambda: started(stack, [first]))
    paused = enqueue(stack, "limited", 5, key)
    others = enqueue(stack, "report_until", 3, key, gate)
    stack.ask("pauses.pause('faults.tasks.limited')")
    gate.touch()
    stack.wait_until_final(first, *others)
    more = enqueue(stack, "limited", 5, key)
    last = enqueue(stack, "report_until", 3, key, gate)
    stack.wait_until_final(*last)
    wait_until_put_back(stack, "faults.tasks.limited", 10)
    stack.ask("pauses.resume('faults.tasks.limited')")
    stack.wait_until_succeeded(*paused, *more, crashes=0)
    assert started(stack, paused + more) == paused + more
