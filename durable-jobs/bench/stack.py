"""The contestants: outputs with production settings, bare Celery, rivals; and PostgreSQL."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.bake import ABOUT, TEMPLATE, WITH_JOBS
from harness.project import Project, children_of, connects, env, free_ports, processes_in, wait_for

BENCH = Path(__file__).parent
TICKS = os.sysconf("SC_CLK_TCK")  # for each second
WAL = r"""
SELECT current_setting('server_version_num')::int >= 180000 AS counts_io \gset
\if :counts_io
SELECT sum(fsyncs), (SELECT wal_bytes FROM pg_stat_wal) FROM pg_stat_io WHERE object = 'wal';
\else
SELECT wal_sync, wal_bytes FROM pg_stat_wal;
\endif
"""
RIVALS = [
    *(each for each in ABOUT["dependency-groups"]["test"] if str(each).startswith("django~")),
    "django-tasks-db[compat]~=0.13",
    "procrastinate[django]~=3.10",
    "psycopg[binary]~=3.3",
]


class Contestant:
    """A folder with the modules of inside/, in which workers run."""

    def __init__(self, folder, workers, environment):
        """`workers` has the worker's command line for each kind of task."""
        self.folder, self.workers, self.environment = folder, workers, environment
        self.log = folder.parent / f"{folder.name}.log"
        shutil.copytree(BENCH / "inside", folder, dirs_exist_ok=True)

    def create_database(self):
        server, _, name = self.environment["DATABASE_URL"].partition("?")[0].rpartition("/")
        connect = f"import psycopg; psycopg.connect('{server}/postgres', autocommit=True)"
        self.call("python", "-c", f"{connect}.execute('CREATE DATABASE {name}')")
        self.call("python", "-m", "django", "migrate", "-v0")

    @contextmanager
    def running(self, command):
        """Run a command line until the block ends; yield its process."""
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

    def working(self, kind, **variables):
        """Run the worker for this kind of task with these variables until the block ends."""
        settings = " ".join(f"{name}={value}" for name, value in variables.items())
        return self.running(f"{settings} {self.workers[kind]}")

    def ask(self, function, *arguments):
        """Call `module.function` of inside/ in the contestant; return its result."""
        command = ["python", "ask.py", *function.split("."), json.dumps(arguments)]
        return json.loads(self.call(*command))

    def call(self, *command):
        return self.folder.call(*command, **self.environment)

    def send(self, kind, count, path, *arguments, **options):
        """Send tasks; return the rates of sending.send(). done() waits for these tasks."""
        self.sent, *rates = self.ask(
            "sending.send", kind, count, [str(path), *(arguments or (0, 0))], options
        )
        return rates

    def done(self, path):
        """Wait until the tasks that were sent are done; return how many were done a second.

        The time begins when the first task starts, so the start of the worker does not count.
        """
        lines = self.wait_for_lines(path, self.sent)
        starts, ends = zip(*(map(float, line.split()) for line in lines), strict=True)
        return len(lines) / (max(ends) - min(starts))

    def wait_for_lines(self, path, count):
        """Wait until `count` tasks have written their lines; return all lines."""
        until, lines = time.monotonic() + 300, []
        while len(lines) < count:
            assert time.monotonic() < until, self.log.read_text()[-5000:]
            time.sleep(0.2)
            lines = path.read_text().splitlines() if path.exists() else []
        return lines


