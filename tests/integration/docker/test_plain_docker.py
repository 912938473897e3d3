"""Plain outputs in containers, built and started as baked."""

import json
import os
import re
import subprocess
import time

import pytest
import yaml

from harness.bake import CHOICES, DEFAULTS, covering, product
from harness.containers import (
    HTTPS,
    MANAGE,
    ComposeStack,
    brokers,
    check_rights,
    compose_config,
    composed,
    docker,
    log_of,
    running_pods,
)
from harness.outputs import ORDER, outputs
from harness.project import CONSOLE_MAIL, wait_for

STACKS = brokers("plain-docker")
on_one = pytest.mark.parametrize("stack", STACKS[:1], indirect=True)
# One broker is enough for these tests. They share them, because stacks run side by side.
on_second = pytest.mark.parametrize("stack", STACKS[1:2], indirect=True)
on_third = pytest.mark.parametrize("stack", STACKS[2:], indirect=True)
FINAL = {"SUCCESS", "FAILURE", "REVOKED"}


# A row of the table of passwords: the variable, and the command, if there is one
PASSWORD = r"^\| `([A-Z]+_PASSWORD)` \| (?:Run `(.+?)`)?"


class PlainComposeStack(ComposeStack):
    def order(self):
        """Place an order, wait until it is confirmed; return its URL."""
        status, _, order = self.request("/api/orders/", ORDER)
        assert status == 201, self.log
        url = f"/api/orders/{order['id']}/"
        wait_for(lambda: self.request(url)[2]["confirmed_at"], site=self)
        return url

    def start_report(self):
        """Start a report of 15 seconds; return the URL of its task once it has progress."""
        status, headers, _ = self.request("/api/orders/report/", {})
        assert status == 202, self.log
        url = headers["Location"]
        wait_for(lambda: self.request(url)[2]["state"] == "PROGRESS", site=self)
        return url

    def result(self, url):
        """Wait for the end of the task at `url`; return its result."""
        task = wait_for(lambda: self.final(url), site=self)
        assert task["state"] == "SUCCESS", task
        return task["result"]

    def final(self, url):
        task = self.request(url)[2]
        return task if task and task["state"] in FINAL else None


@pytest.fixture(scope="module", params=STACKS)
def stack(request, engine, cookies_session):
    with composed(PlainComposeStack, cookies_session, broker=request.param) as stack:
        yield stack


def test_an_order_becomes_an_email_and_a_report_runs(stack):
    stack.order()
    assert "Thank you! You ordered 2 × Tea." in stack.mails()

    url = stack.start_report()
    assert stack.result(url)["ordered"]["Tea"] >= 2
    assert stack.request(url, Authorization="")[0] == 401
    if stack.has_flower:
        task = stack.request(url)[2]["id"]
        assert wait_for(lambda: stack.find_in_flower(task), site=stack)
        assert stack.ask_flower("/api/workers", authenticated=False)[0] == 401


def test_each_service_is_healthy_and_has_few_rights(stack):
    containers = stack.containers("--all")
    check_rights(containers)
    mounts = [mount for [each] in containers.values() for mount in each["Mounts"]]
    assert not [mount for mount in mounts if mount["Destination"] == "/token"]


@on_one
def test_all_processes_count_requests_together(stack):
    stack.request("/api/orders/")
    assert "throttle" in stack.exec("redis", "redis-cli", "-n", "2", "keys", "*")


@on_one
def test_each_thread_of_the_web_server_can_receive_the_largest_request(stack, tmp_path):
    """All at once: they are in /tmp, which counts as memory."""
    page, jar, file = f"{stack.web}/login/", tmp_path / "jar", tmp_path / "file"
    file.write_bytes(bytes(24_000_000))
    curl = ["curl", "--silent", "--output", os.devnull]
    subprocess.check_call([*curl, "--cookie-jar", jar, page])
    curl += ["--cookie", jar, "--limit-rate", "4M", "--write-out", "%{http_code}"]
    command = [*curl, "--form", f"file=@{file}", page]
    uploads = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(16)]
    # Django reads the request in search of a CSRF token.
    assert {upload.communicate()[0] for upload in uploads} == {"403"}


