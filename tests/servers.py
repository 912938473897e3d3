"""Real servers for the tests, each on a port and in a folder of its own."""

import os
import shutil
import subprocess
from contextlib import contextmanager

from conftest import missing
from project import free_ports, wait_for


@contextmanager
def redis(folder):
    """A Redis: gives the variables that point to it."""
    if not shutil.which("redis-server"):
        missing("redis-server is not installed")
    [port] = free_ports(1)
    command = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "yes"]
    process = subprocess.Popen([*command, "--dir", folder], stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}"
    try:
        yield {"CELERY_BROKER_URL": f"{url}/0", "CELERY_RESULT_BACKEND": f"{url}/1"}
    finally:
        process.terminate()
        process.wait()
