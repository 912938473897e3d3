"""Real servers that tests start, kill and start again, each with its own port and folder."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from unittest import SkipTest

# Servers of other versions, made by .ci/servers, come first. Debian's commands for RabbitMQ change
# the user: before them come the scripts themselves.
FOLDERS = os.environ.get("SERVERS"), "/usr/lib/rabbitmq/bin", os.environ["PATH"]
os.environ["PATH"] = os.pathsep.join(filter(None, FOLDERS))

LIMIT = 300  # seconds of every wait: a machine may be far slower than ours


def missing(reason):
    """Skip the test because this machine lacks something. With DEMAND_ALL set, fail it."""
    raise AssertionError(reason) if os.environ.get("DEMAND_ALL") else SkipTest(reason)


def need(program, package=None):
    """Call missing() unless this program is installed. `package` is Debian's."""
    if not shutil.which(program):
        missing(f"{program} is not installed: sudo apt install {package or program}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, what):
    """Wait until this function returns something true, and return that."""
    deadline = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {LIMIT} s: {what}"
        time.sleep(0.05)
    return found


class Process:
    """A command in a process group of its own, whose output goes to a file."""

    def __init__(self, command, log, **options):
        self.command = [str(word) for word in command]
        self.log, self.popen = log, options
        self.process = None

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                **self.popen,
            )
        return self

    @property
    def pid(self):
        return self.process.pid

    def signal(self, number):
        """Send a signal to the process, but not to its children."""
        os.kill(self.pid, number)

    def kill(self):
        """Kill the process and its children, as a container's end does."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(LIMIT)

    def wait(self):
        """Wait until the process has ended, and return its exit code."""
        return self.process.wait(LIMIT)

    def is_running(self):
        return self.process.poll() is None

    def text(self):
        return self.log.read_text(errors="replace")

    def __enter__(self):
        return self if self.process else self.start()

    def __exit__(self, *error):
        if self.process:
            self.kill()
        print(f"--- {self.log.name}\n{self.text()}")  # pytest shows it if the test fails


class Server(Process):
    transport_options = {}

    def __init__(self, folder, command, **options):
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(command, folder / "log", cwd=folder, **options)

    def start(self):
        super().start()

        def is_ready():
            assert self.is_running(), self.text()
            return self.is_ready()

        until(is_ready, f"{self.command[0]} answers")
        return self


def ask(port, sent):
    """Return what a server answers to these bytes, or None if it doesn't listen."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as probe:
        probe.sendall(sent)
        return probe.recv(100)


class Redis(Server):
    transport = "celery_steady.redis:Transport"
    # Look for messages of dead workers each second. Before kombu 5.7 it is each 10.
    transport_options = {"unacked_restore_interval": 1}

    def __init__(self, folder):
        need("redis-server")
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        # A killed Redis loses nothing without fsync, for which clients would wait on a busy disk.
        words = "--save", "", "--appendonly", "yes", "--appendfsync", "no"
        super().__init__(folder, ["redis-server", "--port", self.port, "--dir", folder, *words])

    def is_ready(self):
        return ask(self.port, b"PING\r\n") == b"+PONG\r\n"  # not while it loads its data


class SQS(Server):
    """moto, which keeps nothing: after a restart, there are no queues."""

    transport = "celery_steady.sqs:Transport"

    def __init__(self, folder):
        own = [sys.executable, "-m", "moto.server"] if find_spec("moto") else ["moto_server"]
        need(own[0])
        self.port = free_port()
        self.url = "sqs://name:password@"
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.transport_options = {
            "region": "eu-central-1",
            "wait_time_seconds": 1,
            "is_secure": False,
            "endpoint_url": self.endpoint,
        }
        super().__init__(folder, [*own, "--port", self.port])

    def is_ready(self):
        return ask(self.port, b"GET / HTTP/1.0\r\n\r\n")


def rabbitmq(folder, port, distribution_port, epmd_port, arguments=""):
    """Return the command of a RabbitMQ that has its data in this folder, and its environment."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": folder,  # for Erlang's cookie
        "LANG": "C.UTF-8",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": epmd_port,
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_CONFIG_FILE": folder / "rabbitmq",
        "RABBITMQ_DIST_PORT": distribution_port,
        "RABBITMQ_ENABLED_PLUGINS_FILE": folder / "plugins",
        "RABBITMQ_LOG_BASE": folder / "log.d",
        "RABBITMQ_MNESIA_BASE": folder / "data",
        "RABBITMQ_NODENAME": f"test{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": port,
        "RABBITMQ_PID_FILE": folder / "pid",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"+S 2:2 +sbwt none {arguments}",  # no busy waiting
    }
    # One process group, so that both end together.
    command = ["sh", "-c", "epmd & exec rabbitmq-server"]
    return command, {name: str(value) for name, value in environment.items()}


class RabbitMQ(Server):
    transport = None  # Celery's own
    transport_options = {"confirm_publish": True}

    def __init__(self, folder):
        need("rabbitmq-server")
        self.port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        command, env = rabbitmq(folder, self.port, free_port(), free_port())
        super().__init__(folder, command, env=env)

    def is_ready(self):
        return ask(self.port, b"AMQP\0\0\x09\x01")
