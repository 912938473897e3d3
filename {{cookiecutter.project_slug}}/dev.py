{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import broker, servers with context %}
{% set lines %}
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
{% for server in servers %}
{% print server.dev_imports %}
{% endfor %}
{% endset %}
{% set sorted = imports.sort(lines) %}
"""`make run`: the whole project on this machine, for development. Ctrl-C ends all of it."""

{{ sorted }}
import django
from django.conf import settings
from django.core.management import call_command

HOST = "127.0.0.1"
STOP = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]  # Ctrl-C, kill, the terminal closes


def main():
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    os.environ.setdefault("SOFT_SHUTDOWN_SECONDS", "1")  # what runs longer runs again next time
    for name, port in {"PORT": "8000"{{ ', "FLOWER_PORT": "5555"' if broker.flower }}}.items():
        port = os.environ.setdefault(name, port)
        if answers(port):
            sys.exit(f"Port {port} is taken. Choose another one: {name}={int(port) + 1} make run")
    django.setup()
    call_command("migrate", verbosity=0)
    links = describe()
    for number in STOP:
        signal.signal(number, signal.default_int_handler)
    processes = []
    try:
{% for server in servers %}
        processes += start_{{ server.name }}()
{% endfor %}
        # The environment is .env already, and wins over it; honcho would turn that round.
        # In a session of its own: Ctrl-C reaches it through here, before the broker ends.
        command = ["honcho", "--env", os.devnull, "start"]
        honcho = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        processes.append(honcho)
        ready = threading.Event()
        threading.Thread(target=copy, args=[honcho.stdout, ready], daemon=True).start()
        terminal = os.isatty(1)
        while all(process.poll() is None for process in processes):
            time.sleep(0.2)
            with suppress(SystemExit):  # one elsewhere may come back by itself
{% for server in servers %}
                processes[:0] = start_{{ server.name }}()  # that of another project has ended
{% endfor %}
            if terminal and not os.isatty(1):  # it was closed
                raise KeyboardInterrupt
            if links and ready.is_set() and answers(os.environ["PORT"]):
                print(f"{links}\n    Ctrl-C ends everything.\n\n", flush=True)
                links = None
        failure = "A process has ended (the lines above say which and why), so all were stopped."
    except KeyboardInterrupt:
        failure = None
    finally:
        for number in STOP:
            signal.signal(number, signal.SIG_IGN)
        for process in reversed(processes):
            process.terminate()
            process.wait()
    sys.exit(failure)


def reload(command):
    """`python dev.py COMMAND`: start it anew whenever the code changes; end when it ends.

    Not where it ends with an error after a change: that one will be mended, by the next.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    changed = False
    while True:
        code = read_code()
        process = subprocess.Popen(command)
        try:
            while (status := process.poll()) is None and code == read_code():
                time.sleep(0.5)
            if status is not None and not (changed and status > 0):
                sys.exit(status)
            if status is not None:
                print("Ended with an error; starts anew after a change:", *command, flush=True)
            while code == read_code():
                time.sleep(0.5)
            changed = True
            print("The code has changed, so this starts anew:", *command, flush=True)
        except KeyboardInterrupt:
            sys.exit()
        finally:
            process.terminate()
            process.wait()


def read_code():
    """When each file was written. Files are looked at: what a container sees tells it no events."""
    try:
        files = [file for folder in Path().glob("[!.]*/") for file in folder.rglob("*.py")]
        return {file: file.stat().st_mtime for file in files if file.exists()}
    except OSError:  # one went meanwhile, with its folder perhaps
        return read_code()


def copy(output, ready):
    """Print what honcho prints, and set `ready` once the worker is; stop if nobody reads it."""
    for line in output:
        try:
            os.write(1, line)
        except OSError:
            os.kill(os.getpid(), signal.SIGTERM)
        if b" ready." in line and b"celery@" in line:
            ready.set()


def describe():
    """Create the user of DJANGO_SUPERUSER_… if it is missing; return the links and two commands."""
    from django.contrib.auth import get_user_model
    from rest_framework.authtoken.models import Token

    name, password = (os.environ[f"DJANGO_SUPERUSER_{x}"] for x in ("USERNAME", "PASSWORD"))
    users = get_user_model().objects.filter(username=name)
    if not users.exists():
        call_command("createsuperuser", interactive=False, verbosity=0)
    token, _ = Token.objects.get_or_create(user=users.get())
{% if broker.flower %}
    flower = os.environ["FLOWER_BASIC_AUTH"].replace(":", " / ")
{% endif %}
    web = f"http://{HOST}:{os.environ['PORT']}"
    curl = f"curl -H 'Authorization: Token {token}' {web}/api"
    return f"""
    Jobs     {web}/    {name} / {password}
    Admin    {web}/admin/
    API      {web}/api/docs/
{% if broker.flower %}
    Flower   http://{HOST}:{os.environ["FLOWER_PORT"]}/    {flower}
{% endif %}

{% if cookiecutter.include_example %}
    Place an order, then follow its job:
    {curl}/orders/ -H 'Content-Type: application/json' \\
        -d '{% raw %}{{"product": "Tea"}}{% endraw %}'
    {curl}/jobs/
{% else %}
    See the jobs (README.md says how to write one):
    {curl}/jobs/
{% endif %}
"""


def answers(port, host=HOST):
    try:
        socket.create_connection((host, port), timeout=1).close()
        return True
    except OSError:
        return False


{% for server in servers %}
{% print server.dev %}


{% endfor %}
if __name__ == "__main__":
    reload(sys.argv[1:]) if sys.argv[1:] else main()
