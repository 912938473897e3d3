"""Real servers that tests start, kill and pause, each with its own port and folder.

A new broker gets a class here, and its name in BROKERS.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import ChainMap
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from servers import ask, rabbitmq

from . import missing, need
from .bake import DEFAULTS, TEMPLATE, chosen
from .blocks import code
from .project import Process, children_of, connects, free_ports, started

REDELIVERY = 10  # seconds until Redis or SQS delivers a dead worker's plain tasks again, not 120
# RabbitMQ 4.3 refuses these queues, and 4.0 when told to; 3.10 ignores it.
REFUSE_TRANSIENT = "-rabbit permit_deprecated_features #{transient_nonexcl_queues=>false}"
# In Erlang: elect a leader for each quorum queue whose members do not answer within a second.
ELECT_LEADERS = """
[ra:trigger_election(Id) || Queue <- rabbit_amqqueue:list(), Id <- [amqqueue:get_pid(Queue)],
    is_tuple(Id), element(1, ra:members(Id, 1000)) =/= ok].
"""


def sentinel_settings(*variables):
    """Return what docs/sentinel.md says to add if these variables name sentinels."""
    page = (TEMPLATE / "docs/sentinel.md").read_text("utf-8")
    words = ["SENTINEL_OPTIONS =", *(f"if {name}.startswith" for name in variables)]
    return "".join(code(page, each) for each in words)


class Broker(Process):
    """A broker for one output, made with (folder, project), or with port=... if it has a `server`.

    `folder` is for its data, and created. moto runs from the project's `.venv`. Without a `port`,
    the broker takes a free one. Its `variables` make an output use it.
    """

    server = None  # its file in templates/servers/, if real() starts it
    answers = {}  # of the output that the fault tests run
    settings = ""  # more lines for that output

    def __init__(self, folder, command, **options):
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(command, folder.with_suffix(".log"), cwd=folder, **options)


def answers_ping(port, *options):
    """Return whether this Redis is ready. While it loads its data, it only connects."""
    command = ["redis-cli", "-p", str(port), *options, "ping"]
    return subprocess.run(command, capture_output=True, text=True).stdout == "PONG\n"


class Redis(Broker):
    server = "redis"
    answers = {"broker": "redis"}
    # Workers look for tasks of dead ones each second, not each 10.
    settings = """
CELERY_BROKER_TRANSPORT_OPTIONS["unacked_restore_interval"] = 1
"""

    def __init__(self, folder, project=None, port=None, options=""):
        need("redis-server")
        self.port = port or free_ports(1)[0]
        url = f"redis://127.0.0.1:{self.port}"
        self.variables = {
            "CELERY_BROKER_URL": f"{url}/0",
            "CELERY_RESULT_BACKEND": f"{url}/1",
            "VISIBILITY_SECONDS": REDELIVERY,
        }
        # A killed Redis loses nothing without fsync, for which clients would wait on a busy disk.
        options += " --appendonly yes --appendfsync no"
        command = f"redis-server --port {self.port} --dir {folder} {options}"
        super().__init__(folder, command.split(), is_ready=partial(answers_ping, self.port))

    def cli(self, *words):
        """Run redis-cli and return what it prints."""
        command = ["redis-cli", "-p", str(self.port), *words]
        return subprocess.check_output(command, text=True)

    def configure(self, name, value):
        self.cli("config", "set", name, value)


class RedisSentinel(Redis):
    """A master, a replica and one Sentinel, which is the process of this object.

    All three have TLS and passwords. The first sentinel that the variables name does not exist.
    """

    answers = {"broker": "redis", "result_backend": "redis"}
    settings = Redis.settings + sentinel_settings("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND")

    def __init__(self, folder, project):
        super().__init__(folder)
        need("openssl")
        away, self.port, *ports = free_ports(4)
        self.certificate = folder / "certificate.pem"  # self-signed, so it is also its CA
        self.tls = "--tls", "--cacert", str(self.certificate), "--no-auth-warning"
        key = folder / "key.pem"
        options = "-x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test"
        options += " -addext subjectAltName=IP:127.0.0.1"
        options += " -addext keyUsage=digitalSignature,keyCertSign"
        openssl = ["openssl", "req", *options.split(), "-keyout", key, "-out", self.certificate]
        subprocess.run(openssl, check=True, capture_output=True)
        tls = f"""port 0
tls-cert-file {self.certificate}
tls-key-file {key}
tls-ca-cert-file {self.certificate}
tls-auth-clients no
tls-replication yes"""
        self.servers = {}  # {port: Process}
        for port in ports:
            (folder / str(port)).mkdir()
            config = folder / f"{port}.conf"
            config.write_text(f"""{tls}