@on_one
def test_the_image_has_nothing_that_is_only_for_development(stack):
    found = set(stack.exec("web", "ls", "-A").split())
    assert "manage.py" in found
    assert not found & {".env", "dev.py", "tests", "conftest.py", "compose.dev.yaml"}


@pytest.mark.parametrize("stack", STACKS[:2], indirect=True)
def test_each_server_gets_a_new_password_as_the_page_says(stack):
    rows = re.findall(PASSWORD, stack.project.read("docs/production.md"), re.M)
    rows = [(*row, os.urandom(12).hex()) for row in rows]
    for name, command, password in rows:
        if command:  # psql asks for it twice
            command = command.replace(" exec ", " exec -T ").replace("NEW", password)
            typed = f"printf '{password}\\n{password}\\n' | {command}"
            stack.project.call("sh", "-c", typed, **stack.environment)
        stack.project.edit(".env", f"^{name}=.*", f"{name}={password}")
    assert len(rows) > 1
    stack.make_up()
    variables = stack.exec("web", "printenv")
    for name, _, password in rows:
        assert f":{password}@" in variables, name
    stack.order()


@on_one
def test_a_task_of_a_stopped_worker_runs_again(stack):
    url = stack.start_report()
    stack.compose("stop", "worker")
    assert not stack.final(url)
    stack.up("worker")
    assert stack.result(url)


@on_second
def test_make_up_gives_each_queue_dead_letters(stack):
    options = "--quiet", "--formatter", "json"
    listed = stack.exec("rabbitmq", "rabbitmqctl", *options, "list_queues", "name", "policy")
    policies = {queue["name"]: queue["policy"] for queue in json.loads(listed)}
    assert "dead-letters" in policies
    assert {policies[queue] for queue in ("celery", "cpu", "io")} == {"dead-letters"}


@on_one
def test_beat_is_unhealthy_when_it_writes_its_schedule_no_more(stack):
    [beat] = stack.containers()["beat"]
    check = ("beat", "sh", "-c", beat["Config"]["Healthcheck"]["Test"][1])
    stack.exec(*check)
    stack.exec("beat", "sh", "-c", "touch -d '11 minutes ago' /schedule/*")
    with pytest.raises(AssertionError):
        stack.exec(*check)
    # The next one to write it is Beat's loop. It does that each three minutes, here each second.
    loop = "from celery.beat import Scheduler as S; S.sync_every = 1; S.max_interval = 1; "
    loop += "from config import celery_app; celery_app.Beat(schedule='/tmp/celerybeat-other').run()"
    stack.compose("exec", "--detach", "beat", "python", "-c", loop)
    sizes = "stat -c %Y /tmp/celerybeat-other* 2>/dev/null | sort -n | tail -1"

    def written():
        return stack.exec("beat", "sh", "-c", sizes).strip()

    first = wait_for(written, site=stack)
    wait_for(lambda: written() > first, site=stack)
    wait_for(lambda: written() > first, site=stack)
    stack.compose("restart", "beat")
    stack.up("beat")  # waits until it is healthy


FORGET = """
from datetime import timedelta
from django.utils import timezone
from orders.models import Order
from users.models import User
order = Order.objects.create(owner=User.objects.first(), product="Tea", quantity=2)
Order.objects.filter(pk=order.pk).update(created_at=timezone.now() - timedelta(hours=2))
print(order.pk)
"""
WAIT = """
import shelve
from datetime import timedelta
from config import celery_app
with shelve.open("/schedule/beat", writeback=True) as schedule:
    for entry in schedule["entries"].values():
        entry.last_run_at -= timedelta(hours=2)
"""


@on_one
def test_what_was_due_while_beats_container_was_replaced_starts_then(stack):
    url = f"/api/orders/{stack.shell(FORGET)}/"
    stack.compose("rm", "--stop", "--force", "beat")
    stack.compose("run", "--rm", "--no-deps", "-T", "beat", "python", "-c", WAIT)
    stack.up("beat")
    wait_for(lambda: stack.request(url)[2]["confirmed_at"], site=stack)


