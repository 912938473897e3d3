"""Queues: who makes them, which jobs they get, and how fast a worker takes from them."""

import os

from harness.faults import on_each_broker, on_one, on_rabbitmq
from harness.project import wait_for


@on_one
def test_a_job_goes_to_the_queue_of_its_task(stack):
    """Its decorator or CELERY_TASK_ROUTES names it, here `io`. enqueue(queue=…) overrides both."""
    for task in ["declared", "routed"]:
        said, overruled = stack.enqueue(task), stack.enqueue(task, queue="cpu")
        stack.wait_until_final(said, overruled)
        workers = [os.getpgid(stack.notes("start", job)[0]) for job in [said, overruled]]
        assert workers == [stack.other.pid, stack.worker.pid]


@on_rabbitmq
def test_the_first_worker_makes_the_queues_of_all(stack):
    """A task with a countdown then waits in its queue, before the first worker of the queue starts.

    Without the queue, Celery logs CRITICAL, and RabbitMQ tries to forward the task every 3 minutes.
    """
    stack.broker.control("add_vhost", "fresh")
    stack.broker.control("set_permissions", "-p", "fresh", "guest", ".*", ".*", ".*")
    url = stack.variables["CELERY_BROKER_URL"].removesuffix("/") + "fresh"
    worker = stack.make_worker("first", "--queues io", CELERY_BROKER_URL=url).start()
    assert "delayed delivery" not in worker.printed
    send = """
from config.celery import app
with app.connection_for_write(url) as broker:
    plain.circle.apply_async([".", 0], queue="cpu", countdown=1, connection=broker)
"""
    stack.ask(send, url=url)
    count = ["list_queues", "-p", "fresh", "--silent", "name", "messages"]
    wait_for(lambda: "cpu\t1\n" in stack.broker.control(*count))


@on_each_broker
def test_a_worker_whose_slots_were_full_fetches_the_next_jobs_without_a_pause(stack):
    """250 short jobs on 4 slots. By default Kombu's SQS pauses for a second after every eight."""
    jobs = stack.ask("result = [j.pk for j in enqueue_many([quick.using(queue='cpu').s()] * 250)]")
    stack.wait_until_succeeded(*jobs, crashes=0)
    code = """
starts = sorted(Job.objects.filter(pk__in=jobs).values_list("started_at", flat=True))
result = [(later - at).total_seconds() for at, later in zip(starts, starts[1:])]
"""
    pauses = [seconds for seconds in stack.ask(code, jobs=jobs) if seconds > 0.9]
    assert len(pauses) < 15, pauses  # it would be 31
