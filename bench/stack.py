"""What is measured: outputs in production's settings, bare Celery, and the servers they need."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.bake import TEMPLATE
from harness.project import Project, connects, env, free_ports, processes_in, wait_for
from harness.servers import PostgreSQL

BENCH = Path(__file__).parent


class Contestant:
    """A folder in which a worker runs: tasks are sent to it with send.py."""

    def __init__(self, folder, worker, environment):
        self.folder = folder
        self.worker = f"{worker} --include work"
        self.environment = environment
        self.log = folder.parent / f"{folder.name}.log"
        for file in ("work.py", "send.py"):
            shutil.copy(BENCH / file, folder)

    @contextmanager
    def running(self, command):
        """Run a command line; gives its process."""
        with open(self.log, "a") as log:
            process = subprocess.Popen(
                ["sh", "-c", f"exec env {command}"],
                cwd=self.folder,
                env=env(**self.environment),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def send(self, kind, mode, count, path, **arguments):
        """What send.py prints: how many were sent a second, or the seconds that each took."""
        sent = json.dumps(arguments)
        command = ["python", "send.py", kind, mode, str(count), path, sent]
        return json.loads(self.call(*command))

    def call(self, *command):
        return self.folder.call(*command, **self.environment)

    def done(self, path, count):
        """Wait until `count` tasks are done; return how many were so a second.

        From the start of the first one: that of the worker does not count.
        """
        until, lines = time.monotonic() + 300, []
        while len(lines) < count:
            assert time.monotonic() < until, self.log.read_text()[-5000:]
            time.sleep(0.2)
            lines = path.read_text().splitlines() if path.exists() else []
        starts, ends = zip(*(map(float, line.split()) for line in lines), strict=True)
        return len(lines) / (max(ends) - min(starts))


class Output(Contestant):
    """A baked project with a database of its own."""

    def __init__(self, folder, database, broker_url, **answers):
        name = "_".join(["bench", *answers.values()])
        self.answers = answers
        answers = {"project_name": name, "result_backend": "none", **answers}
        given = [f"{option}={answer}" for option, answer in answers.items()]
        options = ["--default-config", "--no-input", "--output-dir", folder]
        folder.run("cookiecutter", TEMPLATE, *options, *given)
        project = Project(folder / name)
        project.install()
        environment = {
            **project.production(),
            "ALLOWED_HOSTS": "127.0.0.1",
            "CELERY_BROKER_URL": broker_url,
            "DATABASE_URL": f"{database}/{name}",
            "DEBUG": "False",
            "EMAIL_URL": "dummymail://",
            "FLOWER_BASIC_AUTH": "user:password",
            "FLOWER_PORT": free_ports(1)[0],
            "PATH": f"{project}/.venv/bin:{os.environ['PATH']}",
            "SOFT_SHUTDOWN_SECONDS": 1,
            "THROTTLE": "100000/s",  # a short period: the throttle lists all its requests
        }
        worker = re.search("^worker: .*(celery .+)$", project.read("Procfile"), re.MULTILINE)[1]
        super().__init__(project, worker, environment)
        connect = f"import psycopg; psycopg.connect('{database}/postgres', autocommit=True)"
        self.call("python", "-c", f"{connect}.execute('CREATE DATABASE {name}')")
        self.call("python", "manage.py", "migrate")

    def shell(self, code):
        """Run Python code in the project and return the last word that it prints."""
        code = f"import os; from django.conf import settings\n{code}"
        return self.call("python", "manage.py", "shell", "-v0", "-c", code).split()[-1]

    @contextmanager
    def web(self):
        """gunicorn as the README starts it: gives its process and its port."""
        [port] = free_ports(1)
        command = re.search("`(gunicorn .+?)`", self.folder.read("README.md"))[1]
        with self.running(command.replace("8000", str(port))) as process:
            wait_for(lambda: connects(port), 30)
            yield process, port

    def memory(self, process):
        """RSS and PSS in MB of this process and of those that it started, itself first."""
        ours = [pid for pid in processes_in(self.folder) if os.getsid(pid) == process.pid]
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in sorted(ours)]
        kinds = ["^Rss: +([0-9]+)", "^Pss: +([0-9]+)"]
        return [[int(re.search(kind, text, re.M)[1]) / 1024 for kind in kinds] for text in rollups]


def bare(output):
    """Bare Celery beside an output: the same packages, the same broker."""
    folder = Project(output.folder.parent / f"{output.folder.name}_bare")
    folder.mkdir()
    shutil.copy(BENCH / "bare.py", folder)
    return Contestant(folder, "celery -A bare worker --loglevel INFO", output.environment)


@contextmanager
def postgres():
    """A PostgreSQL: gives its URL, without the name of a database."""
    database = PostgreSQL("max_connections=300")
    database.start()
    try:
        yield database.url
    finally:
        database.remove()
