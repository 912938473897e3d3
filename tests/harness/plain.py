"""Stacks of plain projects (durable_jobs=no): each process can be killed, paused and started.

Also the table of what can be lost: see the fixture `record_fault`.
"""

import json
import os
import urllib.error
import urllib.request
from base64 import b64encode

import pytest

from .bake import CHOICES, baked
from .outputs import combinations
from .project import BEHIND_A_PROXY, connects, free_ports, wait_for
from .servers import BROKERS as SERVERS
from .stack import Stack, pairs

REDELIVERY = 10  # seconds until Redis or SQS delivers a task again, instead of 21 minutes
RESULTS = {"redis": "redis", "rabbitmq": "database", "sqs": "dynamodb"}  # of the fault tests
FLOWER_USER = "admin:of-this-test"
SCHEDULE = """
CELERY_BEAT_SCHEDULE = {{
    "tick": {{"task": "trials.tasks.tick", "schedule": 1, "args": ["{path}"]}}
}}
"""
# Settings for faults. kombu looks for tasks to deliver again each second, not each 100. If it hangs
# there, others may do so after 2 seconds, not 300.
QUICK = {
    "redis": f"""
REDELIVERY_SECONDS = env.int("REDELIVERY", default={REDELIVERY})
CELERY_BROKER_TRANSPORT_OPTIONS |= {{
    "visibility_timeout": REDELIVERY_SECONDS,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
    "unacked_mutex_expire": 2,
}}
""",
    "rabbitmq": "",
    "sqs": f"REDELIVERY_SECONDS = SQS_VISIBILITY_TIMEOUT = {REDELIVERY}\n",
}
# The names of code for ask()
IMPORTS = """
from celery import chain, chord, group
from celery.result import AsyncResult
from config.celery import app
from trials.tasks import *
"""


class Servers:
    """The server of a project's broker and that of its result backend, which may be the same."""

    def __init__(self, project, folder):
        answers = project.answers
        places = {"redis": "redis", "rabbitmq": "rabbitmq", "sqs": "sqs", "dynamodb": "sqs"}
        self.all, self.variables = {}, {}
        for option in "result_backend", "broker":
            place = places.get(answers[option])
            if place and place not in self.all:
                (folder / place).mkdir(parents=True)
                self.all[place] = SERVERS[place](folder / place, project)
                self.variables |= self.all[place].variables
        self.broker = self.all[places[answers["broker"]]]

    def start(self):
        for server in self.all.values():
            server.start()

    def kill(self):
        for server in self.all.values():
            if server.is_running():
                server.resume()
                server.kill()


class PlainStack(Stack):
    """It has one `worker`, for all queues. Beat and Flower run only if a test starts them."""

    imports = IMPORTS
    tester = {"email": "tester@example.com", "is_staff": True, "is_superuser": True}

    def __init__(self, project, servers, folder, database, **variables):
        [self.flower_port] = free_ports(1)
        variables = {
            "FLOWER_BASIC_AUTH": FLOWER_USER,
            "FLOWER_PORT": self.flower_port,
            "DATABASE_URL": database.create(f"plain{self.flower_port}"),
            **servers.variables,
            **variables,
        }
        super().__init__(project, servers.broker, folder, **variables)
        self.servers = servers
        self.web = self.make_web(workers=2)
        self.web_url = f"http://127.0.0.1:{self.port}"
        self.flower_url = f"http://127.0.0.1:{self.flower_port}"
        self.worker, self.beat = self.make_worker("first"), self.make_beat()
        self.processes = [self.web, self.worker]
        self.has_flower = "flower" in project.read("Procfile")
        self.flower = self.process(
            "celery -A config flower", name="flower", is_ready=lambda: connects(self.flower_port)
        )

    def start(self):
        """Start the servers, web and worker."""
        self.servers.start()
        self.launch(self.processes)

    def stop(self):
        super().stop()
        self.servers.kill()

    def recover(self):
        """Make the whole stack run again, and remove what a test has left."""
        self.run_again(*self.servers.all.values())
        with self.supervised():  # a worker that lost its broker may be about to end
            for queue in "celery", "cpu", "io":
                self.wait_until_started(self.send("quick", queue=queue))

    def request(self, method, path, data=None):
        """Send a request to the web. Return (status, headers, JSON)."""
        headers = {"Authorization": f"Token {self.token}", **BEHIND_A_PROXY}
        return send(method, self.web_url + path, data, headers)

    def start_task(self, task, *args):
        """Start a task through a view of the app `trials`. Return the answer as request() does."""
        return self.request("POST", "/api/trials/", {"task": task, "args": list(map(str, args))})

    def ask_flower(self, method, path):
        basic = "Basic " + b64encode(FLOWER_USER.encode()).decode()
        return send(method, self.flower_url + path, None, {"Authorization": basic})

    def in_flower(self, task):
        """Return the state of a task in Flower."""
        status, _, answer = self.ask_flower("GET", f"/api/task/info/{task}")
        return answer["state"] if status == 200 else None

    def notes(self, what, task):
        """Return [(process id, time)] of each "start" or "end" that this task noted."""
        words = [line.split() for line in self.notes_file.read_text().splitlines()]
        return [(int(w[2]), float(w[3])) for w in words if w[:2] == [what, task]]

    def starts(self, task):
        return len(self.notes("start", task))

    def wait_until_started(self, task, times=1):
        """Wait for `times` starts of a task. Return the process id of the last one."""
        wait_for(lambda: self.starts(task) >= times)
        return self.notes("start", task)[-1][0]


