"""The services of a project, what can happen to each, and the cells of the proof: test_services.py.

A service is a server behind a proxy, or a process of the stack. Its faults are its methods.
"""

import itertools
import os
import signal
import time
from collections import defaultdict
from contextlib import suppress

import psycopg
import pytest

from . import results
from .bake import CHOICES, TEMPLATE, baked, chosen, covering, name, product
from .project import started
from .proxy import Proxy
from .servers import BROKERS, SQS, PostgreSQL, RabbitMQ, Redis, backend_class, versions
from .stack import TIMINGS, JobStack, PlainStack, add_faults, add_trials

PAGE = TEMPLATE / "docs/reliability.md"
# Seconds until Redis or SQS delivers a task again that no live worker has. A stalled worker or
# broker must be back earlier.
VISIBILITY = 20
OPTIONS = {option: CHOICES[option] for option in ("broker", "result_backend", "worker_pool")}
EVERY = bool(os.environ.get("EVERY"))  # test the whole product
SETTINGS = {
    # kombu finds a lost connection within 25 seconds. All workers must find theirs within a third
    # of the visibility timeout, which is a sixth of the default here.
    "redis": Redis.settings + 'CELERY_BROKER_TRANSPORT_OPTIONS["health_check_interval"] = 4\n',
    # It keeps the messages of a connection that a firewall forgot until two heartbeats are missing.
    # While it blocks publishers, it reads no heartbeats from them: so not less than that.
    "rabbitmq": """
if "CELERY_BROKER_HEARTBEAT" not in globals():
    CELERY_BROKER_HEARTBEAT = 15
""",
    # A gevent worker waits that long at each queue, and one after the other.
    "sqs": """
if CELERY_BROKER_TRANSPORT_OPTIONS["wait_time_seconds"] == 1:
    CELERY_BROKER_TRANSPORT_OPTIONS["wait_time_seconds"] = 0
""",
}
VARIABLES = {
    "database": {"DATABASE_URL": "DATABASE_URL"},
    "broker": {"CELERY_BROKER_URL": "CELERY_BROKER_URL", "AWS_ENDPOINT_URL": "AWS_ENDPOINT_URL"},
    "results": {
        "CELERY_RESULT_BACKEND": "CELERY_RESULT_BACKEND",
        "AWS_ENDPOINT_URL": "AWS_ENDPOINT_URL",
    },
    "cache": {"CELERY_BROKER_URL": "CACHE_URL"},
}
EXAMPLE = """
from orders.models import Order
from users.models import User
for _ in range(2):
    Order.objects.create(owner=User.objects.get(), product="Coffee", quantity=2)
"""


class Service:
    """What all services have: a process that can be stopped, killed and stalled."""

    stop_signal = signal.SIGTERM
    down, stalled = 4, 8  # seconds

    def __init__(self, process):
        self.process = process

    def restart(self):
        """Stop it as its supervisor does, and start it again."""
        self.process.stop(self.stop_signal)
        with suppress(ProcessLookupError):  # a child that outlives it, such as RabbitMQ's epmd
            os.killpg(self.process.pid, signal.SIGKILL)
        self.start()

    def kill(self):
        self.process.kill()
        self.start()

    def start(self):
        time.sleep(self.down)
        self.process.start()

    def stall(self):
        self.process.pause()
        time.sleep(self.stalled)
        self.process.resume()


class Server(Service):
    """A server that all processes of the stack reach through a proxy."""

    def __init__(self, process, port):
        super().__init__(process)
        self.proxy = Proxy(port)

    def behind(self, names):
        """Return variables with the proxy's port. `names` are {name of the server: new name}."""
        found = self.proxy.redirect(self.process.variables)
        return {new: found[name] for name, new in names.items() if name in found}

    def cut(self):
        """Close all connections, as a load balancer or an operator does."""
        self.proxy.cut()

    def forget(self):
        """Forget all connections, as a firewall does."""
        self.proxy.forget()

    def read_only(self):
        self.set_read_only(True)
        try:
            time.sleep(self.stalled)
        finally:
            self.set_read_only(False)


class DatabaseService(Server):
    stop_signal = signal.SIGINT  # a fast shutdown

    def set_read_only(self, is_on):
        """As after a failover to a replica."""
        with psycopg.connect(f"{self.process.url}/postgres", autocommit=True) as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {is_on}")
            connection.execute("SELECT pg_reload_conf()")


class RedisService(Server):
    def set_read_only(self, is_on):
        """As a master is that has lost its replicas."""
        self.process.configure("min-replicas-to-write", str(int(is_on)))


class RabbitMQService(Server):
    def set_read_only(self, is_on):
        """Its memory alarm blocks all publishers."""
        self.process.control("set_vm_memory_high_watermark", "0.0000001" if is_on else "0.6")


class AWSService(Server):
    """moto, which would lose all if it were killed. AWS's services can be unreachable, or hang."""

    kill = read_only = None

    def restart(self):
        self.proxy.block()
        try:
            time.sleep(self.down)
        finally:
            self.proxy.unblock()


