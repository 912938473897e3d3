{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import servers, has_flower, flower_port with context %}
{% set lines %}
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from io import StringIO
from pathlib import Path
{% for server in servers %}
{% print server.dev_imports %}
{% endfor %}
{% endset %}
{% set sorted = imports.sort(lines) %}
"""`make run`: run the whole project on this machine, for development. Ctrl-C stops everything."""

{{ sorted }}
import django
from django.conf import settings
from django.core.management import call_command


def main():
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    django.setup()  # reads .env, too
    os.environ.setdefault("SOFT_SHUTDOWN_SECONDS", "1")  # longer tasks start again later
    os.environ["PYTHONUNBUFFERED"] = "1"  # show what is printed at once
    for name, port in {"PORT": "8000"{{ ', "FLOWER_PORT": "%s"' % flower_port if has_flower }}}.items():
        port = os.environ.setdefault(name, port)
        if answers(port):
            sys.exit(f"Port {port} is taken. Choose another one: {name}={int(port) + 1} make run")
    call_command("migrate", verbosity=0)
    call_command("quickstart", stdout=(links := StringIO()))
    processes = []
    try:
{% for server in servers %}
        processes += start_{{ server.name }}()
{% endfor %}
        # Without .env, whose values would override the environment's. In its own session it doesn't
        # get Ctrl-C, so it ends before the broker.
        command = ["honcho", "--env", os.devnull, "--procfile", "Procfile.dev", "start"]
        honcho = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        processes.insert(0, honcho)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *args: honcho.terminate())
        for line in honcho.stdout:
            with suppress(OSError):  # after its terminal was closed, honcho itself would not end
                os.write(1, line)
            if links and answers(os.environ["PORT"]):
                print(f"{links.getvalue()}\n    Ctrl-C stops everything.\n", flush=True)
                links = None
        if honcho.wait() != 128 + signal.SIGTERM:
            sys.exit("A process exited, so the rest were stopped; see the log above.")
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def watch(*command):
    """Run a command again when the code changes, or when it has ended: watchfiles ignores that."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `finally` stops the process
    while True:
        code, began = read_code(), time.monotonic()
        process = subprocess.Popen(command)
        try:
            # If it can't start, wait for a change, which may fix it, or for ten seconds.
            while code == read_code() and (process.poll() is None or time.monotonic() < began + 10):
                time.sleep(0.5)
        finally:
            process.terminate()
            process.wait()
        print("Starting again:", *command, flush=True)


def read_code():
    # Times of files, because a container gets no events from a folder that it mounts.
    with suppress(OSError):  # a file was just removed: None is a change, too
        files = (file for file in Path().glob("[!.]*/**/[!.]*") if file.suffix in (".py", ".html"))
        return {file: file.stat().st_mtime for file in files}


def answers(port, host="127.0.0.1"):
    with suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True


{% for server in servers %}
{% print server.dev %}


{% endfor %}
if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        watch(*sys.argv[1:]) if sys.argv[1:] else main()
