"""A stack for the tests of faults: each process can be killed, paused and started by itself."""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from glob import glob
from http.client import HTTPConnection
from pathlib import Path

import servers
from conftest import missing
from project import connects, env, fetch, free_ports, wait_for

TIMINGS = {"JOB_LEASE_SECONDS": 3, "JOB_SWEEP_SECONDS": 0.3, "JOB_RESEND_SECONDS": 2}
VISIBILITY_TIMEOUT = 8  # seconds; of plain tasks
TASKS = '''
import os
import signal
import time
from pathlib import Path

from celery import shared_task
from django.db import Error, connection

from jobs.tasks import JobTask


def note(task, what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{what} {task.request.id} {os.getpid()}\\n")


def wait_for(gate):
    """Until the gate is there: for all, or for this process."""
    while not Path(gate).exists() and not Path(f"{gate}-{os.getpid()}").exists():
        time.sleep(0.05)


@shared_task(base=JobTask, bind=True)
def hold(self, gate):
    note(self, "start")
    wait_for(gate)
    note(self, "end")
    return os.getpid()


@shared_task(base=JobTask, bind=True)
def hold_then_retry(self, gate):
    note(self, "start")
    wait_for(gate)
    if not self.request.retries:
        raise self.retry(countdown=0)


@shared_task(base=JobTask, bind=True, time_limit=2)
def hold_too_long(self, gate):
    note(self, "start")
    wait_for(gate)


@shared_task(base=JobTask, bind=True)
def quick(self):
    note(self, "start")


@shared_task(base=JobTask, bind=True)
def die(self):
    note(self, "start")
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(base=JobTask, bind=True, autoretry_for=(Error,), default_retry_delay=1, max_retries=99)
def write(self, number, seconds):
    """What a body should be: safe to repeat, and repeated when the database is away."""
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO written VALUES (%s) ON CONFLICT DO NOTHING", [number])
    connection.close()
    note(self, "start")
    time.sleep(float(seconds))


@shared_task(bind=True)
def plain(self, gate):
    note(self, "start")
    wait_for(gate)
    note(self, "end")
'''
VIEWS = '''
import os
import signal

from django.db import transaction
from rest_framework.decorators import api_view
from rest_framework.response import Response

from jobs.models import Job

from . import tasks


@api_view(["POST"])
def enqueue(request):
    """Enqueue a job, once for each key; with "die", die between commit and publish."""
    task, key = getattr(tasks, request.data["task"]), request.data.get("key")
    with transaction.atomic():
        if request.data.get("die"):
            transaction.on_commit(lambda: os.kill(os.getpid(), signal.SIGKILL))
        job = Job.objects.filter(idempotency_key=key).exclude(idempotency_key=None).first()
        if not job:
            args, owner = request.data["args"], request.user
            job = Job.objects.enqueue(task, args, owner=owner, idempotency_key=key)
    return Response({"id": job.pk}, status=202)
'''
# Each final state that any row ever takes, and the rows that the task `write` writes.
TABLES = """
CREATE TABLE finals (job uuid, state text);
CREATE TABLE written (number integer PRIMARY KEY);
CREATE FUNCTION note_final() RETURNS trigger AS $$
BEGIN INSERT INTO finals VALUES (NEW.id, NEW.state); RETURN NEW; END $$ LANGUAGE plpgsql;
CREATE TRIGGER note_final AFTER UPDATE ON jobs_job FOR EACH ROW
WHEN (NEW.state IN ('succeeded', 'failed', 'cancelled')) EXECUTE FUNCTION note_final();
"""
# Runs what it is sent, one JSON text a line, and answers in the same way.
CONSOLE = """
import json, sys, traceback
import django
django.setup()
from django.db import connection
for line in sys.stdin:
    names = {"result": None}
    try:
        exec(json.loads(line), names)
        answer = {"result": names["result"]}
    except Exception:
        answer = {"error": traceback.format_exc()}
    connection.close()
    print("=>" + json.dumps(answer, default=str), flush=True)
"""


