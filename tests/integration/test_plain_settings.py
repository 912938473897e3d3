"""Each setting of Celery in a plain project does what its comment says.

test_plain_faults.py tests those that matter only if something fails. To see which tests fail
without a setting, name it: WITHOUT=CELERY_TASK_ROUTES make prove ARGS="-k plain_settings"
"""

import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode

import psutil

from harness.plain import FLOWER_USER, stacks
from harness.project import connects, free_ports, wait_for
from harness.servers import Process

on_redis = stacks(["redis"], ["prefork"], group="settings")
on_redis_gevent = stacks(["redis"], ["gevent"], group="settings")
on_rabbitmq = stacks(["rabbitmq"], ["prefork"], group="settings")
PASSWORD = "only-this-test-knows"


def replace_worker(stack, options="", **variables):
    """Start a worker with these options in place of the stack's, until the test ends."""
    stack.worker.stop()
    worker = stack.make_worker("other", options, **variables)
    worker.start()
    return worker


def pids(stack, tasks):
    """Return the ids of the processes that ran these tasks."""
    for task in tasks:
        stack.wait_until_started(task)
    return {stack.notes("start", task)[0][0] for task in tasks}


def state(stack, task):
    return stack.ask(f"result = AsyncResult({task!r}).state")


def error(stack, task):
    """Wait until a task has failed. Return the name of its exception."""
    wait_for(lambda: state(stack, task) == "FAILURE")
    return stack.ask(f"result = type(AsyncResult({task!r}).result).__name__")


# Tasks


@on_redis
def test_time_limits_end_tasks(plain, gate):
    replace_worker(plain, TASK_TIME_LIMIT=4)
    code = f"""
from trials.tasks import hold, stubborn
print(hold.delay({str(gate)!r}), stubborn.delay())
"""
    # A message has the limits of its sender.
    environment = {**plain.variables, "TASK_TIME_LIMIT": 4}
    task, stubborn = plain.project.manage("shell", "-v0", "-c", code, **environment).split()[-2:]
    assert error(plain, task) == "SoftTimeLimitExceeded"
    assert error(plain, stubborn) == "TimeLimitExceeded"
    assert len(plain.notes("soft", stubborn)) == 1
    [pid] = pids(plain, [stubborn])
    wait_for(lambda: not psutil.pid_exists(pid))


@on_redis
def test_a_long_task_keeps_no_other_waiting_in_its_worker(plain, gate):
    # The second worker must not get the long task, too.
    replace_worker(plain, "--concurrency 1", REDELIVERY=600)
    plain.wait_until_started(plain.send("wait", gate))
    others = [plain.send("quick") for _ in range(3)]
    time.sleep(2)  # time to fetch more
    plain.make_worker("second", "--concurrency 1", REDELIVERY=600).start()
    assert pids(plain, others)


@on_redis
def test_a_task_goes_to_the_queue_of_its_kind_of_load(plain):
    """The worker consumes only `cpu`."""
    replace_worker(plain, "--queues cpu")
    code = """
from orders.models import Order
from users.models import User
from orders.tasks import forecast_demand
Order.objects.create(owner=User.objects.first(), product="Milk", quantity=2)
result = forecast_demand.delay("Milk", rounds=10).get(timeout=300)
"""
    assert plain.ask(code).startswith("Milk: 60")


@on_redis
def test_a_pickle_is_not_loaded(plain):
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
    path = plain.folder / "loaded"
    plain.ask(code, path=str(path))
    plain.wait_until_started(plain.send("quick"))
    wait_for(lambda: "Refusing to deserialize" in plain.worker.printed)
    assert not path.exists() and plain.worker.is_running()


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "naming a class that is gone": lambda data: data.replace(b"celery.sch", b"celery.sxh"),
    "zeros": lambda data: bytes(len(data)),
}


@on_redis
def test_beat_starts_whatever_its_schedule_file_holds(plain, tmp_path):
    ticked = plain.folder / "ticked"
    beat = plain.process(f"celery -A config beat -s {tmp_path}/beat", name="other-beat")

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
def test_flower_shows_how_many_tasks_wait_in_each_queue_without_a_worker(plain):
    """Flower and others expect that the setting is a list of Queue objects."""
    plain.worker.stop()
    plain.send("quick", queue="cpu")
    flower = plain.process("celery -A config flower", "other-flower")
    flower.is_ready = plain.flower.is_ready
    flower.start()
    status, _, answer = plain.ask_flower("GET", "/api/queues/length")
    lengths = {queue["name"]: queue["messages"] for queue in answer["active_queues"]}
    assert status == 200 and lengths.keys() >= {"celery", "cpu", "io"} and lengths["cpu"] == 1


# Results


@on_redis
def test_a_client_sees_that_a_task_is_running(plain, gate):
    task = plain.send("hold", gate)
    wait_for(lambda: state(plain, task) == "STARTED")


