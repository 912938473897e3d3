"""Stacks for tests: all processes of a project, which can be killed, paused and started alone."""

import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import psycopg

from .project import (
    BEHIND_A_PROXY,
    FILE_MAIL,
    Console,
    fetch,
    free_ports,
    responds,
    wait_for,
)
from .servers import servers_of, variables_of

LEASE, RESEND = 5, 2  # seconds
TIMINGS = {"JOB_LEASE_SECONDS": LEASE, "JOB_SWEEP_SECONDS": 1, "JOB_RESEND_SECONDS": RESEND}
# How many jobs at once: see faults/tasks.py.
LIMITS = {"one": "1", "two": "2", "tenant": "2, 5/s"}
FLOWER_USER = "admin", "of-this-test"

# The names of code for ask(), in a project with durable jobs and in one without
IMPORTS = """
import json
import time
import trials.tasks
from datetime import timedelta
from pathlib import Path
from django.db import connection, transaction
from django.db.models import F, Q
from django.db.models.functions import Now
from faults.tasks import *
from durable_jobs import batches, pauses, statistics
from durable_jobs.actions import cancel, run_again, run_all_again
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.states import ACTIVE, FINAL
from durable_jobs.models import Batch, Failure, Job, Pause, Sweep, Worker
from trials import tasks as plain
"""
PLAIN_IMPORTS = """
from celery import chain, chord, group
from celery.result import AsyncResult
from config.celery import app
from trials.tasks import *
"""
SCHEDULE = """
CELERY_BEAT_SCHEDULE = {{
    "tick": {{"task": "trials.tasks.tick", "schedule": 1, "args": ["{path}"]}}
}}
"""
MIGRATE = """
from django.core.management import call_command
result = call_command("migrate", verbosity=0)
"""
ADD_USER = """
from users.models import User
from rest_framework.authtoken.models import Token
result = Token.objects.create(user=User.objects.create_user(name, **fields)).key
"""
# Deletes all messages in a queue. SQS does that once a minute, so this may wait.
EMPTY = """
import time
from config.celery import app
result = False
with app.connection_for_write() as broker:
    while not result:
        try:
            broker.default_channel.queue_purge(queue)
            result = True
        except Exception as error:
            if "PurgeQueueInProgress" not in str(error):
                raise
            time.sleep(1)
"""