tls-port {port}
dir {folder / str(port)}
appendonly yes
appendfsync no
requirepass of/redis
masterauth of/redis
""")
            log = folder.with_name(f"redis-{port}.log")
            is_ready = partial(answers_ping, port, *self.tls, "-a", "of/redis")
            self.servers[port] = Process(["redis-server", config], log, is_ready=is_ready)
        with open(config, "a") as file:
            file.write(f"replicaof 127.0.0.1 {ports[0]}\nrepl-diskless-sync-delay 0\n")
        config = folder / "sentinel.conf"
        config.write_text(f"""{tls}
tls-port {self.port}
dir {folder}
requirepass of/sentinel
sentinel monitor main 127.0.0.1 {ports[0]} 1
sentinel auth-pass main of/redis
sentinel down-after-milliseconds main 2000
sentinel failover-timeout main 10000
""")
        self.command = ["redis-server", config, "--sentinel"]
        self.is_ready = lambda: "master-link-status\nok" in self.ask("replicas", "main")
        url = "sentinel://:of%2Fredis@127.0.0.1:"
        self.variables = {
            "CELERY_BROKER_URL": f"{url}{away}/0;{url}{self.port}/0",
            "CELERY_RESULT_BACKEND": f"{url}{away}/1;{url}{self.port}/1",
            "VISIBILITY_SECONDS": REDELIVERY,
            "REDIS_SENTINEL_MASTER": "main",
            "REDIS_SENTINEL_PASSWORD": "of/sentinel",
            "REDIS_SENTINEL_CA_CERTS": self.certificate,
        }

    def ask(self, *words):
        """Return what Sentinel answers to this command."""
        place = *self.tls, "-p", str(self.port), "-a", "of/sentinel"
        command = ["redis-cli", *place, "sentinel", *words]
        return subprocess.run(command, capture_output=True, text=True).stdout

    def set_failover_delay(self, seconds):
        """Set how long Sentinel waits for the master before it promotes the replica."""
        assert self.ask("set", "main", "down-after-milliseconds", str(seconds * 1000)) == "OK\n"

    @property
    def master(self):
        """The server that Sentinel names as master."""
        return self.servers[int(self.ask("get-master-addr-by-name", "main").split()[1])]

    def launch(self):
        for server in self.servers.values():
            if not server.is_running():
                server.start()
        super().launch()

    def kill(self):
        super().kill()
        for server in self.servers.values():
            server.end()

    def recover(self):
        started = [server.recover() for server in self.servers.values()]
        return super().recover() or any(started)


class RabbitMQ(Broker):
    server = "rabbitmq"
    answers = {"broker": "rabbitmq", "result_backend": "none"}

    def __init__(self, folder, project=None, port=None):
        need("rabbitmq-server")
        free, *others = free_ports(3)
        self.port = port or free
        self.variables = {"CELERY_BROKER_URL": f"amqp://guest:guest@127.0.0.1:{self.port}//"}
        command, env = rabbitmq(folder, self.port, *others, REFUSE_TRANSIENT)
        is_ready = partial(ask, self.port, b"AMQP\0\0\x09\x01")
        super().__init__(folder, command, is_ready=is_ready)
        self.options["env"] = env

    def launch(self):
        self.is_restart = self.process is not None
        if self.is_restart:  # killed, RabbitMQ 4.0 with this setting doesn't always boot
            name = "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"
            self.options["env"][name] = self.options["env"][name].replace(REFUSE_TRANSIENT, "")
        super().launch()

    def wait_until_ready(self):
        """Killed soon after it made a quorum queue, RabbitMQ 3.10 forgets to elect its leader."""
        super().wait_until_ready()
        if self.is_restart:
            self.control("eval", ELECT_LEADERS)

    def control(self, *words):
        """Run rabbitmqctl and return what it prints."""
        options = {"env": self.options["env"], "stdout": subprocess.PIPE, "text": True}
        return subprocess.run(["rabbitmqctl", *words], check=True, **options).stdout

    @contextmanager
    def policy(self, name, *words):
        """Have the policy that this command of rabbitmqctl sets until the block ends."""
        self.control(*words)
        try:
            yield
        finally:
            self.control("clear_policy", name)


class SQS(Broker):
    """moto, which keeps nothing: after a restart, queues and table are created again, empty."""

    answers = {"broker": "sqs", "result_backend": "none"}

    def __init__(self, folder, project):
        [self.port] = free_ports(1)
        self.project = project
        url = f"http://127.0.0.1:{self.port}"
        self.variables = {"AWS_ENDPOINT_URL": url, "VISIBILITY_SECONDS": REDELIVERY}
        command = [project / ".venv/bin/python", "-m", "moto.server", "--port", str(self.port)]
        super().__init__(folder, command, is_ready=partial(connects, self.port))

    def wait_until_ready(self):
        super().wait_until_ready()
        code = "import dev; dev.prepare_aws()"
        self.project.manage("shell", "-v0", "-c", code, **self.variables)


BROKERS = {"redis": Redis, "rabbitmq": RabbitMQ, "sqs": SQS}
SETUPS = {**BROKERS, "redis-sentinel": RedisSentinel}
BACKENDS = {"redis": Redis, "dynamodb": SQS}  # those that need a server
SERVERS = {each.server: each for each in (*BROKERS.values(), *BACKENDS.values()) if each.server}


def versions():
    """Return the versions of the servers that tests start."""
    commands = "redis-server --version", "rabbitmqctl version", "postgres --version"
    answers = [subprocess.check_output(each.split(), text=True) for each in commands]
    numbers = (re.search(r"[0-9]+(\.[0-9]+)+", answer)[0] for answer in answers)
    return dict(zip(("redis-server", "rabbitmq", "postgresql"), numbers, strict=True))


def broker_class(name):
    """Return the class of a broker or of a setup of one. Skip the test if there is none."""
    if name not in SETUPS:
        missing(f"tests/harness/servers.py has no class that starts and kills {name}")
    return SETUPS[name]


@contextmanager
def real(project, folder):
    """Start the servers of an output's broker and result backend. Give their addresses.

    A server without a class here is left to `make run`, and never replaced by another server.
    """
    variables, parts = project.free_servers(), chosen(**project.answers)
    used = {"CELERY_BROKER_URL": parts.broker, "CELERY_RESULT_BACKEND": parts.result_backend}
    used = {name: part.server for name, part in used.items() if part.server in SERVERS}
    places = {(server, urlsplit(variables[name]).port) for name, server in used.items()}
    with started(*(SERVERS[server](folder / str(port), port=port) for server, port in places)):
        yield variables


def backend_class(answers):
    """Return the class of a result backend's server, or None if it needs none."""
    if chosen(**answers).result_backend.server:
        return BACKENDS[answers.get("result_backend", DEFAULTS["result_backend"])]
    return None


