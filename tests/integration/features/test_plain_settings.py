"""Each setting of Celery in a plain project does what its comment says.

test_plain_faults.py tests those that matter only if something fails. To see which tests fail
without a setting, name it: WITHOUT=CELERY_TASK_ROUTES make prove ARGS="-k plain_settings"
"""

import re
import time
from functools import partial

import psutil
import pytest

from harness import faults
from harness.project import started, wait_for
from harness.servers import Redis

stacks = partial(faults.stacks, plain="plain-settings-")
on_redis = stacks(["redis"], ["prefork"])
on_redis_gevent = stacks(["redis"], ["gevent"])
on_rabbitmq = stacks(["rabbitmq"], ["prefork"])
PASSWORD = "only-this-test-knows"


def pids(stack, tasks):
    """Return the ids of the processes that ran these tasks."""
    stack.wait_until_started(*tasks)
    return {stack.notes("start", task)[0] for task in tasks}


def state(stack, task):
    return stack.ask(f"result = AsyncResult({task!r}).state")


def error(stack, task):
    """Wait until a task has failed. Return the name of its exception."""
    wait_for(lambda: state(stack, task) == "FAILURE")
    return stack.ask(f"result = type(AsyncResult({task!r}).result).__name__")


# Tasks


@on_redis
def test_time_limits_end_tasks(stack, gate):
    limit = {"TASK_TIME_LIMIT": 20}
    stack.replace_worker(**limit, VISIBILITY_SECONDS=600)
    code = f"""
from trials.tasks import stubborn, wait
print(wait.apply_async([{str(gate)!r}], ignore_result=False), stubborn.delay())
"""
    # A message has the limits of its sender.
    environment = {**stack.variables, **limit}
    task, stubborn = stack.project.manage("shell", "-v0", "-c", code, **environment).split()[-2:]
    assert error(stack, task) == "SoftTimeLimitExceeded"
    assert error(stack, stubborn) == "TimeLimitExceeded"
    assert len(stack.notes("soft", stubborn)) == 1
    [pid] = pids(stack, [stubborn])
    wait_for(lambda: not psutil.pid_exists(pid))


@on_redis
def test_a_long_task_keeps_no_other_waiting_in_its_worker(stack, gate):
    # The second worker must not get the long task, too.
    stack.replace_worker("--concurrency 1", VISIBILITY_SECONDS=600)
    stack.wait_until_started(stack.send("wait", gate))
    others = [stack.send("quick") for _ in range(3)]
    time.sleep(2)  # time to fetch more
    stack.make_worker("second", "--concurrency 1", VISIBILITY_SECONDS=600).start()
    assert pids(stack, others)


@on_redis
def test_a_task_goes_to_the_queue_of_its_kind_of_load(stack):
    """The worker consumes only `cpu`."""
    stack.replace_worker("--queues cpu")
    code = """
from orders.models import Order
from users.models import User
from orders.tasks import forecast_demand
Order.objects.create(owner=User.objects.first(), product="Milk", quantity=2)
result = forecast_demand.delay("Milk", rounds=10).get(timeout=300)
"""
    assert stack.ask(code).startswith("Milk: 60")


@on_redis
def test_a_pickle_is_not_loaded(stack):
    """It would run any code. Celery logs it, and the worker continues."""
    code = """
class Evil:
    def __reduce__(self):
        return open, (path, "w")

from kombu.serialization import enable_insecure_serializers
enable_insecure_serializers(["pickle"])
with app.connection_for_write() as broker:
    args = [[Evil()], {}, {}]
    headers = {"task": "trials.tasks.quick", "id": "evil", "lang": "py"}
    broker.Producer().publish(args, "celery", serializer="pickle", headers=headers)
result = None
"""
    path = stack.folder / "loaded"
    stack.ask(code, path=str(path))
    stack.wait_until_started(stack.send("quick"))
    wait_for(lambda: "Refusing to deserialize" in stack.worker.printed)
    assert not path.exists() and stack.worker.is_running()


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "naming a class that is gone": lambda data: data.replace(b"celery.sch", b"celery.sxh"),
    "zeros": lambda data: bytes(len(data)),
}