KINDS = {
    PostgreSQL: DatabaseService,
    Redis: RedisService,
    RabbitMQ: RabbitMQService,
    SQS: AWSService,
}
FAULTS = {  # and their words in the table; a process has the last three
    "cut": "disconnected",
    "forget": "forgotten",
    "read_only": "read-only",
    "restart": "restarted",
    "kill": "killed",
    "stall": "stopped",
}
LABELS = {
    "database": "PostgreSQL",
    "broker": "{broker} (broker)",
    "results": "{backend} (results)",
    "cache": "Redis (cache)",
    "web": "web server",
    "worker": "worker",
    "beat": "Beat",
    "flower": "Flower",
}
NAMES = {"redis": "Redis", "rabbitmq": "RabbitMQ", "sqs": "SQS", "dynamodb": "DynamoDB"}


def servers_of(answers):
    """Return the class of the server for each service of a project that has its own one."""
    broker, backend = BROKERS[answers["broker"]], backend_class(answers)
    found = {"database": PostgreSQL, "broker": broker}
    # SQS and DynamoDB are one moto. Results in the database are PostgreSQL's.
    if backend and not backend is broker is SQS:
        found["results"] = backend
    if Redis in found.values():  # otherwise the project has no client for it
        found["cache"] = Redis
    return found


def has_moto(answers):
    return SQS in servers_of(answers).values()


def cells_of(answers):
    """Return each service with each fault, as {(service, fault): what else has the same cell}.

    For example, a broker is another service for each choice, and so is a worker.
    """
    found, omitted = {}, set()
    if (answers["broker"], answers["worker_pool"]) == ("rabbitmq", "gevent"):
        # Such a worker has no heartbeats. The server notices by keepalive, whose times its machine
        # sets: see docs/production.md of the output.
        omitted.add(("broker", "forget"))
    for service, server in servers_of(answers).items():
        for fault in FAULTS:
            if getattr(KINDS[server], fault) and (service, fault) not in omitted:
                found[service, fault] = service, server, fault
    processes = ["web", "worker", "beat", "flower"][: 3 + chosen(**answers).has_flower]
    for service, fault in itertools.product(processes, list(FAULTS)[3:]):
        broker = answers["broker"] if service == "worker" else None
        found[service, fault] = service, broker, fault
    return found


def spread(combinations):
    """Yield (answers, service, fault): each cell once, about as many for each of these answers.

    With durable jobs, which have tests of their own for each broker, each service once. A stack
    with moto, which is slow, gets only what no other one has.
    """
    where = {}
    for number, answers in enumerate(combinations):
        for (service, fault), cell in cells_of(answers).items():
            if answers["durable_jobs"] == "yes":
                cell = service, fault
            where.setdefault(cell, []).append((number, service, fault))
    loads = [0] * len(combinations)
    for places in sorted(where.values(), key=len):
        number, service, fault = min(
            places, key=lambda place: (has_moto(combinations[place[0]]), loads[place[0]])
        )
        loads[number] += 1
        yield combinations[number], service, fault


def all_cells():
    combinations = product({"durable_jobs": CHOICES["durable_jobs"], **OPTIONS})
    if EVERY:
        return [(each, *cell) for each in combinations for cell in cells_of(each)]
    found = []
    for choice in CHOICES["durable_jobs"]:
        those = [each for each in combinations if each["durable_jobs"] == choice]
        found += spread(covering(those, size=2))
        combinations.reverse()  # the next covering set is another one
    return found


def each_cell():
    """Return a mark: run the test for all cells. Those of one stack run in one process."""
    params = []
    stacks = {}  # the same object for the same stack: pytest compares parameters by identity
    for answers, service, fault in sorted(all_cells(), key=lambda cell: name(cell[0])):
        jobs = "jobs" if answers["durable_jobs"] == "yes" else "plain"
        words = *(answers[option] for option in OPTIONS), jobs
        group = "-".join(words)
        stack = stacks.setdefault(group, answers)
        marks = [pytest.mark.xdist_group(f"services-{group}")]
        if jobs == "plain":
            marks.append(pytest.mark.each_broker)
        params.append(
            pytest.param(stack, service, fault, id=f"{group}-{service}-{fault}", marks=marks)
        )
    return pytest.mark.parametrize(
        ("service_stack", "service", "fault"), params, indirect=["service_stack"], scope="session"
    )


@pytest.fixture(scope="session")
def service_stack(request, cookies_session, database, tmp_path_factory):
    """A stack that consecutive cells share. Its `services` are all its servers and processes."""
    project = baked(cookies_session, request.param)
    stack = prepare(project, tmp_path_factory.mktemp("services"), database)
    with started(stack):
        stack.ask(EXAMPLE)
        yield stack