# While it runs, the web server answers.
MIGRATION = """
from urllib.request import urlopen
from django.db import migrations


def run(apps, schema_editor):
    urlopen("http://web:8000/health/live")
    {then}


class Migration(migrations.Migration):
    dependencies = [("orders", "0001_initial")]
    operations = [migrations.RunPython(run)]
"""


def events_of(slug, since):
    """Return what happened to the containers of a project, such as "start web"."""
    filters = "type=container", f"label=com.docker.compose.project={slug}"
    options = [option for each in filters for option in ("--filter", each)]
    service = '{{index .Actor.Attributes "com.docker.compose.service"}}'
    times = "--since", str(int(since)), "--until", str(int(time.time()) + 1)
    return docker("events", *times, *options, "--format", "{{.Action}} " + service).splitlines()


@on_third
def test_make_up_again_migrates_first_then_replaces_web_then_the_rest(stack):
    """With new code and the settings of production. The data stays. A failure changes nothing."""
    order, path = stack.order(), stack.project / ".env"
    migration = stack.project / "orders/migrations/0003_new.py"
    before = stack.containers()
    development = path.read_text()
    left_out = "^(DEBUG|DJANGO_SUPERUSER_.*|ALLOWED_HOSTS|EMAIL_BACKEND)=.*\n"
    variables = re.sub(left_out, "", development, flags=re.M)
    path.write_text(f"{variables}\nDOMAIN=example.com\nEMAIL_BACKEND={CONSOLE_MAIL}\n")
    stack.project.append("orders/tasks.py", "\n# production\n")
    try:
        migration.write_text(MIGRATION.format(then="raise ValueError('it fails')"))
        with pytest.raises(AssertionError, match="it fails"):
            stack.make("up")
        assert stack.request(order)[0] == 200
        services = stack.containers()
        assert all(services[name][0]["Id"] == before[name][0]["Id"] for name in before)
        migration.write_text(MIGRATION.format(then=""))
        since = time.time()
        assert "Generated token" not in stack.make("up")
        events = events_of(stack.project.name, since)
        gap = events[events.index("die web") : events.index("start web")]
        assert [event for event in gap if event.startswith("start")] == []
        stack.headers = HTTPS
        assert stack.request(order)[0] == 200
        stack.order()
        assert stack.request(order, Host="127.0.0.1")[0] == 400
        started = {
            service: container["State"]["StartedAt"]
            for service, [container] in stack.containers("--all").items()
        }
        # Compose runs the migrations once more before the rest.
        assert started["web"] < started["migrate"] < started["worker"]
        code = stack.exec("worker", "tail", "-1", "orders/tasks.py")
        assert code == "# production\n"
    finally:
        path.write_text(development)
        migration.unlink()
        stack.headers = {}
        stack.make_up()


# Shorter times for the alerts, in the order in which they are replaced
SHORTER = {
    "alerts.yml": {"10m": "20s", "for: 2m": "for: 2s"},
    "prometheus.yml": {"_interval: 15s": "_interval: 1s"},
}
FAIL = "from orders.tasks import send_confirmation; print(send_confirmation.delay(0).id)"
BURST = "from orders.tasks import send_confirmation as task; "
BURST += "print([task.delay(0) for _ in range(1000)][0].id)"
EXPIRE = "from orders.tasks import check_stock; "
EXPIRE += "print(check_stock.apply_async([0], expires=1).id)"
CHANNEL = "from config.celery import app; channel = app.connection_for_write().default_channel; "
REJECT = CHANNEL + "print(channel.client.lpush('dead-letters', '{}'))"
PURGE = CHANNEL + "print(channel.queue_purge('dead-letters'))"
SEND = "from orders.tasks import forecast_demand; print(forecast_demand.delay('Tea').id)"
# The exporter's service, and commands that leave the broker too little memory, and enough
EXPORTERS = {"redis": ["redis-exporter"], "rabbitmq": []}
MEMORY = {
    "redis": ("redis-cli config set maxmemory 1mb", "redis-cli config set maxmemory 256mb"),
    "rabbitmq": [
        f"rabbitmqctl set_vm_memory_high_watermark {limit}" for limit in ("absolute 100MB", "0.6")
    ],
}


