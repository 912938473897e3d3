"""The broker is unavailable, hangs, loses messages or refuses them: no job is lost.

The headings are those of "The broker" in reliability.md.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from harness.faults import (
    POOLS,
    on_each_broker,
    on_rabbitmq,
    on_sqs,
    ran_once,
    stacks,
    without_resends,
)
from harness.project import wait_for
from harness.stack import RESEND

# The broker is unavailable or hangs


def check_tries(stack, start):
    """After a failure, a web process pauses for ten seconds. Each thread may be trying by then."""
    tries = stack.web.printed.count("Could not publish")
    assert 0 < tries <= 16 * (1 + (time.monotonic() - start) // 10), stack.web.printed


@stacks(every_pair=True)
def test_jobs_outlive_their_broker(stack, gate, tmp_path):
    """Task functions continue; retried and new jobs run as soon as the broker is back."""
    later = tmp_path / "later"
    sizes = {worker.log: worker.log.stat().st_size for worker in stack.workers}
    ends_without = stack.enqueue("hold", gate, queue="cpu")
    retries_without = stack.enqueue("hold_then_retry", gate, queue="io")
    ends_after = stack.enqueue("hold", later, queue="io")
    stack.wait_until_started(ends_without, retries_without, ends_after)
    stack.renew_web()
    with stack.supervised(*stack.workers):
        stack.broker.kill()
        start = time.monotonic()
        ids = stack.post_many(50, "quick")
        check_tries(stack, start)
        gate.touch()
        stack.wait_until_final(ends_without)
        stack.broker.start()
        start = time.monotonic()
        later.touch()
        jobs = [ends_without, retries_without, ends_after, *ids]
        stack.wait_until_succeeded(*jobs, crashes=0)
    starts = [stack.starts(job) for job in jobs]
    # On gevent, a worker ends if queues are missing for a moment, as they are after a restart of
    # moto. It releases the job of a task function that has not ended soon after.
    has_ended = any(b"Unrecoverable error" in log.read_bytes()[sizes[log] :] for log in sizes)
    assert starts in ([1, 2, 1, *[1] * 50], [1, 2, 1 + has_ended, *[1] * 50])


# Not with gevent: its worker ends, and must be restarted, if queues are missing for a moment, as
# they are after a restart of moto.
@stacks(pools=[pool for pool in POOLS if pool != "gevent"])
def test_idle_workers_outlive_their_broker(stack):
    processes = [worker.pid for worker in stack.workers]
    stack.broker.kill()
    time.sleep(4)  # several polls
    stack.broker.start()
    jobs = [stack.enqueue("quick", queue=name) for name in ["cpu", "io"]]
    stack.wait_until_succeeded(*jobs, crashes=0)
    assert [worker.pid for worker in stack.workers if worker.is_running()] == processes


@pytest.mark.promise("Requests wait five seconds at most")
@on_each_broker
def test_a_broker_that_hangs_delays_no_request(stack):
    """All requests are answered while it is paused."""
    stack.renew_web()
    stack.broker.pause()
    start = time.monotonic()
    jobs = stack.post_many(50, "quick")
    check_tries(stack, start)

    stack.broker.resume()
    with stack.supervised(*stack.workers):
        stack.wait_until_succeeded(*jobs, crashes=0)
    assert ran_once(stack, jobs)


# The broker loses its messages


@pytest.mark.promise("Accepted means stored")
@on_each_broker
def test_an_emptied_broker_loses_no_job(stack):
    """While the broker has their messages, almost none is sent again."""
    stack.other.stop()
    jobs = [stack.enqueue("quick", queue="io") for _ in range(20)]
    time.sleep(RESEND + 1)
    # A message that is being sent may look missing.
    assert 20 <= stack.messages_in("io") < 25
    stack.beat.pause()
    stack.empty("io")
    assert stack.messages_in("io") == 0

    stack.beat.resume()
    stack.other.start()
    stack.wait_until_succeeded(*jobs, crashes=0)
    assert ran_once(stack, jobs)


# A worker takes messages before it runs them


def ask_redis(stack, result):
    code = f"""
from config.celery import app
from kombu.utils.json import loads
with app.connection_for_write() as broker:
    channel = broker.default_channel
    result = {result}
"""
    return stack.ask(code)


@stacks(brokers=["redis"])
def test_redis_has_no_copy_of_a_job_that_a_worker_has_taken(stack, gate):
    """A plain task has one until it is acknowledged."""
    copies = 'channel.client.hlen("unacked")'
    stack.beat.pause()  # it sends waiting jobs again, so that the queue might never get shorter
    jobs = [stack.enqueue("hold", gate, queue="cpu") for _ in range(100)]
    wait_for(lambda: stack.messages_in("cpu") < 95)
    assert ask_redis(stack, copies) == 0
    gate.touch()
    stack.wait_until_final(*jobs)
    gate.unlink()
    task = stack.send("plain.wait", gate, queue="cpu")
    stack.wait_until_started(task)
    assert ask_redis(stack, copies) == 1


@without_resends
def test_redis_gets_back_each_message_that_is_not_acknowledged(stack):
    """For example, when a worker ends."""
    code = """
from config.celery import app
with app.connection_for_read() as broker:
    taken, queue = [], app.amqp.queues["nobody"](broker.default_channel)
    with broker.Consumer(queue, on_message=taken.append, prefetch_count=4):
        while len(taken) < 4:
            broker.drain_events(timeout=10)
    taken[0].ack()
    taken[1].requeue()
    taken[2].reject()
    broker.default_channel.close()