class Process:
    """A command in a session of its own, so that signals reach its children too."""

    def __init__(self, command, log, *, is_ready=None, cwd=None, variables=(), **options):
        self.command, self.log, self.options = command, Path(log), options
        self.options |= {"cwd": cwd, "env": env(**dict(variables))}
        self.is_ready = is_ready or (lambda: True)
        self.process = None

    @property
    def pid(self):
        return self.process.pid

    @property
    def printed(self):
        """What it printed since its last start."""
        return self.log.read_bytes()[self.read_from :].decode(errors="replace")

    def is_running(self):
        return self.process is not None and self.process.poll() is None

    def launch(self):
        self.read_from = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            out = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = subprocess.Popen(
                self.command, start_new_session=True, **out, **self.options
            )

    def wait_until_ready(self):
        wait_for(lambda: not self.is_running() or self.is_ready(), 60)
        assert self.is_running(), f"{self.command}\n{self.printed}"

    def start(self):
        self.launch()
        self.wait_until_ready()

    def signal_all(self, number):
        os.killpg(self.pid, number)

    def kill(self):
        """kill -9, with all children."""
        self.signal_all(signal.SIGKILL)
        self.process.wait()

    def pause(self):
        self.signal_all(signal.SIGSTOP)

    def resume(self):
        self.signal_all(signal.SIGCONT)

    def resume_if_running(self):
        if self.is_running():
            self.resume()

    def stop(self, number=signal.SIGTERM):
        """Ask the process, not its children, to end; return its exit code."""
        os.kill(self.pid, number)
        return self.process.wait(60)

    def recover(self):
        """Have it run, whatever a test did to it. Returns whether it had to be started."""
        if self.is_running():
            self.resume()
            return False
        self.launch()
        return True


class Redis(Process):
    settings = f'CELERY_BROKER_TRANSPORT_OPTIONS["visibility_timeout"] = {VISIBILITY_TIMEOUT}'
    answers = {"broker": "redis"}

    def __init__(self, folder, project):
        if not shutil.which("redis-server"):
            missing("redis-server is not installed")
        [self.port] = free_ports(1)
        url = f"redis://127.0.0.1:{self.port}"
        self.variables = {"CELERY_BROKER_URL": f"{url}/0", "CELERY_RESULT_BACKEND": f"{url}/1"}
        command = f"redis-server --port {self.port} --dir {folder} --appendonly yes"
        is_ready = partial(connects, self.port)
        super().__init__(command.split(), folder.with_suffix(".log"), is_ready=is_ready)


class RabbitMQ(Process):
    settings = ""
    answers = {"broker": "rabbitmq", "result_backend": "none"}

    def __init__(self, folder, project):
        command, variables, port = servers.rabbitmq_command(folder)
        self.variables = {"CELERY_BROKER_URL": f"amqp://guest:guest@127.0.0.1:{port}//"}
        is_ready = partial(servers.speaks_amqp, port)
        super().__init__(command, folder.with_suffix(".log"), is_ready=is_ready, cwd=folder)
        self.options["env"] = variables


class SQS(Process):
    """moto, which keeps nothing: after a restart its queues are made anew, and empty."""

    settings = ""
    answers = {"broker": "sqs", "result_backend": "none"}

    def __init__(self, folder, project):
        [self.port] = free_ports(1)
        self.variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "SQS_VISIBILITY_TIMEOUT": VISIBILITY_TIMEOUT,
        }
        self.project = project
        command = [project / ".venv/bin/python", "-m", "moto.server", "--port", str(self.port)]
        is_ready = partial(connects, self.port)
        super().__init__(command, folder.with_suffix(".log"), is_ready=is_ready)

    def wait_until_ready(self):
        super().wait_until_ready()
        self.project.call("make", "queues", **self.variables)


BROKERS = {"redis": Redis, "rabbitmq": RabbitMQ, "sqs": SQS}


class PostgreSQL(Process):
    def __init__(self, *settings):
        """With such settings as `fsync=off`."""
        if not (binaries := sorted(glob("/usr/lib/postgresql/*/bin"))):
            missing("PostgreSQL is not installed")
        self.binaries = Path(binaries[-1])
        [self.port] = free_ports(1)
        self.url = f"postgres://postgres@127.0.0.1:{self.port}"
        self.folder = Path(tempfile.mkdtemp(prefix="postgresql-"))  # where its user gets to
        user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        if user:
            shutil.chown(self.folder, **user)
        data = self.folder / "data"
        options = f"-U postgres -A trust -E UTF8 --locale C -N -D {data}"
        initdb = [self.binaries / "initdb", *options.split()]
        subprocess.run(initdb, check=True, cwd=self.folder, stdout=subprocess.DEVNULL, **user)
        options = f"-D {data} -p {self.port} -k {self.folder} -h 127.0.0.1"
        command = [self.binaries / "postgres", *options.split()]
        command += [f"-c{setting}" for setting in settings]
        log = self.folder.with_suffix(".log")
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

    def kill(self):
        self.stop(signal.SIGQUIT)  # at once, and recovers at its start as after a crash

    def remove(self):
        self.kill()
        shutil.rmtree(self.folder)
        self.log.unlink()