class Stack:
    """A project with its servers, web, Beat and workers, as in production.

    Its `processes` run in each test. Flower, and Beat of plain tasks, run if a test starts them.
    """

    tester = {}  # fields of the user whose token it has

    def __init__(self, project, servers, folder, database, **variables):
        """`servers` begin with the broker. Without a PostgreSQL, the project uses SQLite."""
        self.project, self.servers, self.folder, self.database = project, servers, folder, database
        self.broker = servers[0]
        self.notes_file = folder / "notes"
        self.notes_file.touch()
        self.port, flower_port = free_ports(2)
        self.web_url = f"http://127.0.0.1:{self.port}"
        self.flower_url = f"http://127.0.0.1:{flower_port}"
        # As in compose.yaml: PostgreSQL keeps the plans of statements that are run again.
        url = database and f"{database.create(f'stack{self.port}')}?prepare_threshold=0"
        self.variables = {
            "CELERY_SKIP_CHECKS": 1,  # a quarter of a worker's start; `make run` has them
            "DATABASE_URL": url or f"sqlite:///{folder}/db.sqlite3",
            "DEBUG": "False",
            "EMAIL_BACKEND": FILE_MAIL,
            "FLOWER_BASIC_AUTH": ":".join(FLOWER_USER),
            "FLOWER_PORT": flower_port,
            "NOTES": self.notes_file,
            "SOFT_SHUTDOWN_SECONDS": 2,
            "THROTTLE": "1000000/min",
            "WORKER_CONCURRENCY": 4,
            **variables_of(servers, project),
            **variables,
        }
        self.made = []  # all processes, including those of tests
        self.marks = {}  # {log: its size when the test began}
        self.console = Console(project, folder / "console.log", **self.variables)
        command = f"gunicorn config.wsgi --preload --bind 127.0.0.1:{self.port}"
        self.web = self.process(command)
        self.web.is_ready = lambda: self.web.printed.count("Booting worker") >= 4
        self.beat, self.flower = self.make_beat(), self.make_flower("flower")

    def process(self, command, name=None, *, says="", is_ready=None, **variables):
        """Make a process with more variables. It ends with the test at the latest.

        The variable FAULT names a function of trials/app.py.
        """
        if "FAULT" in variables:
            command = command.replace("-A config", "-A trials.app")
        log = self.folder / f"{name or command.split()[0]}.log"
        options = {"says": says, "is_ready": is_ready, **self.variables, **variables}
        self.made.append(self.project.process(command, log, **options))
        return self.made[-1]

    def make_worker(self, name, options="", *, pool=None, **variables):
        """Make a worker with Procfile.dev's command, or with another pool, and more options."""
        command = re.search("^worker: .*(celery .*)", self.project.read("Procfile.dev"), re.M)[1]
        if pool:
            command = f"celery -A config worker --pool {pool}"
        worker = self.process(f"{command} -n {name}@%h {options}", name, **variables)
        worker.is_ready = lambda: f"{name}@" in worker.printed and " ready." in worker.printed
        return worker

    def replace_worker(self, options="--queues celery,cpu", **variables):
        """Start a worker with these in place of the first one, until the test ends."""
        self.worker.stop()
        return self.make_worker("other", options, **variables).start()

    def make_beat(self, name="beat", **variables):
        command = f"celery -A config beat -s {self.folder}/{name}"
        return self.process(command, name, says=" is starting.", **variables)

    def replace_beat(self, **variables):
        """Start a Beat with these variables in place of the stack's, until the test ends."""
        self.beat.stop()
        return self.make_beat(f"beat-{variables.get('FAULT', 'other')}", **variables).start()

    def make_flower(self, name, **variables):
        is_ready = partial(responds, f"{self.flower_url}/api/workers", auth=FLOWER_USER)
        return self.process("celery -A config flower", name, is_ready=is_ready, **variables)

    def start(self):
        """Start the servers and the processes. The database is migrated first."""
        for server in self.servers:
            server.start()
        self.console.start()
        self.console.ask(MIGRATE)
        for process in self.processes:
            process.launch()
        self.token = self.add_user("tester", **self.tester)
        for process in self.processes:
            process.wait_until_ready()
        return self

    def end(self):
        self.kill(self.console, *self.made, *self.servers)

    def kill(self, *processes):
        for process in processes:
            process.end()

    def recover(self):
        """Make the whole stack run again, and remove what a test has left."""
        self.kill(*(process for process in self.made if process not in self.processes))
        for server in filter(None, [*self.servers, self.database]):
            if server.recover():
                server.wait_until_ready()
        for process in [process for process in self.processes if process.recover()]:
            process.wait_until_ready()
        with self.supervised(*self.workers):  # a worker that lost its broker may be about to end
            self.empty_queues()

    @contextmanager
    def supervised(self, *processes):
        """Restart these processes when they end, as in production, until the block ends.

        All, if none is named.
        """
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

    @property
    def logs(self):
        return sorted(self.folder.glob("*.log"))

    def mark_logs(self):
        """Let printed() return what the logs get from now on."""
        self.marks = {log: log.stat().st_size for log in self.logs}

    def printed(self):
        """Return the end of what each log got since the mark, and what each worker's threads do."""
        for worker in self.workers:
            if worker.is_running():
                os.kill(worker.pid, signal.SIGUSR1)  # Celery then prints its threads
        time.sleep(1)
        texts = []
        for log in self.logs:
            text = log.read_bytes()[self.marks.get(log, 0) :].decode(errors="replace")
            texts.append(f"--- {log.name}\n{text[-5000:]}")
        return "\n".join(texts)

    # Requests and queries of the tests

    def request(self, path, data=None, *, method=None, **headers):
        """Send a request to the web, as fetch() does. Return (status, headers, answer)."""
        headers = {"Authorization": f"Token {self.token}", **BEHIND_A_PROXY, **headers}
        return fetch(self.web_url + path, data, headers, method=method)

    def ask_flower(self, path, data=None):
        """Send a request to Flower, as fetch() does. Return (status, headers, answer)."""
        return fetch(self.flower_url + path, data, auth=FLOWER_USER)

    def in_flower(self, task):
        """Return the state of a task in Flower."""
        answer = self.ask_flower(f"/api/task/info/{task}")[2]
        return answer and answer["state"]

    def ask(self, code, **names):
        """Run code in the project and return the value of its variable `result`."""
        lines = [f"{name} = {value!r}" for name, value in names.items()]
        return self.console.ask("\n".join([self.imports, *lines, code]))

    def add_user(self, name, **fields):
        """Create a user and return its token."""
        return self.ask(ADD_USER, name=name, fields=fields)

    def send(self, task, *args, **options):
        """Send a plain task. Return its id."""
        args = [str(arg) if hasattr(arg, "parts") else arg for arg in args]
        code = f"result = {task}.apply_async(args, **options).id"
        return self.ask(code, args=args, options=options)

    def empty(self, queue):
        """Delete all messages in a queue."""
        assert self.ask(EMPTY, queue=queue)

    def lines(self):
        """Return the words of each line of trials.tasks.note(): kind, task, process, time, more."""
        text, _, _ = self.notes_file.read_text().rpartition("\n")  # without a half one
        return [line.split() for line in text.splitlines()]

    def notes(self, kind, task):
        """Return the ids of the processes that noted a "start" or "end" of this task."""
        return [int(pid) for each, id, pid, *_ in self.lines() if (each, id) == (kind, task)]

    def times(self, kind, task):
        """Return the times of these notes."""
        return [float(at) for each, id, _, at, *_ in self.lines() if (each, id) == (kind, task)]

    def starts(self, task):
        return len(self.notes("start", task))

    def wait_until_started(self, *tasks, times=1):
        """Wait for `times` runs of each. Return the process id of the first one's last run."""
        for task in tasks:
            wait_for(lambda task=task: self.starts(task) >= times)
        return self.notes("start", tasks[0])[-1]