result = [message.headers["id"] for message in taken]
"""
    for send, task in (stack.enqueue, "hold"), (stack.send, "plain.wait"):
        sent = [send(task, ".", queue="nobody") for _ in range(5)]
        taken = stack.ask(code)
        [rest] = set(sent) - set(taken)
        queue = 'channel.client.lrange(channel.global_keyprefix + "nobody", 0, -1)'
        left = ask_redis(stack, f'[loads(text)["headers"]["id"] for text in {queue}]')
        assert left == [taken[1], rest, taken[3]]  # the last one is the next
        stack.empty("nobody")


# The broker refuses a message


@on_sqs
def test_arguments_too_large_for_the_broker_are_refused_at_enqueue(stack):
    """The broker accepts the largest allowed ones, even with a limit of 256 KiB for a message."""
    limit = """
import boto3
from django.conf import settings
sqs = boto3.client("sqs")
url = settings.CELERY_BROKER_TRANSPORT_OPTIONS["predefined_queues"]["cpu"]["url"]
sqs.set_queue_attributes(QueueUrl=url, Attributes={"MaximumMessageSize": str(limit)})
"""
    code = """
def enqueue_largest(letter):
    for size in range(120_000 // len(json.dumps(letter)), 0, -100):
        try:
            return enqueue(read, [letter * size], queue="cpu").pk
        except ValueError as error:
            assert "pass an id" in str(error), error
result = [enqueue_largest(letter) for letter in ["x", "é", "😀", '"']]
"""
    stack.ask(limit, limit=2**18)
    try:
        stack.wait_until_succeeded(*stack.ask(code), crashes=0)
    finally:
        stack.ask(limit, limit=2**20)


# A queue is full


def small(stack, queue, length):
    """Have RabbitMQ refuse messages while this queue is full."""
    policy = f'{{"max-length": {length}, "overflow": "reject-publish"}}'
    words = "set_policy", "small", f"^{queue}$", policy, "--apply-to", "queues"
    return stack.broker.policy("small", *words)


@on_rabbitmq
def test_jobs_that_a_full_queue_refused_run_when_it_has_room(stack, gate):
    """They run soon: however long it was full, the next try is RESEND seconds away."""
    running = [stack.enqueue("hold", gate, queue="cpu") for _ in range(4)]
    stack.wait_until_started(*running)
    pauses = """
refused = Job.objects.filter(pk__in=jobs, times_sent=0).annotate(pause=F("send_at") - Now())
result = [job.pause.total_seconds() for job in refused]
"""
    seen = []
    with small(stack, "cpu", 5):
        jobs = [stack.enqueue("quick", queue="cpu") for _ in range(13)]
        for _ in range(16):  # meanwhile some are refused several times
            time.sleep(1)
            seen += stack.ask(pauses, jobs=jobs)
        gate.touch()
        stack.wait_until_succeeded(*running, *jobs, crashes=0)
    assert max(seen) < RESEND + 1


@on_rabbitmq
def test_a_full_queue_fails_no_job(stack):
    """It accepts others all the time, but refuses each job several times."""
    with small(stack, "cpu", 2):
        jobs = [stack.enqueue("rest", 0.5, queue="cpu") for _ in range(150)]
        stack.wait_until_succeeded(*jobs, crashes=0)


# Redis fails over


@contextmanager
def posting(stack):
    """Post jobs until the block ends; yield the list of all that post_many() has returned."""
    posted, done = [], threading.Event()

    def post():
        while not done.is_set():
            posted.extend(stack.post_many(2, "quick"))

    with ThreadPoolExecutor(1) as thread:
        ending = thread.submit(post)
        try:
            yield posted
        finally:
            done.set()
        ending.result()


with_sentinel = stacks(brokers=["redis-sentinel"], pools=POOLS[:1])


@with_sentinel
def test_jobs_and_results_outlive_a_failover(stack, gate):
    """With Sentinel, TLS and passwords; requests are answered while there is no master."""
    ask_for_a_result = "sent = plain.add.delay(1, 2)\nsent.get(timeout=20)\nresult = sent.state"
    assert stack.ask(ask_for_a_result) == "SUCCESS"
    stack.renew_web()
    runs = stack.enqueue("hold", gate, queue="cpu")
    stack.wait_until_started(runs)
    what_flower_shows = """
from config.celery import app
workers = app.control.inspect(timeout=5)
result = [workers.stats() or {}, workers.conf(with_defaults=True) or {}]
"""
    with stack.supervised(*stack.workers):  # a worker that held a message may end
        with posting(stack) as posted:
            wait_for(lambda: len(posted) > 20)
            master, count = stack.broker.master, len(posted)
            stack.broker.set_failover_delay(600)  # seconds: no failover yet
            master.kill()
            wait_for(lambda: len(posted) > count + 20)
            stack.broker.set_failover_delay(2)
            wait_for(lambda: stack.broker.master is not master)
            stack.wait_until_final(stack.enqueue("quick", queue="io"))
            gate.touch()
        jobs = [runs, *posted]
        stack.wait_until_succeeded(*jobs, crashes=0)
        assert stack.ask(ask_for_a_result) == "SUCCESS"
        wait_for(lambda: [len(each) for each in stack.ask(what_flower_shows)] == [2, 2])
    assert ran_once(stack, jobs)
    shown = str(stack.ask(what_flower_shows))
    assert "of/" not in shown and "of%2F" not in shown  # the passwords


@with_sentinel
def test_sentinel_without_the_name_of_its_master_is_refused(running):
    variables = {**running.variables, "REDIS_SENTINEL_MASTER": ""}
    with pytest.raises(AssertionError, match='"REDIS_SENTINEL_MASTER" invalid'):
        running.project.manage("check", **variables)