@on_redis
def test_beat_starts_whatever_its_schedule_file_holds(stack, tmp_path):
    ticked = stack.folder / "ticked"
    beat = stack.process(f"celery -A config beat -s {tmp_path}/beat", name="other-beat")

    def tick():
        ticked.unlink(missing_ok=True)
        beat.start()
        wait_for(lambda: ticked.exists() or not beat.is_running())
        assert beat.is_running(), beat.printed
        beat.stop()

    tick()
    good = {file: file.read_bytes() for file in tmp_path.glob("beat*")}
    assert any(b"celery.sch" in data for data in good.values())
    for damage in DAMAGES.values():
        for file, data in good.items():
            file.write_bytes(damage(data))
        tick()


@on_redis
def test_flower_shows_how_many_tasks_wait_in_each_queue_without_a_worker(stack):
    """Flower and others expect that the setting is a list of Queue objects."""
    stack.worker.stop()
    stack.send("quick", queue="cpu")
    stack.flower.start()
    status, _, answer = stack.ask_flower("/api/queues/length")
    lengths = {queue["name"]: queue["messages"] for queue in answer["active_queues"]}
    assert status == 200 and lengths.keys() >= {"celery", "cpu", "io"} and lengths["cpu"] == 1


@on_redis
def test_flower_forgets_a_killed_worker(stack):
    """Otherwise, its metric says for ever that it is online."""
    stack.project.edit("flowerconfig.py", r"^(purge_offline_workers) = \d+", r"\1 = 1")
    stack.flower.start()
    worker = stack.make_worker("other").start()

    def online():
        metrics = stack.ask_flower("/metrics")[2]
        return set(re.findall('flower_worker_online{worker="(.+?)"} 1', metrics))

    [name] = wait_for(lambda: {each for each in online() if each.startswith("other@")})
    worker.kill()
    wait_for(lambda: name not in online())


# Results


@on_redis
def test_a_client_sees_that_a_task_is_running(stack, gate):
    task = stack.send("wait", gate, ignore_result=False)
    wait_for(lambda: state(stack, task) == "STARTED")


CHORD = """
from celery import chord, group
from trials.tasks import add, total
numbers = [1, 2, 3]
print(group(add.s(each, 1) for each in numbers)().get(timeout=300))
print(chord(add.s(each, 1) for each in numbers)(total.s()).get(timeout=300))
"""

CACHE = """
from django.core.cache import cache
cache.set("trial", 1)
assert cache.get("trial") == 1
"""


@on_redis
def test_tasks_and_results_may_be_in_a_redis_cluster(stack, tmp_path):
    """The keys of all queues are in one slot, and those of a chord. This cluster has one node."""
    with started(Redis(tmp_path / "redis", options="--cluster-enabled yes")) as [cluster]:
        cluster.cli("cluster", "addslotsrange", "0", "16383")
        wait_for(lambda: "state:ok" in cluster.cli("cluster", "info"))
        url = cluster.variables["CELERY_BROKER_URL"]
        variables = {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}
        stack.replace_worker(**variables)
        printed = stack.project.manage("shell", "-v0", "-c", CHORD, **stack.variables | variables)
        assert printed.split("\n")[-3:-1] == ["[2, 3, 4]", "9"]


ADDRESSES = [
    "redis+socket://{socket}?virtual_host={number}",
    "redis://{user}@127.0.0.1:{port}/{number}",
]


@on_redis
@pytest.mark.parametrize("address", ADDRESSES)
def test_redis_may_have_a_socket_and_users(stack, tmp_path, address):
    """With the permissions that docs/production.md gives to a user."""
    path = tmp_path / "socket"
    with started(Redis(tmp_path / "redis", options=f"--unixsocket {path}")) as [redis]:
        page = stack.project.read("docs/production.md")
        [rule] = re.findall("`(ACL SETUSER .+?)`", page)
        redis.cli(*rule.split())
        user = f"{rule.split()[2]}:PASSWORD"
        url = partial(address.format, socket=path, port=redis.port, user=user)
        names = "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"
        variables = {name: url(number=number) for number, name in enumerate(names)}
        variables["CACHE_URL"] = f"redis://{user}@127.0.0.1:{redis.port}/2"
        stack.replace_worker(**variables)
        code = f"import dev; assert not [*dev.start_redis()]{CACHE}{CHORD}"
        printed = stack.project.manage("shell", "-v0", "-c", code, **stack.variables | variables)
        assert printed.split("\n")[-3:-1] == ["[2, 3, 4]", "9"]