class Stack:
    """A project with its broker, database, web, Beat and workers, on real servers.

    `workers` are two: both consume the queue `celery`, the first also `cpu`, the second `io`.
    """

    def __init__(self, project, broker, folder, database=None, **variables):
        """Without a `database`, a PostgreSQL, it has SQLite."""
        self.project, self.broker, self.folder, self.database = project, broker, folder, database
        sqlite = f"sqlite:///{folder}/db.sqlite3"
        self.notes_file = folder / "notes"
        self.notes_file.touch()
        self.variables = {
            "DATABASE_URL": database.create(folder.name) if database else sqlite,
            "NOTES": self.notes_file,
            "SOFT_SHUTDOWN_SECONDS": 2,
            "THROTTLE": "1000000/min",
            "WORKER_CONCURRENCY": 4,
            **broker.variables,
            **variables,
        }
        [self.port] = free_ports(1)
        self.web = self.process(
            f"gunicorn config.wsgi --preload --bind 127.0.0.1:{self.port} --workers 4",
            is_ready=lambda: self.web.printed.count("Booting worker") >= 4,
        )
        self.beat = self.process(f"celery -A config beat -s {folder}/beat", name="beat")
        self.workers = []
        self.worker, self.other = self.add_worker("cpu"), self.add_worker("io")
        self.console = self.token = None

    def process(self, command, name=None, **options):
        path = f"{self.project}/.venv/bin:{os.environ['PATH']}"
        words = command.split()
        name = name or words[0]
        return Process(
            ["env", *words] if "=" in words[0] else words,
            self.folder / f"{name}.log",
            cwd=self.project,
            variables={**self.variables, "PATH": path},
            **options,
        )

    def add_worker(self, queue):
        """One more worker, for `celery` and for another queue."""
        procfile = self.project.read("Procfile")
        command = re.search("^worker: (.*) --queues", procfile, re.MULTILINE)[1]
        worker = self.process(f"{command} --queues celery,{queue} -n {queue}@%h", queue)
        worker.is_ready = lambda: f"{queue}@" in worker.printed and " ready." in worker.printed
        self.workers.append(worker)
        return worker

    @property
    def processes(self):
        return [self.web, self.beat, *self.workers]

    @property
    def logs(self):
        return sorted(self.folder.glob("*.log"))

    def start(self):
        self.broker.start()
        variables = {key: str(value) for key, value in self.variables.items()}
        self.project.manage("migrate", "-v0", **variables)
        for process in self.processes:
            process.launch()
        self.console = subprocess.Popen(
            [self.project / ".venv/bin/python", "-c", CONSOLE],
            cwd=self.project,
            env=env(**variables, DJANGO_SETTINGS_MODULE="config.settings"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self.folder / "console.log", "ab"),
            text=True,
        )
        if self.database:
            self.ask(f"connection.cursor().execute({TABLES!r})")
        self.token = self.add_user("tester")
        for process in self.processes:
            process.wait_until_ready()

    def stop(self):
        if self.console:
            self.console.kill()
        for process in [*self.processes, self.broker]:
            if process.is_running():
                process.resume()
                process.kill()

    def recover(self):
        """Have everything run again that a test has stopped."""
        for server in [self.broker, self.database]:
            if server and server.recover():
                server.wait_until_ready()
        started = [process for process in self.processes if process.recover()]
        for process in started:
            process.wait_until_ready()
        with self.supervised(self.workers):  # one that lost its broker may be about to end
            self.wait_until_final(*[self.enqueue("quick", queue=queue) for queue in ["cpu", "io"]])

    def renew_web(self):
        """Forget that the broker refused a message, and have connections to it."""
        self.web.stop()
        self.web.start()
        jobs = [job for job, _ in self.post_many(30, "quick")]
        self.wait_until_final(*jobs)

    @contextmanager
    def supervised(self, processes=None):
        """Start processes again when they end, as in production, until the block ends."""
        processes = processes or self.processes
        done = threading.Event()

        def supervise():
            while not done.wait(0.3):
                for process in processes:
                    if not process.is_running():
                        process.launch()

        thread = threading.Thread(target=supervise)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    # What the tests ask and say

    def ask(self, code, **names):
        """Run code in the project; return its `result`."""
        lines = [f"{name} = {value!r}" for name, value in names.items()]
        imports = ["from django.db import connection", "from jobs.models import *"]
        code = "\n".join([*imports, "from faults.tasks import *", *lines, code])
        self.console.stdin.write(json.dumps(code) + "\n")
        self.console.stdin.flush()
        for line in self.console.stdout:
            if line.startswith("=>"):
                answer = json.loads(line[2:])
                assert "error" not in answer, answer["error"]
                return answer["result"]
        raise AssertionError((self.folder / "console.log").read_text())

    def add_user(self, name, **fields):
        """Return the token of a new user."""
        code = """
from django.contrib.auth.models import User
from rest_framework.authtoken.models import Token
result = Token.objects.create(user=User.objects.create_user(name, **fields)).key
"""
        return self.ask(code, name=name, fields=fields)

    def enqueue(self, task, *args, **options):
        code = f"result = Job.objects.enqueue({task}, args, **options).pk"
        return self.ask(code, args=[str(arg) for arg in args], options=options)

    def send(self, task, *args, **options):
        """Send a plain task."""
        args = [str(arg) for arg in args]
        return self.ask(
            f"result = {task}.apply_async(args, **options).id", args=args, options=options
        )

    def messages_in(self, queue):
        return self.ask(
            "from jobs.sweep import messages_in\nresult = messages_in(queue)", queue=queue
        )

    def empty(self, queue):
        code = """
from config.celery import app
with app.connection_for_write() as broker:
    broker.default_channel.queue_purge(queue)
"""
        self.ask(code, queue=queue)

    def post(self, task, *args, **data):
        """Let the API enqueue a job; return its id. Raises if the answer is not 202."""
        data = {"task": task, "args": [str(arg) for arg in args], **data}
        headers = {"Authorization": f"Token {self.token}"}
        status, _, job = fetch(f"http://127.0.0.1:{self.port}/faults/", data, headers)
        assert status == 202, status
        return job["id"]

    def send_raw(self, path, body, content_type="application/json", *, token=None, key=None):
        """Return (status, text) of what the API answers to a GET, or with a body to a POST.

        The status is 0 where the web hangs up on a body that it does not want to read.
        """
        headers = {"Authorization": f"Token {token or self.token}", "Content-Type": content_type}
        if key:
            headers["Idempotency-Key"] = key
        if isinstance(body, str):
            body = body.encode()
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET" if body is None else "POST", f"/api/{path}", body, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (BrokenPipeError, ConnectionResetError):
            return 0, ""

    def post_many(self, count, task):
        """Post `count` jobs at once: return [(id, seconds until the answer)]."""

        def post(_):
            start = time.monotonic()
            return self.post(task), time.monotonic() - start

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(post, range(count)))

    def row(self, job):
        return self.rows(job)[0]

    def rows(self, *jobs):
        """What the ledger says of these jobs, in their order."""
        code = """
fields = ["pk", "state", "result", "error", "crashes"]
found = {str(row["pk"]): row for row in Job.objects.filter(pk__in=jobs).values(*fields)}
result = [found[job] for job in jobs]
"""
        return self.ask(code, jobs=jobs)

    def finals(self, *jobs):
        """How often a final state was written, of all these jobs together."""
        code = """
with connection.cursor() as cursor:
    cursor.execute("SELECT count(*) FROM finals WHERE job = ANY(%s::uuid[])", [jobs])
    [result] = cursor.fetchone()
"""
        return self.ask(code, jobs=list(jobs))

    def wait_until_final(self, *jobs, seconds=60):
        """Return the rows, once each has a final state: written once."""
        code = "result = Job.objects.filter(pk__in=jobs, state__in=FINAL).count()"
        try:
            wait_for(lambda: self.ask(code, jobs=jobs) == len(jobs), seconds)
        except AssertionError as error:
            code = (
                "result = [j for j in Job.objects.filter(pk__in=jobs, state__in=ACTIVE).values()]"
            )
            raise AssertionError(self.ask(code, jobs=jobs)) from error
        if self.database:
            assert self.finals(*jobs) == len(jobs)
        return self.rows(*jobs)

    def notes(self, what, job):
        """The processes in which a body has started or ended, in order."""
        words = [line.split() for line in self.notes_file.read_text().splitlines()]
        return [int(pid) for kind, task, pid in words if (kind, task) == (what, job)]

    def wait_until_started(self, *jobs, times=1):
        """Return the process of the last run of the first job."""
        for job in jobs:
            wait_for(lambda job=job: len(self.notes("start", job)) >= times, 60)
        return self.notes("start", jobs[0])[-1]


def prepare(project, broker, folder, database, **variables):
    """Install a baked project with the tasks and the view of these tests; return its Stack.

    `broker` is one of the classes in BROKERS; in `folder` everything keeps its files.
    """
    project.install()
    (project / "faults").mkdir()
    (project / "faults/__init__.py").touch()
    (project / "faults/tasks.py").write_text(TASKS)
    (project / "faults/views.py").write_text(VIEWS)
    with open(project / "config/settings.py", "a") as file:
        file.write(f'INSTALLED_APPS += ["faults"]\n{broker.settings}\n')
    with open(project / "config/urls.py", "a") as file:
        file.write(
            '\nfrom faults.views import enqueue\nurlpatterns.append(path("faults/", enqueue))\n'
        )
    (folder / "broker").mkdir()
    return Stack(project, broker(folder / "broker", project), folder, database, **variables)