@pytest.mark.parametrize("stack", STACKS[:2], indirect=True)
def test_the_profile_monitoring_sees_each_alert_fire_and_resolve(stack):
    """With shorter times."""
    broker = stack.project.answers["broker"]
    for name, shorter in SHORTER.items():
        path = stack.project / "deploy/monitoring" / name
        config = path.read_text()
        for long, short in shorter.items():
            assert long in config
            config = config.replace(long, short)
        path.write_text(config)

    def firing():
        alerts = stack.ask_prometheus("/api/v1/alerts")["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}

    with stack.monitored() as names:
        assert names == ["prometheus", *EXPORTERS[broker]]
        check_rights(stack.containers("--all"))
        wait_for(stack.is_scraped, site=stack)
        [group] = stack.ask_prometheus("/api/v1/rules")["groups"]
        alerts = {rule["name"] for rule in group["rules"] if rule["type"] == "alerting"}
        wait_for(lambda: not firing(), site=stack)

        stack.shell(FAIL)  # there is no such order
        wait_for(lambda: firing() == {"TasksFail"}, site=stack)
        wait_for(lambda: not firing(), site=stack)

        stack.compose("stop", "worker")
        stack.shell(SEND)
        wait_for(lambda: firing() == {"NoWorker", "TasksWait"}, site=stack)
        stack.shell(BURST)
        wait_for(lambda: firing() == {"NoWorker", "TasksWait", "QueueGrows"}, site=stack)
        stack.shell({"rabbitmq": EXPIRE, "redis": REJECT}[broker])
        wait_for(lambda: "DeadLetters" in firing(), site=stack)
        stack.exec("web", "celery", "-A", "config", "purge", "--force")
        stack.shell(PURGE)
        stack.up("worker")
        wait_for(lambda: not firing(), site=stack)

        too_little, enough = MEMORY[broker]
        stack.exec(broker, *too_little.split())
        wait_for(lambda: firing() == {"BrokerFull"}, site=stack)
        stack.exec(broker, *enough.split())
        wait_for(lambda: not firing(), site=stack)

        stack.compose("stop", "flower")
        wait_for(lambda: firing() == {"NoMetrics"}, site=stack)
        stack.up("flower")
        wait_for(lambda: not firing(), site=stack)
        others = {"QueueGrows", "BrokerFull", "DeadLetters"}
        assert alerts == {"TasksFail", "TasksWait", "NoWorker", "NoMetrics"} | others


# A task for each queue
FOR_EACH_QUEUE = """
from django.conf import settings
from orders.tasks import forecast_demand
for queue in settings.CELERY_TASK_QUEUES:
    options = {"queue": queue.name, "kwargs": {"rounds": 9}}
    print(queue.name, forecast_demand.apply_async(["Tea"], **options).id)
"""


@on_second
def test_the_pods_of_the_manifests_run_tasks(stack):
    """Pods wait for the migrations and pass the probes of deploy/kubernetes/."""
    with running_pods(stack) as pods:
        status, _, order = pods.request("/api/orders/", ORDER)
        assert status == 201, pods.log
        url = f"/api/orders/{order['id']}/"
        wait_for(lambda: pods.request(url)[2]["confirmed_at"], site=pods)
        printed = pods.call("web", *MANAGE, "shell", "-v0", "-c", FOR_EACH_QUEUE)
        found = re.findall("^(\\w+) ([0-9a-f-]{36})$", printed, re.M)
        assert found
        for queue, task in found:
            worker = pods.ids[f"worker-{queue}"]
            wait_for(lambda worker=worker, task=task: task in log_of(worker), site=pods)


def test_each_make_up_starts_the_workers_that_env_wants(bake):
    project = bake()
    assert compose_config(project)["services"]["worker"]["scale"] == 1
    project.append(".env", "WORKERS=3\n")
    services = compose_config(project)["services"]
    assert {name for name, each in services.items() if each.get("scale", 1) > 1} == {"worker"}
    assert services["worker"]["scale"] == 3


def test_caddy_is_not_replaced_with_the_web_server(bake):
    """Compose 2.26 would do that to what depends on it, and refuse all requests for 15 seconds."""
    assert "depends_on" not in bake().services()["caddy"]


READ_ENV = """
import json, os
from dotenv import load_dotenv
os.environ.clear()
load_dotenv(".env", interpolate=False)
print(json.dumps(dict(os.environ)))
"""


@outputs(DEFAULTS)
def test_compose_and_django_read_the_same_values(project):
    """Each variable of .env.example, in single quotes."""
    names = re.findall("^(?:# )?([A-Z_]+)=", project.read(".env.example"), re.M)
    values = {name: f"{name} ${name} ${{HOME}} \\n #" for name in names if name != "WORKERS"}
    quoted = "".join(f"{name}='{value}'\n" for name, value in values.items())
    before = project.read(".env")
    (project / ".env").write_text(f"# a comment\n{quoted}")
    try:
        assert json.loads(project.call(".venv/bin/python", "-c", READ_ENV)) == values
        found = compose_config(project)["services"]["web"]["environment"]
    finally:
        (project / ".env").write_text(before)
    own = set(yaml.safe_load(project.read("compose.yaml"))["x-app"]["environment"])
    assert values.keys() <= found.keys()
    for name in values.keys() - own:
        assert found[name].replace("$$", "$") == values[name].replace("$$", "$"), name
    assert len(values.keys() - own) > 10


VALUES = ["$a", "a$b", '"a$b"', "a #b", "${HOME}", "'a' #b"]


@pytest.mark.parametrize("line", [*(f"RELEASE={each}" for each in VALUES), "export RELEASE=$a"])
def test_make_up_refuses_values_that_compose_would_change(bake, tmp_path, monkeypatch, line):
    project = bake()
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    project.call("make", "up")
    lines = "LOG_LEVEL='a$b #c'\nexport RELEASE='$a'\n# A comment: $a\nTIME_ZONE=a#b\n"
    project.append(".env", lines)
    project.call("make", "up")
    project.append(".env", f"{line}\n")
    with pytest.raises(AssertionError, match="single quotes"):
        project.call("make", "up")


def check_redis_databases(services):
    """Assert that each use of Redis has its own database, and that the cache is one of them."""
    variables = services["web"]["environment"]
    used = [url for url in variables.values() if url and "@redis:" in url]
    assert len(used) == len(set(used))
    assert ("CACHE_URL" in variables) == ("redis" in services)


@pytest.mark.parametrize("durable_jobs", CHOICES["durable_jobs"])
def test_compose_reads_every_file(engine, bake, durable_jobs):
    """It finds what the schema cannot: wrong references, and variables missing from .env."""
    options, seen = ("broker", "result_backend", "worker_pool", "periodic_tasks"), set()
    for answers in covering(product({option: CHOICES[option] for option in options}), size=3):
        project = bake(durable_jobs=durable_jobs, **answers)
        if (text := project.read("compose.yaml")) not in seen:
            seen.add(text)
            config = compose_config(project)
            assert durable_jobs == "yes" or "token" not in config["volumes"]
            check_redis_databases(config["services"])
    assert len(seen) > 1


@on_third
def test_two_lines_of_env_decide_about_a_stand_in_for_amazon(stack):
    """Without them, Compose starts none, and boto3 does not look for it."""
    read = ("config", "--services")
    services = stack.compose(*read).split()
    assert "aws" in services
    without = {"COMPOSE_PROFILES": "", "AWS_ENDPOINT_URL": ""}
    stack.environment |= without
    try:
        gone = set(services) - set(stack.compose(*read).split())
        assert gone - {"mailpit"} == {"aws", "aws-prepare"}
        config = compose_config(stack.project, **stack.environment)
    finally:
        for name in without:
            del stack.environment[name]
    endpoint = config["services"]["web"]["environment"]["AWS_ENDPOINT_URL"]
    code = "import boto3; print(boto3.client('sqs').meta.endpoint_url)"
    printed = stack.exec("web", "env", f"AWS_ENDPOINT_URL={endpoint}", "python", "-c", code)
    assert printed.strip() == "https://sqs.us-east-1.amazonaws.com"