class Output(Contestant):
    """A baked project with a database of its own."""

    def __init__(self, folder, database, broker_url, **answers):
        name = "_".join(["bench", *answers.values()])
        self.answers = answers
        answers = {"project_name": name, **WITH_JOBS, "result_backend": "none", **answers}
        given = [f"{option}={answer}" for option, answer in answers.items()]
        options = ["--default-config", "--no-input", "--output-dir", folder]
        folder.run("cookiecutter", TEMPLATE, *options, *given)
        project = Project(folder / name)
        project.install()
        environment = {
            **project.production(),
            "ALLOWED_HOSTS": "127.0.0.1",
            "CELERY_BROKER_URL": broker_url,
            "DATABASE_URL": f"{database}/{name}?prepare_threshold=0",
            "DEBUG": "False",
            "DJANGO_SETTINGS_MODULE": "config.settings",
            "EMAIL_BACKEND": "django.core.mail.backends.dummy.EmailBackend",
            "FLOWER_BASIC_AUTH": "user:password",
            "FLOWER_PORT": free_ports(1)[0],
            "PATH": f"{project}/.venv/bin:{os.environ['PATH']}",
            "SOFT_SHUTDOWN_SECONDS": 1,
            "THROTTLE": "100000/s",  # a short period: the throttle keeps a list of its requests
        }
        worker = re.search("^worker: .*(celery .+)$", project.read("Procfile.dev"), re.MULTILINE)[1]
        worker += " --include work_tasks"
        super().__init__(project, {"plain": worker, "job": worker}, environment)
        urls = "\nimport plain_view\n\nurlpatterns += plain_view.urlpatterns\n"
        project.append("config/urls.py", urls)
        limits = '\nDURABLE_JOBS["LIMITS"] = {"five": "5", "one": "1", "rated": "60/min"}\n'
        project.append("config/settings.py", limits)
        self.call("python", "manage.py", "collectstatic", "--noinput", "-v0")  # for the admin
        self.create_database()

    def shell(self, code):
        """Run Python code in the project; return the last word that it prints."""
        code = f"import os; from django.conf import settings\n{code}"
        return self.call("python", "manage.py", "shell", "-v0", "-c", code).split()[-1]

    def beat(self):
        """Run Beat until the block ends."""
        return self.running("celery -A config beat")

    @contextmanager
    def web(self):
        """Run gunicorn as docs/production.md says until the block ends; yield process and port."""
        [port] = free_ports(1)
        command = re.search("`(gunicorn .+?)`", self.folder.read("docs/production.md"))[1]
        with self.running(f"{command} --bind 127.0.0.1:{port}") as process:
            wait_for(lambda: connects(port), 30)
            yield process, port

    def memory(self, process):
        """Return [RSS, PSS] in MB of this process, then of each process that it started."""
        ours = [pid for pid in processes_in(self.folder) if os.getsid(pid) == process.pid]
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in sorted(ours)]
        kinds = ["^Rss: +([0-9]+)", "^Pss: +([0-9]+)"]
        return [[int(re.search(kind, text, re.M)[1]) / 1024 for kind in kinds] for text in rollups]


class Rivals(Contestant):
    """A project with other durable queues that people could choose instead.

    Two slots each: Procrastinate's worker runs two jobs at once. A worker of django-tasks-db runs
    one, so there are two.
    """

    def __init__(self, folder, database):
        folder = Project(folder / "rivals")
        folder.mkdir()
        folder.call("uv", "venv", "--quiet", ".venv")
        folder.call("uv", "pip", "install", "--quiet", "--python", ".venv/bin/python", *RIVALS)
        environment = {
            "DATABASE_URL": f"{database}/rivals",
            "DJANGO_SETTINGS_MODULE": "rivals.settings",
            "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}",
        }
        workers = {
            "procrastinate": "python -m django procrastinate worker --concurrency 2",
            "django-tasks": "sh -c '{0} & exec {0}'".format(
                "python -m django db_worker --no-startup-delay"
            ),
        }
        super().__init__(folder, workers, environment)
        self.create_database()


def bare(output, **variables):
    """Return bare Celery with the packages and the broker of an output."""
    folder = Project(output.folder.parent / "_".join([output.folder.name, "bare", *variables]))
    worker = "celery -A bare worker --loglevel INFO --include work_tasks"
    environment = {**output.environment, "DJANGO_SETTINGS_MODULE": "", **variables}
    return Contestant(folder, {"plain": worker}, environment)


def flushes(database):
    """Return how often PostgreSQL flushed its log to disk, without flushes by open connections."""
    return wal(database)[0]


def wal(database):
    """Return how often PostgreSQL flushed its log to disk, and how many bytes it has written."""
    command = [database.binaries / "psql", "-qAt", f"{database.url}/postgres"]
    answer = subprocess.run(command, input=WAL, capture_output=True, text=True, check=True)
    return [int(number) for number in answer.stdout.split("|")]


def pgbench(database, url, script, clients, seconds):
    """Run a script. Return its runs a second and, of each run, CPU-ms, flushes and bytes of WAL."""
    options = f"--no-vacuum --protocol prepared --client {clients} --time {seconds}"
    command = [database.binaries / "pgbench", *options.split(), "--file", script, url]
    before = sum(cpu_ms(database.pid)), *wal(database)
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    time.sleep(1)  # until PostgreSQL has counted the flushes of ended connections
    used = sum(cpu_ms(database.pid)), *wal(database)
    count = int(re.search("actually processed: ([0-9]+)", run.stdout)[1])
    assert "failed transactions: 0 " in run.stdout, run.stdout
    return count / seconds, *((b - a) / count for a, b in zip(before, used, strict=True))


def cpu_ms(pid):
    """Return the CPU-ms that a process and its descendants have used: [itself, the others]."""
    try:
        *_, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:  # it has just ended, so its parent counts it
        return [0, 0]
    user, system, *ended = (int(ticks) * 1000 / TICKS for ticks in rest.split()[11:15])
    return [user + system, sum(ended) + sum(sum(cpu_ms(child)) for child in children_of(pid))]