def send(method, url, data, headers):
    """Send a request. Return (status, headers, JSON)."""
    body = None if data is None else json.dumps(data).encode()
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            text, status, headers = response.read(), response.status, response.headers
    except urllib.error.HTTPError as error:
        text, status, headers = error.read(), error.code, error.headers
    try:
        return status, headers, json.loads(text or "null")
    except ValueError:
        return status, headers, text.decode(errors="replace")


# Outputs


def plain_combinations():
    """Yield every broker with every result backend and pool; schedule and example vary."""
    for answers in combinations():
        yield {**answers, "durable_jobs": "no"}


def prepare(project, folder, database, settings="", **variables):
    """Add the app `trials` to an installed project, and return its PlainStack, not yet started.

    To see which tests fail without a setting: WITHOUT=CELERY_TASK_ACKS_LATE make prove …
    """
    without = "".join(f"del {name}\n" for name in os.environ.get("WITHOUT", "").split())
    project.add_app("trials", SCHEDULE.format(path=folder / "ticked") + settings + without)
    with open(project / "config/urls.py", "a") as file:
        file.write(
            '\nfrom trials.views import start\nurlpatterns += [path("api/trials/", start)]\n'
        )
    return PlainStack(project, Servers(project, folder / "servers"), folder, database, **variables)


BROKERS, POOLS = CHOICES["broker"], CHOICES["worker_pool"]


def stacks(brokers=BROKERS, pools=POOLS, group="faults", *, every_pair=False):
    """Return a mark: run the test on pairs() of these. test_plain_run.py has every pair."""
    params = []
    for broker, pool in pairs(brokers, pools, every_pair):
        key = f"plain-{group}-{broker}-{pool}"
        param = PARAMS.setdefault(key, {"broker": broker, "worker_pool": pool})
        marks = pytest.mark.xdist_group(key)
        params.append(pytest.param(param, id=f"{broker}-{pool}", marks=marks))
    return pytest.mark.parametrize("running_plain", params, indirect=True)


PARAMS = {}  # the same object for the same stack: pytest compares parameters by identity


@pytest.fixture(scope="module")
def running_plain(request, cookies_session, database, tmp_path_factory):
    """A stack for faults, which consecutive tests with the same parameters share."""
    answers = {**request.param, "result_backend": RESULTS[request.param["broker"]]}
    project = baked(cookies_session, {**answers, "durable_jobs": "no"})
    project.answers = {"result_backend": answers["result_backend"], **answers}
    project.install()
    folder = tmp_path_factory.mktemp("plain")
    stack = prepare(project, folder, database, QUICK[answers["broker"]])
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def plain(running_plain):
    """The stack, with all processes running. faults.py adds their logs to a failure's report."""
    running_plain.recover()
    running_plain.mark_logs()
    return running_plain


# The table of what can be lost


@pytest.fixture
def record_fault(request, record_property):
    """A function that adds a row to the table.

    `seconds` were measured, with short timings. `after` says what they are in production, if they
    depend on these timings.
    """

    def record(fault, what, seconds=None, after=""):
        place = request.node.callspec.params["running_plain"]
        record_property(
            "fault", [fault, place["broker"], place["worker_pool"], what, seconds, after]
        )

    return record


def pytest_addoption(parser):
    text = "write the table of what can be lost to this file, as Markdown (test_plain_faults.py)"
    parser.addoption("--faults-to", metavar="FILE", help=text)


def pytest_terminal_summary(terminalreporter, config):
    rows = []
    for report in terminalreporter.stats.get("passed", []):
        rows += [value for key, value in report.user_properties if key == "fault"]
    if not rows:
        return
    terminalreporter.section("what can be lost")
    terminalreporter.write_line("fault | broker-pool | what happened | seconds")
    for fault, broker, pool, what, seconds, after in sorted(rows, key=str):
        production = f" (production: {after})" if after else ""
        measured = f"{took([seconds])}{production}"
        terminalreporter.write_line(f"{fault} | {broker}-{pool} | {what} | {measured}")
    if file := config.getoption("--faults-to"):
        with open(file, "w") as table:
            table.write(markdown(rows))


def took(seconds):
    """Return "1 to 4 s" for [1, 4]."""
    seconds = sorted(round(each) for each in seconds if each is not None)
    if not seconds:
        return "–"
    low, high = seconds[0], seconds[-1]
    if high <= 1:
        return "≤ 1 s"
    return f"{low} s" if low == high else f"{low} to {high} s"


def markdown(rows):
    """Return the table, with one row for all brokers and pools where the same happened."""
    merged = {}
    for fault, broker, pool, what, seconds, after in rows:
        places, found = merged.setdefault((fault, what, after), ({}, []))
        places.setdefault(broker, []).append(pool)
        found.append(seconds)
    faults = {fault: number for number, (fault, *_) in enumerate(merged)}
    lines = ["| fault | broker and pool | what happens | after |", "| --- | --- | --- | --- |"]
    for key, (places, found) in sorted(
        merged.items(), key=lambda row: (faults[row[0][0]], str(row))
    ):
        fault, what, after = key
        lines.append(f"| {fault} | {describe(places)} | {what} | {after or took(found)} |")
    return "\n".join(lines) + "\n"


NAMES = {"redis": "Redis", "rabbitmq": "RabbitMQ", "sqs": "SQS"}


def describe(places):
    """Return "Redis, RabbitMQ: prefork; SQS" for {broker: pools}."""
    by_pools = {}
    for broker in filter(places.get, BROKERS):
        pools = tuple(pool for pool in POOLS if pool in places[broker])
        by_pools.setdefault(pools, []).append(NAMES.get(broker, broker))
    parts = []
    for pools, brokers in by_pools.items():
        brokers = "all" if len(brokers) == len(BROKERS) else ", ".join(brokers)
        parts.append(brokers if len(pools) == len(POOLS) else f"{brokers}: {', '.join(pools)}")
    return "; ".join(parts)