class PlainStack(Stack):
    """A plain project. It has one `worker`, for all queues."""

    imports = PLAIN_IMPORTS
    tester = {"email": "tester@example.com", "is_staff": True, "is_superuser": True}

    def __init__(self, *arguments, **variables):
        super().__init__(*arguments, **variables)
        self.worker = self.make_worker("first")
        self.workers, self.processes = [self.worker], [self.web, self.worker]

    def empty_queues(self):
        """Run a task of each queue, behind all those that earlier tests have left."""
        for queue in "celery", "cpu", "io":
            self.wait_until_started(self.send("quick", queue=queue))


class JobStack(Stack):
    """A project with durable jobs.

    It has two `workers`: both consume the queue `celery`, the first also `cpu`, the second `io`.
    """

    imports = IMPORTS

    def __init__(self, *arguments, **variables):
        super().__init__(*arguments, **variables)
        self.workers = [self.make_worker(name, f"--queues celery,{name}") for name in ("cpu", "io")]
        self.worker, self.other = self.workers
        self.processes = [self.web, self.beat, *self.workers]

    def start(self):
        super().start()
        if self.database:
            self.ask('connection.cursor().execute(open("faults/tables.sql").read())')
        return self

    def empty_queues(self):
        self.ask("Pause.objects.all().delete()\ncancel(Job.objects.all())")
        self.wait_until_final(*[self.enqueue("quick", queue=queue) for queue in ["cpu", "io"]])

    def renew_web(self):
        """Restart the web server, which ends its pause after a failed send. Let it send again."""
        self.web.stop()
        self.web.start()
        self.wait_until_final(*self.post_many(30, "quick"))

    @contextmanager
    def locked(self, statement):
        """Hold the lock that this statement takes in the database until the block ends."""
        with psycopg.connect(self.database_url()) as connection:
            connection.execute(statement)
            yield

    def database_url(self):
        url, _, _ = self.variables["DATABASE_URL"].partition("?")  # libpq knows no other options
        return url

    # Requests and queries of the tests

    def enqueue(self, task, *args, **options):
        code = f"result = enqueue({task}, args, **options).pk"
        return self.ask(code, args=[str(arg) for arg in args], options=options)

    def messages_in(self, queue):
        code = """
from durable_jobs.messages import messages_in
from config.celery import app
with app.connection_for_write() as broker:
    result = messages_in(queue, broker)
"""
        return self.ask(code, queue=queue)

    def post(self, task, *args, **data):
        """Enqueue a job through the API and return its id. Raises if the answer is not 202."""
        return self.post_to("/faults/", task=task, args=[str(arg) for arg in args], **data)

    def post_to(self, path, headers=(), **data):
        """Return the id in the answer. Raises if this is not 202."""
        status, _, answer = self.request(path, data, **dict(headers))
        assert status == 202, status
        return answer["id"]

    def post_many(self, count, task):
        """Post `count` jobs at once. Return their ids. Raises if one gets no answer."""
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(self.post, [task] * count))

    def row(self, job):
        return self.rows(job)[0]

    def rows(self, *jobs):
        """Return the rows of these jobs with their failures, in the same order."""
        code = """
fields = ["pk", "state", "result", "error", "crashes"]
found = {str(row["pk"]): row for row in Job.objects.filter(pk__in=jobs).values(*fields)}
for row in found.values():
    row["failures"] = list(Failure.objects.filter(job=row["pk"]).values())
result = [found[job] for job in jobs]
"""
        return self.ask(code, jobs=jobs)

    def finals(self, *jobs):
        """Return how often a final state was written, for all these jobs together."""
        code = """
with connection.cursor() as cursor:
    cursor.execute("SELECT count(*) FROM finals WHERE job = ANY(%s::uuid[])", [jobs])
    [result] = cursor.fetchone()
"""
        return self.ask(code, jobs=list(jobs))

    def wait_until_final(self, *jobs):
        """Wait until each job has a final state, written once. Return the rows."""
        code = "result = Job.objects.filter(pk__in=jobs, state__in=FINAL).count()"
        try:
            wait_for(lambda: self.ask(code, jobs=jobs) == len(jobs))
        except AssertionError as error:
            code = "result = list(Job.objects.filter(pk__in=jobs, state__in=ACTIVE).values())"
            raise AssertionError(self.ask(code, jobs=jobs)) from error
        if self.database:
            assert self.finals(*jobs) == len(jobs)
        return self.rows(*jobs)

    def wait_until_succeeded(self, *jobs, crashes):
        """Wait until each job has succeeded after so many crashes. Return the rows."""
        rows = self.wait_until_final(*jobs)
        assert {(row["state"], row["crashes"]) for row in rows} == {("succeeded", crashes)}, rows
        return rows