def servers_of(project, folder):
    """Make the server of a project's broker, and that of its result backend if it is another."""
    broker = BROKERS[project.answers["broker"]]
    classes = dict.fromkeys([broker, backend_class(project.answers) or broker])
    return [each(folder / each.__name__, project) for each in classes]


def variables_of(servers, project):
    """Return the variables of these servers of a project: the first one is the broker.

    A Redis has URLs for both, and Celery prefers these variables to the project's settings.
    """
    found = dict(ChainMap(*(server.variables for server in servers)))
    if "CELERY_BROKER_URL" not in servers[0].variables:
        found.pop("CELERY_BROKER_URL", None)
    if backend_class(project.answers) is not Redis:
        found.pop("CELERY_RESULT_BACKEND", None)
    return found


class PostgreSQL(Process):
    def __init__(self, *settings, password=None):
        """`settings` are strings such as "fsync=off". Without a password, anybody may log in."""
        need("postgres", "postgresql")
        self.binaries = Path(shutil.which("postgres")).parent
        [self.port] = free_ports(1)
        self.url = f"postgres://postgres@127.0.0.1:{self.port}"
        self.folder = Path(tempfile.mkdtemp(prefix="postgresql-"))  # open to `postgres`
        user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        if user:
            shutil.chown(self.folder, **user)
        data = self.folder / "data"
        options = f"-U postgres -E UTF8 --locale C -N -D {data} -A "
        options += "scram-sha-256" if password else "trust"
        if password:
            file = self.folder / "password"
            file.write_text(password)
            file.chmod(0o644)  # for `postgres`
            options += f" --pwfile {file}"
        initdb = [self.binaries / "initdb", *options.split()]
        subprocess.run(initdb, check=True, cwd=self.folder, stdout=subprocess.DEVNULL, **user)
        options = f"-D {data} -p {self.port} -k {self.folder} -h 127.0.0.1"
        command = [self.binaries / "postgres", *options.split()]
        command += [f"-c{setting}" for setting in settings]
        log = self.folder / "log"
        super().__init__(command, log, is_ready=self.accepts, cwd=self.folder, **user)

    def run(self, tool, *options):
        place = f"-h 127.0.0.1 -p {self.port} -U postgres".split()
        return subprocess.run([self.binaries / tool, *place, *options]).returncode == 0

    def accepts(self):
        return self.run("pg_isready", "--quiet")

    def create(self, name):
        """Create a database; return its URL."""
        assert self.run("createdb", name)
        return f"{self.url}/{name}"

    def signal_all(self, number):
        """Signal each child, too: the children have their own sessions."""
        for pid in [self.pid, *children_of(self.pid)]:
            with suppress(ProcessLookupError):  # one has just ended
                os.kill(pid, number)

    def kill(self):
        """Stop at once. At its next start, the server recovers as after a crash."""
        self.signal_all(signal.SIGQUIT)
        self.resume()  # for a child that is paused
        self.wait()

    def end(self):
        super().end()
        shutil.rmtree(self.folder)