def prepare(project, folder, database, **options):
    """Install a baked project, and return its stack with a proxy in front of each server."""
    has_jobs = project.answers["durable_jobs"] == "yes"
    project.install()
    project.edit("orders/tasks.py", r"time\.sleep\(0\.5\).*", "time.sleep(0.02)")
    add_trials(project, folder, SETTINGS[project.answers["broker"]])
    if has_jobs:
        add_faults(project)
    project.add_app("load")

    slots = 8 if project.answers["worker_pool"] == "prefork" else 20
    services, variables = {}, {"VISIBILITY_SECONDS": VISIBILITY, "WORKER_CONCURRENCY": slots}
    if has_jobs:
        variables |= TIMINGS
    for service, kind in servers_of(project.answers).items():
        server = database if kind is PostgreSQL else kind(folder / service, project)
        services[service] = KINDS[kind](server, server.port)
    proxy = services["database"].proxy
    url = f"{database.create(f'services{proxy.port}')}?prepare_threshold=0"
    database.variables = {"DATABASE_URL": url}
    for service, names in VARIABLES.items():
        if service in services:
            variables |= services[service].behind(names)
    for service in services.values():
        # Queues of SQS have it as an attribute.
        service.process.variables["VISIBILITY_SECONDS"] = VISIBILITY

    own = [each.process for service, each in services.items() if service != "database"]
    broker = services["broker"].process
    own.sort(key=lambda server: server is not broker)
    variables |= options
    stack = (JobStack if has_jobs else PlainStack)(project, own, folder, database, **variables)
    stack.processes = [stack.web, *stack.workers, stack.beat]
    if chosen(**project.answers).has_flower:
        stack.processes.append(stack.flower)
        services["flower"] = Service(stack.flower)
    for service, process in {"web": stack.web, "worker": stack.worker, "beat": stack.beat}.items():
        services[service] = Service(process)
    stack.services = services
    return stack


@pytest.fixture
def stack_of_services(service_stack, request):
    """The stack, with all services running. If the test fails, the next one gets new processes."""
    stack = service_stack
    stack.recover()
    stack.mark_logs()
    failed = request.session.testsfailed
    yield stack
    for service in stack.services.values():
        if isinstance(service, Server):
            service.proxy.clean_up()
            service.process.resume()
    if request.session.testsfailed > failed:
        print(stack.printed())
        stack.kill(*stack.processes)


def pytest_terminal_summary(terminalreporter):
    """Print a table of what passed. WRITE=1 stores it, and writes the page from what is stored."""
    passed = terminalreporter.stats.get("passed", [])
    recorded = [each for report in passed for each in report.user_properties]
    cells = [value for key, value in recorded if key == "cell"]
    if not cells:
        return
    terminalreporter.section("what happens when a service fails")
    terminalreporter.write(table(cells))
    if os.environ.get("WRITE"):
        key = "service", "fault", "stack"
        rows = results.store(PAGE.with_suffix(".json"), cells, key, **versions())
        PAGE.write_text(quoted(PAGE.read_text("utf-8"), rows), "utf-8")


def quoted(page, rows):
    """Return the page's text with the table of those of plain tasks, and how they were measured."""
    plain = [row for row in rows if row["stack"].endswith("-plain")]
    text = "\n".join([table(plain), *results.measured(plain), ""])
    return results.quote(page, "services", text)


def table(cells):
    """Return a table with one row for all faults of a service that had the same effects."""
    order = [*LABELS, *FAULTS]
    effects = defaultdict(set)  # {(service, fault): those with any stack}
    for cell in sorted(
        cells,
        key=lambda each: (order.index(each["service"]), label(each), order.index(each["fault"])),
    ):
        service, fault = label(cell), FAULTS[cell["fault"]]
        if service.startswith(("SQS", "DynamoDB")) and fault == "restarted":
            fault = "unreachable"  # see AWSService
        effects[service, fault].update(what_happens(cell))
    rows = defaultdict(list)
    for (service, fault), what in effects.items():
        rows[service, "; ".join(sorted(what)) or "nothing"].append(fault)
    lines = [(service, ", ".join(faults), what) for (service, what), faults in rows.items()]
    return results.table(["service", "what happens to it", "what happens to tasks"], lines)


def label(cell):
    broker, backend, *_ = cell["stack"].split("-")
    names = {"broker": NAMES[broker], "backend": NAMES.get(backend)}
    return LABELS[cell["service"]].format(**names)


def what_happens(found):
    """Yield what the fault did to tasks. Nothing is lost: otherwise, the test fails."""
    if found["of them started before"]:
        yield "running tasks run again"
    elif found["ran again"]:
        yield "tasks sent meanwhile run twice"
    if found["failed"]:
        yield "tasks that need the database fail"
    if found["orders that the hourly task found"]:
        yield "the hourly task finds orders"
    if found["refused"]:
        yield "requests fail" if found["service"] == "database" else "requests get 503"
    for process in found["exited"]:
        yield f"{process} exits and is restarted"
