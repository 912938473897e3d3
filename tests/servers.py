"""Real servers for the tests, each on a port and in a folder of its own."""

import os
import shutil
import signal
import socket
import subprocess
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

from conftest import missing
from project import connects, free_ports, wait_for


@contextmanager
def real(variables, folder):
    """Start a server wherever these variables of a project point to, if we have one for its URL."""
    places = {(urlsplit(url).scheme, urlsplit(url).port) for url in variables.values()}
    with ExitStack() as stack:
        for scheme, port in places:
            if scheme in SCHEMES:
                stack.enter_context(SCHEMES[scheme](folder, port))
        yield variables


@contextmanager
def redis(folder, port=None):
    """A Redis: gives the variables that point to it."""
    if not shutil.which("redis-server"):
        missing("redis-server is not installed: sudo apt install redis-server")
    port = port or free_ports(1)[0]
    command = ["redis-server", "--port", str(port), "--save", "", "--dir", folder]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}"
    try:
        wait_for(lambda: connects(port), 60)
        yield {"CELERY_BROKER_URL": f"{url}/0", "CELERY_RESULT_BACKEND": f"{url}/1"}
    finally:
        process.kill()
        process.wait()


def rabbitmq_command(folder, port=None):
    """What starts a RabbitMQ: its command, environment and port."""
    # What Debian has on PATH changes the user; the scripts themselves stand here.
    path = f"/usr/lib/rabbitmq/bin:{os.environ['PATH']}"
    if not shutil.which("rabbitmq-server", path=path):
        missing("rabbitmq-server is not installed: sudo apt install rabbitmq-server")
    distribution, epmd, free = free_ports(3)
    port = port or free
    environment = {
        "PATH": path,
        "HOME": folder,  # where Erlang puts its cookie
        "LANG": "C.UTF-8",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": epmd,
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_CONFIG_FILE": folder / "rabbitmq",
        "RABBITMQ_DIST_PORT": distribution,
        "RABBITMQ_ENABLED_PLUGINS_FILE": folder / "plugins",
        "RABBITMQ_LOG_BASE": folder / "log",
        "RABBITMQ_MNESIA_BASE": folder / "data",
        "RABBITMQ_NODENAME": f"test{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": port,
        "RABBITMQ_PID_FILE": folder / "pid",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none",  # no busy waiting
    }
    command = ["sh", "-c", "epmd & exec rabbitmq-server"]  # one group, so that both end at once
    return command, {name: str(value) for name, value in environment.items()}, port


@contextmanager
def rabbitmq(folder, port=None):
    """A RabbitMQ: gives the variables that point to it."""
    command, environment, port = rabbitmq_command(folder, port)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: speaks_amqp(port), 60)
        yield {"CELERY_BROKER_URL": f"amqp://guest:guest@127.0.0.1:{port}//"}
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def speaks_amqp(port):
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
            probe.sendall(b"AMQP\0\0\x09\x01")
            return probe.recv(1)
    except OSError:
        return False


SCHEMES = {"redis": redis, "amqp": rabbitmq}