# Workers


@on_redis
def test_a_child_process_that_needs_much_memory_is_replaced(stack):
    stack.replace_worker("--concurrency 1", WORKER_MAX_KILOBYTES=1)
    assert len(pids(stack, [stack.send("quick") for _ in range(3)])) == 3


@on_redis
def test_a_child_process_may_start_slowly(stack):
    """By default, Celery kills one that has replaced another if it takes more than four seconds."""
    stack.replace_worker("--concurrency 1 --max-tasks-per-child 1", CHILD_STARTS=6)
    assert len(pids(stack, [stack.send("quick") for _ in range(3)])) == 3


@on_redis
def test_a_worker_waits_for_its_broker(stack):
    stack.worker.stop()
    stack.broker.kill()
    stack.worker.launch()
    wait_for(lambda: "Cannot connect to" in stack.worker.printed)
    stack.broker.start()
    stack.worker.wait_until_ready()
    stack.wait_until_started(stack.send("quick"))


@on_redis_gevent
def test_each_of_many_greenlets_acknowledges_its_task(stack, gate):
    """kombu's own limit of ten connections would lose acknowledgements."""
    worker = stack.replace_worker(WORKER_CONCURRENCY=200)
    tasks = [stack.send("wait", gate) for _ in range(200)]
    pids(stack, tasks)
    gate.touch()
    for task in tasks:
        wait_for(lambda task=task: stack.notes("end", task))
    code = """
with app.connection_for_write() as broker:
    channel = broker.default_channel
    result = channel.client.hlen(channel.unacked_key)
"""
    wait_for(lambda: stack.ask(code) == 0)
    assert "Couldn't ack" not in worker.printed


@on_redis_gevent
def test_greenlets_that_wait_for_results_share_their_connections(stack, gate):
    """Otherwise each leaves two of them open. They work again after Redis was away."""
    stack.replace_worker(WORKER_CONCURRENCY=200)
    code = """
import redis
from django.conf import settings
result = []
for _ in range(4):
    tasks = [join.delay("add", number, 1) for number in range(50)]
    assert [task.get(timeout=300) for task in tasks] == list(range(1, 51))
    client = redis.from_url(settings.CELERY_RESULT_BACKEND)
    result.append(client.info("clients")["connected_clients"])
"""
    first, *_, last = stack.ask(code)
    assert last < first + 50

    held = stack.send("join", "wait", gate)
    wait_for(lambda: state(stack, held) == "STARTED")
    stack.broker.kill()  # it has the results, too
    time.sleep(8)  # longer than a worker tries to read results
    stack.broker.start()
    assert stack.ask("result = join.delay('add', 1, 2).get(timeout=300)") == 3


CANCEL = """
import random
cancelled, others = [], []
for _ in range(200):
    cancelled.append(nap.delay(random.uniform(0, 0.01), cancel=True).id)
    others += [nap.delay(random.uniform(0, 0.01)).id for _ in range(3)]
result = cancelled, others
"""


@on_redis
def test_cancelling_a_task_hits_no_other_task(stack):
    """Celery warns that revoke(terminate=True) may do that.

    Tasks are cancelled at about the moment they end, while others wait for their process.
    """
    cancelled, others = stack.ask(CANCEL)

    def noted(kind):
        return {task: words for each, task, _, _, *words in stack.lines() if each == kind}

    wait_for(lambda: {*others} <= noted("end").keys() and {*cancelled} <= noted("start").keys())
    retries = noted("start")
    assert [task for task in others if retries[task] != ["0"]] == []
    assert 0 < len(noted("end").keys() & {*cancelled}) < len(cancelled)  # some were quicker


# RabbitMQ