@on_redis
def test_results_expire_after_a_day(plain):
    task = plain.send("add", 1, 2)
    wait_for(lambda: state(plain, task) == "SUCCESS")
    code = f"result = app.backend.client.ttl(app.backend.get_key_for_task({task!r}))"
    assert 86_000 < plain.ask(code) <= 86_400


@on_redis
def test_each_key_in_redis_names_its_project(plain):
    """So that projects can share a Redis."""
    plain.ask("result = add.delay(1, 2).get(timeout=300)")
    code = """
import redis
from django.conf import settings
urls = [settings.CELERY_BROKER_URL, settings.CELERY_RESULT_BACKEND]
result = [key.decode() for url in urls for key in redis.from_url(url).keys()]
"""
    keys = plain.ask(code)
    assert keys
    assert [key for key in keys if not key.lstrip("{").startswith("my_project")] == []


CHORD = """
from celery import chord, group
from trials.tasks import add, total
numbers = [1, 2, 3]
print(group(add.s(each, 1) for each in numbers)().get(timeout=300))
print(chord(add.s(each, 1) for each in numbers)(total.s()).get(timeout=300))
"""


@on_redis
def test_tasks_and_results_may_be_in_a_redis_cluster(plain, tmp_path):
    """The keys of all queues are in one slot, and those of a chord. This cluster has one node."""
    [port] = free_ports(1)
    command = f"redis-server --port {port} --dir {tmp_path} --cluster-enabled yes"
    cluster = Process(command.split(), tmp_path / "log", is_ready=lambda: connects(port))
    cluster.start()
    try:
        redis_cli = "redis-cli", "-p", str(port), "cluster"
        subprocess.run([*redis_cli, "addslotsrange", "0", "16383"], check=True)
        info = [*redis_cli, "info"]
        wait_for(lambda: "state:ok" in subprocess.check_output(info, text=True))
        url = f"redis://127.0.0.1:{port}/0"
        variables = {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}
        replace_worker(plain, **variables)
        printed = plain.project.manage("shell", "-v0", "-c", CHORD, **plain.variables | variables)
        assert printed.split("\n")[-3:-1] == ["[2, 3, 4]", "9"]
    finally:
        cluster.kill()


# Workers


@on_redis
def test_a_child_process_is_replaced_after_a_thousand_tasks(plain):
    replace_worker(plain, "--concurrency 1")
    tasks = plain.ask("result = [quick.delay().id for _ in range(1001)]")
    # Tasks that other tests have left may run in between, so the child may end a few tasks earlier.
    assert len(pids(plain, [tasks[0], tasks[900]])) == 1
    assert len(pids(plain, tasks[900:])) == 2


@on_redis
def test_a_child_process_that_needs_much_memory_is_replaced(plain):
    replace_worker(plain, "--concurrency 1", WORKER_MAX_KILOBYTES=1)
    assert len(pids(plain, [plain.send("quick") for _ in range(3)])) == 3


@on_redis
def test_tasks_reuse_a_database_connection(plain):
    replace_worker(plain, "--concurrency 1")
    code = "result = [find_connection.delay().get(timeout=300) for _ in range(3)]"
    assert len(set(plain.ask(code))) == 1


@on_redis
def test_a_worker_waits_for_its_broker(plain):
    plain.worker.stop()
    plain.broker.kill()
    plain.worker.launch()
    wait_for(lambda: "Cannot connect to" in plain.worker.printed)
    plain.broker.start()
    plain.worker.wait_until_ready()
    plain.wait_until_started(plain.send("quick"))


@on_redis_gevent
def test_each_of_many_greenlets_acknowledges_its_task(plain, gate):
    """kombu's own limit of ten connections would lose acknowledgements."""
    worker = replace_worker(plain, WORKER_CONCURRENCY=200)
    tasks = [plain.send("wait", gate) for _ in range(200)]
    pids(plain, tasks)
    gate.touch()
    for task in tasks:
        wait_for(lambda task=task: plain.notes("end", task))
    code = """
with app.connection_for_write() as broker:
    channel = broker.default_channel
    result = channel.client.hlen(channel.unacked_key)
"""
    wait_for(lambda: plain.ask(code) == 0)
    assert "Couldn't ack" not in worker.printed


@on_redis_gevent
def test_greenlets_that_wait_for_results_share_their_connections(plain, gate):
    """Otherwise each leaves two of them open. They work again after Redis was away."""
    replace_worker(plain, WORKER_CONCURRENCY=200)
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
    first, *_, last = plain.ask(code)
    assert last < first + 50

    held = plain.send("join", "hold", gate)
    wait_for(lambda: state(plain, held) == "STARTED")
    plain.broker.kill()  # it has the results, too
    time.sleep(8)  # longer than a worker tries to read results
    plain.broker.start()
    assert plain.ask("result = join.delay('add', 1, 2).get(timeout=300)") == 3