def prepare(project, broker, folder, database, **variables):
    """Install a baked project, add the tasks and views of the tests, and return its JobStack.

    `broker` is one of the classes in SETUPS. `folder` is for the files of all processes.
    """
    project.install()
    project.add_app("trials")
    add_faults(project, broker.settings)
    return JobStack(project, [broker(folder / "broker", project)], folder, database, **variables)


def add_faults(project, settings=""):
    settings += f"""
CELERY_TASK_ROUTES["faults.tasks.routed"] = {{"queue": "io"}}
DURABLE_JOBS["LIMITS"] = {LIMITS}
"""
    urls = """
from faults.views import enqueue, work
urlpatterns += [path("faults/", enqueue), path("faults/batches/", work)]
"""
    project.add_app("faults", settings, urls)


def add_trials(project, folder, settings):
    """To see which tests fail without a setting: WITHOUT=CELERY_TASK_ACKS_LATE make prove …"""
    without = "".join(f"del {name}\n" for name in os.environ.get("WITHOUT", "").split())
    urls = '\nfrom trials.views import start\nurlpatterns += [path("api/trials/", start)]\n'
    settings = SCHEDULE.format(path=folder / "ticked") + settings + without
    project.add_app("trials", settings, urls)


def prepare_plain(project, folder, database, settings="", **variables):
    """Add the app `trials` to an installed project, and return its PlainStack, not yet started.

    Without settings (None), it has the timings of production.
    """
    add_trials(project, folder, settings or "")
    servers = servers_of(project, folder / "servers")
    if settings is None:
        for server in servers:
            server.variables.pop("VISIBILITY_SECONDS", None)
    return PlainStack(project, servers, folder, database, **variables)
