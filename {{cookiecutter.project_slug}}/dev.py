{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import servers, has_jobs, has_task_api, has_example, has_flower, flower_port with context %}
{% set lines %}
import itertools
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
"""`make run`: run the whole project on this machine, for development. Ctrl-C stops everything."""

{{ sorted }}
import django
from django.conf import settings
from django.core.management import call_command


def main():
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    django.setup()  # reads .env, too
    os.environ.setdefault("SOFT_SHUTDOWN_SECONDS", "1")  # longer tasks start again later
    for name, port in {"PORT": "8000"{{ ', "FLOWER_PORT": "%s"' % flower_port if has_flower }}}.items():
        port = os.environ.setdefault(name, port)
        if answers(port):
            sys.exit(f"Port {port} is taken. Choose another one: {name}={int(port) + 1} make run")
    call_command("migrate", verbosity=0)
    links = create_user_and_links()
    stop, ready = threading.Event(), threading.Event()
    # Ctrl-C, kill, a closed terminal, a pipe without a reader
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, lambda *args: stop.set())
    processes = []
    try:
{% for server in servers %}
        processes += start_{{ server.name }}()
{% endfor %}
        watched = "".join(f"{name}: python dev.py {name}\n" for name in read_procfile())
        # honcho must not read .env, or its values would override those of the environment.
        command = ["honcho", "--env", os.devnull, "--procfile", "/dev/stdin", "start"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # In its own session it doesn't get Ctrl-C, so `finally` can stop honcho first, then the broker.
        honcho = subprocess.Popen(command, **pipes, start_new_session=True)
        with honcho.stdin as procfile:
            procfile.write(watched.encode())
        processes.insert(0, honcho)
        threading.Thread(target=copy_output, args=[honcho.stdout, ready], daemon=True).start()
        # A closed terminal sends SIGHUP only to the session's leader, which may be a shell or make.
        # So the loop also checks whether the output is still a terminal.
        terminal = os.isatty(1)
        while os.isatty(1) == terminal and not stop.wait(0.1 if links else 2):
            if honcho.poll() is not None:
                sys.exit("A process exited, so the rest were stopped; see the log above.")
            processes = [process for process in processes if process.poll() is None]
            # Start a server again if it was killed, or if another project had started it and stopped
            # it. If it is on another machine, wait until it is back.
            with suppress(SystemExit):
{% for server in servers %}
                processes += start_{{ server.name }}()
{% endfor %}
            if links and ready.is_set() and answers(os.environ["PORT"]):
                print(f"{links}\n    Ctrl-C stops everything.\n\n", flush=True)
                links = None
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def copy_output(output, ready):
    """Print honcho's output, and set `ready` once the worker is ready."""
    for line in output:
        with suppress(OSError):  # nobody reads our output anymore
            os.write(1, line)
        if b" ready." in line and b"celery@" in line:
            ready.set()


def watch(name, *options):
    """`python dev.py NAME`: run this line of Procfile.dev.

    Restart the process when the code changes, a signal kills it, or it exits after more than ten
    seconds. If it exits earlier, exit with its status. But if that is after a restart, wait for the
    next change, which may fix it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `finally` stops the process
    command = " ".join(["exec", read_procfile()[name], *options])
    for restarts in itertools.count():
        code = read_code()
        process = subprocess.Popen(command, shell=True)
        try:
            reason = wait_for_reason(process, name, code, restarts)
            print(f"{reason}. Starting again: {name}", flush=True)
        finally:
            process.terminate()
            process.wait()


def wait_for_reason(process, name, code, restarts):
    """Wait until the process must start again, and return why. If it can't start, exit too."""
    began, ran = time.monotonic(), 0
    # Flower does not restart for new code: it would forget the tasks that it shows.
    while name == "flower" or code == read_code():
        time.sleep(0.5)
        if (status := process.poll()) is None:
            ran = time.monotonic() - began
        elif status < 0:
            return f"Killed by {signal.Signals(-status).name}"
        elif ran > 10:
            return f"Exited with status {status}"
        elif not restarts or not status:  # otherwise it waits for the next change
            sys.exit(status)
    return "The code has changed"


def read_procfile():
    """Return the commands of Procfile.dev, {name: command}."""
    return dict(line.split(": ", 1) for line in Path("Procfile.dev").read_text().splitlines())


def read_code():
    """Return when the project's code and templates were modified, {file: seconds}.

    The caller polls, because a container gets no events for changes in a folder that it mounts.
    """
    with suppress(OSError):  # a file or folder was just removed: None is a change too
        files = (file for file in Path().glob("[!.]*/**/[!.]*") if file.suffix in (".py", ".html"))
        return {file: file.stat().st_mtime for file in files}


def create_user_and_links():
    """Create the user of DJANGO_SUPERUSER_… if it is missing. Return links and commands."""
    from django.contrib.auth import get_user_model
    from rest_framework.authtoken.models import Token

    field = get_user_model().USERNAME_FIELD
    names = [f"DJANGO_SUPERUSER_{field.upper()}", "DJANGO_SUPERUSER_PASSWORD"]
    if missing := [name for name in names if not os.environ.get(name)]:
        sys.exit(f"Missing in .env: {', '.join(missing)}.")
    name, password = (os.environ[name] for name in names)
    users = get_user_model().objects.filter(**{field: name})
    if not users.exists():
        call_command("createsuperuser", interactive=False, verbosity=0)
    token, _ = Token.objects.get_or_create(user=users.get())
    web = f"http://127.0.0.1:{os.environ['PORT']}"
    curl = f"curl -H 'Authorization: Token {token}' {web}/api"
    return f"""
    {{ "Jobs" if has_jobs else "Page" }}     {web}/    {name} / {password}
    Admin    {web}/admin/
    API      {web}/api/docs/
{% if has_flower %}
    Flower   {settings.FLOWER_URL}    {settings.FLOWER_BASIC_AUTH.replace(":", " / ")}
{% endif %}

{% if has_example %}
    Place an order; {{ "then follow its job" if has_jobs else "a task confirms it by email, in .data/mail/" }}:
    {curl}/orders/ -H 'Content-Type: application/json' \\
        -d '{% raw %}{{"product": "Tea"}}{% endraw %}'
{% endif %}
{% if has_jobs %}
    {curl}/jobs/
{% elif has_example and has_task_api %}
    Start a report; its status is at the URL in the Location header:
    {curl}/orders/report/ -i -X POST
{% elif not has_example %}
    Your token opens the API, such as its schema:
    {curl}/schema/
{% endif %}
"""


def answers(port, host="127.0.0.1"):
    with suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True


{% for server in servers %}
{% print server.dev %}


{% endfor %}
if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        watch(*sys.argv[1:]) if sys.argv[1:] else main()