@on_rabbitmq
def test_queues_are_quorum_queues(stack):
    printed = stack.broker.control("list_queues", "--silent", "name", "type")
    types = dict(line.split("\t") for line in printed.splitlines())
    assert {types[name] for name in ["celery", "cpu", "io"]} == {"quorum"}


@on_rabbitmq
def test_a_countdown_waits_in_rabbitmq_not_in_a_worker(stack):
    for queue in "celery", "io":
        stack.send("quick", countdown=100, queue=queue)
    columns = "name", "messages_ready", "messages_unacknowledged"

    def waiting():
        rows = stack.broker.control("list_queues", "--silent", *columns).splitlines()
        rows = [line.split("\t") for line in rows]
        unacknowledged = sum(int(count) for *_, count in rows)
        ready = sum(int(count) for name, count, _ in rows if name.startswith("celery_delayed"))
        return ready, unacknowledged

    wait_for(lambda: waiting() == (2, 0))


@on_rabbitmq
def test_a_message_that_rabbitmq_refuses_is_an_error(stack):
    """Thanks to publisher confirms. The queue is full."""
    stack.worker.stop()
    policy = '{"max-length": 1, "overflow": "reject-publish"}'
    words = "set_policy", "full", "^io$", policy, "--apply-to", "queues"
    code = """
from kombu.exceptions import OperationalError
result = "all were sent"
try:
    for _ in range(2000):  # the policy has an effect soon
        quick.apply_async(queue="io")
except OperationalError:
    result = "refused"
"""
    with stack.broker.policy("full", *words):
        assert stack.ask(code) == "refused"
    stack.empty("io")


@on_rabbitmq
def test_a_task_whose_connection_was_lost_does_not_run_twice_at_a_time(stack, gate):
    """RabbitMQ delivers it again at once, so Celery ends the first run."""
    task = stack.send("wait", gate)
    first = stack.wait_until_started(task)
    stack.broker.control("close_all_connections", "a test")
    stack.wait_until_started(task, times=2)
    wait_for(lambda: not psutil.pid_exists(first))
    gate.touch()
    wait_for(lambda: stack.notes("end", task))
    assert len(stack.notes("end", task)) == 1


# Passwords


@on_rabbitmq
def test_no_tool_shows_a_password(stack):
    """celery report, inspect conf and report, and Flower's pages of a worker."""
    stack.broker.control("add_user", "tester", PASSWORD)
    stack.broker.control("set_permissions", "tester", ".*", ".*", ".*")
    variables = {
        "CELERY_BROKER_URL": f"amqp://tester:{PASSWORD}@127.0.0.1:{stack.broker.port}//",
        "EMAIL_HOST_PASSWORD": PASSWORD,
        "SECRET_KEY": PASSWORD * 3,
    }
    worker = stack.replace_worker(**variables)
    stack.make_flower("other-flower", **variables).start()
    environment = {**stack.variables, **variables}
    celery = ".venv/bin/celery", "-A", "config"
    name = next(word for word in worker.printed.split() if word.startswith("other@"))
    inspect = "inspect", "--timeout", "30", "-d", name
    for command in ["report"], *([*inspect, word] for word in ["conf", "report", "stats"]):
        printed = stack.project.call(*celery, *command, **environment)
        assert printed
        assert PASSWORD not in printed and "of-this-test" not in printed, command

    def shown():
        page = stack.ask_flower(f"/worker/{name}")[2]
        if not page:  # Flower does not yet know the worker
            stack.ask_flower("/api/workers?refresh=1")
        return page or ""

    wait_for(lambda: "CELERY_BROKER_URL" in shown())
    page = shown()
    assert PASSWORD not in page and "of-this-test" not in page


@stacks(["rabbitmq"], ["gevent"], every_pair=True)
def test_each_of_many_greenlets_sends_its_retry(stack):
    """Celery's own limit of ten connections would lose retries: it rejects a task that can't."""
    worker = stack.replace_worker(WORKER_CONCURRENCY=100)
    tasks = stack.ask("result = [retry_later.delay(1).id for _ in range(300)]")
    stack.wait_until_started(*tasks, times=2)
    assert "Timed out waiting for a broker producer" not in worker.printed