# RabbitMQ


@on_rabbitmq
def test_queues_are_quorum_queues(plain):
    plain.send("quick", queue="reports")  # a queue that is in no setting
    printed = plain.broker.control("list_queues", "--silent", "name", "type")
    types = dict(line.split("\t") for line in printed.splitlines())
    assert {types[name] for name in ["celery", "cpu", "io", "reports"]} == {"quorum"}


@on_rabbitmq
def test_a_countdown_waits_in_rabbitmq_not_in_a_worker(plain):
    for queue in "celery", "reports":
        plain.send("quick", countdown=10, queue=queue)
    columns = "name", "messages_ready", "messages_unacknowledged"

    def waiting():
        rows = plain.broker.control("list_queues", "--silent", *columns).splitlines()
        rows = [line.split("\t") for line in rows]
        assert sum(int(unacknowledged) for *_, unacknowledged in rows) == 0
        return sum(int(ready) for name, ready, _ in rows if name.startswith("celery_delayed"))

    wait_for(lambda: waiting() == 2)


@on_rabbitmq
def test_a_message_that_rabbitmq_refuses_is_an_error(plain):
    """Thanks to publisher confirms. The queue is full."""
    plain.worker.stop()
    policy = '{"max-length": 1, "overflow": "reject-publish"}'
    plain.broker.control("set_policy", "full", "^io$", policy, "--apply-to", "queues")
    code = """
from kombu.exceptions import OperationalError
result = "all were sent"
try:
    for _ in range(50):
        quick.apply_async(queue="io")
except OperationalError:
    result = "refused"
"""
    try:
        assert plain.ask(code) == "refused"
    finally:
        plain.broker.control("clear_policy", "full")
        plain.empty("io")


@on_rabbitmq
def test_a_task_whose_connection_was_lost_does_not_run_twice_at_a_time(plain, gate):
    """RabbitMQ delivers it again at once, so Celery ends the first run."""
    task = plain.send("wait", gate)
    first = plain.wait_until_started(task)
    plain.broker.control("close_all_connections", "a test")
    plain.wait_until_started(task, times=2)
    wait_for(lambda: not psutil.pid_exists(first))
    gate.touch()
    wait_for(lambda: plain.notes("end", task))
    assert len(plain.notes("end", task)) == 1


# Passwords


@on_rabbitmq
def test_no_tool_shows_a_password(plain):
    """celery report, inspect conf and report, and Flower's pages of a worker."""
    plain.broker.control("add_user", "tester", PASSWORD)
    plain.broker.control("set_permissions", "tester", ".*", ".*", ".*")
    variables = {
        "CELERY_BROKER_URL": f"amqp://tester:{PASSWORD}@127.0.0.1:{plain.broker.port}//",
        "CACHE_URL": f"rediscache://:{PASSWORD}@127.0.0.1:1/0",
        "EMAIL_URL": f"smtp://user:{PASSWORD}@127.0.0.1:1",
        "SECRET_KEY": PASSWORD * 3,
    }
    worker = replace_worker(plain, **variables)
    flower = plain.process("celery -A config flower", "other-flower", **variables)
    flower.is_ready = plain.flower.is_ready
    flower.start()
    environment = {**plain.variables, **variables}
    celery = ".venv/bin/celery", "-A", "config"
    for command in ["report"], ["inspect", "conf"], ["inspect", "report"], ["inspect", "stats"]:
        printed = plain.project.call(*celery, *command, **environment)
        assert printed
        assert PASSWORD not in printed and "of-this-test" not in printed, command
    name = next(word for word in worker.printed.split() if word.startswith("other@"))
    url = f"{plain.flower_url}/worker/{name}"
    basic = "Basic " + b64encode(FLOWER_USER.encode()).decode()

    def shown():
        request = urllib.request.Request(url, headers={"Authorization": basic})
        try:
            with urllib.request.urlopen(request, timeout=30) as page:
                return page.read().decode()
        except urllib.error.HTTPError:  # Flower does not yet know the worker
            plain.ask_flower("GET", "/api/workers?refresh=1")
            return ""

    wait_for(lambda: "CELERY_BROKER_URL" in shown())
    page = shown()
    assert PASSWORD not in page and "of-this-test" not in page


@stacks(["rabbitmq"], ["gevent"], group="settings", every_pair=True)
def test_each_of_many_greenlets_sends_its_retry(plain):
    """Celery's own limit of ten connections would lose retries: it rejects a task that can't."""
    worker = replace_worker(plain, WORKER_CONCURRENCY=100)
    tasks = plain.ask("result = [retry_later.delay(1).id for _ in range(300)]")
    for task in tasks:
        plain.wait_until_started(task, times=2)
    assert "Timed out waiting for a broker producer" not in worker.printed
