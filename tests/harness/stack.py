"""Stacks for tests: all processes of a project, which can be killed, paused and started alone."""

import itertools
import os
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection

from .bake import CHOICES
from .project import BEHIND_A_PROXY, Console, fetch, free_ports, wait_for
from .servers import Process

LEASE, SWEEP, RESEND = 5, 1, 2  # seconds
TIMINGS = {
    "JOB_LEASE_SECONDS": LEASE,
    "JOB_SWEEP_SECONDS": SWEEP,
    "JOB_RESEND_SECONDS": RESEND,
}

# How many jobs at once: see faults/limited.py.
LIMITS = {"one": "1", "two": "2", "rate": "10/s", "tenant": "2, 5/s"}

# The names of code for ask()
IMPORTS = """
from datetime import timedelta
from django.db import connection
from django.db.models import F, Q
from django.db.models.functions import Now
from faults.limited import *
from faults.tasks import *
from durable_jobs import batches, pauses
from durable_jobs.actions import cancel, run_again, run_all_again
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.states import ACTIVE, FINAL
from durable_jobs.worker import heartbeat
from durable_jobs.models import Batch, Failure, Job, Pause, Sweep, Worker
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


def pairs(brokers, pools, every_pair=False):
    """Return (broker, pool) for a test: the first broker with each pool, each other with the first.

    That finds what depends on either. With `every_pair`, return all, for what depends on both.
    """
    found = [
        (broker, pool)
        for broker, pool in itertools.product(brokers, pools)
        if every_pair or broker == CHOICES["broker"][0] or pool == CHOICES["worker_pool"][0]
    ]
    assert found, "pytest would skip the test"
    return found


class Stack:
    """A project's processes, as in production. Each can be killed, paused and started alone."""

    imports = ""  # the names of code for ask()
    processes = ()  # those that run in each test
    tester = {}  # fields of the user whose token it has

    def __init__(self, project, broker, folder, **variables):
        self.project, self.broker, self.folder = project, broker, folder
        self.notes_file = folder / "notes"
        self.notes_file.touch()
        self.variables = {
            "CELERY_SKIP_CHECKS": 1,  # a quarter of a worker's start; `make run` has them
            "DEBUG": "False",
            "NOTES": self.notes_file,
            "SOFT_SHUTDOWN_SECONDS": 2,
            "THROTTLE": "1000000/min",
            "WORKER_CONCURRENCY": 4,
            **broker.variables,
            **variables,
        }
        self.made = []  # all processes, including those of tests
        self.marks = {}  # {log: its size when the test began}
        self.console = self.token = None

    def process(self, command, name=None, *, is_ready=None, **variables):
        """Make a process with more variables. It ends with the test at the latest."""
        path = f"{self.project}/.venv/bin:{os.environ['PATH']}"
        words = command.split()
        process = Process(
            words,
            self.folder / f"{name or words[0]}.log",
            is_ready=is_ready,
            cwd=self.project,
            variables={**self.variables, **variables, "PATH": path},
        )
        self.made.append(process)
        return process

    def make_web(self, workers):
        [self.port] = free_ports(1)
        command = "gunicorn config.wsgi --preload --no-control-socket"
        web = self.process(f"{command} --bind 127.0.0.1:{self.port} --workers {workers}")
        web.is_ready = lambda: web.printed.count("Booting worker") >= workers
        return web

    def make_worker(self, name, options="", *, pool=None, app="config", **variables):
        """Make a worker with the Procfile's command, or with another pool, and more options."""
        command = re.search("^worker: .*(celery .*)", self.project.read("Procfile"), re.M)[1]
        if pool:
            command = f"celery -A config worker --pool {pool}"
        command = command.replace("-A config", f"-A {app}")
        worker = self.process(f"{command} -n {name}@%h {options}", name, **variables)
        worker.is_ready = lambda: f"{name}@" in worker.printed and " ready." in worker.printed
        return worker

    def make_beat(self, name="beat", app="config", **variables):
        return self.process(f"celery -A {app} beat -s {self.folder}/{name}", name, **variables)

    def launch(self, processes):
        """Migrate in a console, start these processes, and wait until they are ready."""
        variables = {key: str(value) for key, value in self.variables.items()}
        self.console = Console(self.project, self.folder / "console.log", **variables)
        self.console.ask(MIGRATE)
        for process in processes:
            process.launch()
        self.token = self.add_user("tester", **self.tester)
        for process in processes:
            process.wait_until_ready()

    def stop(self):
        if self.console:
            self.console.kill()
        self.kill(*self.made, self.broker)

    def kill(self, *processes):
        for process in processes:
            if process.is_running():
                process.resume()
                process.kill()

    def run_again(self, *servers):
        """End the processes that a test has made, and make all others run."""
        self.kill(*(process for process in self.made if process not in self.processes))
        for server in servers:
            if server.recover():
                server.wait_until_ready()
        for process in [process for process in self.processes if process.recover()]:
            process.wait_until_ready()

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
        """Return the end of what each log got since the mark."""
        texts = []
        for log in self.logs:
            text = log.read_bytes()[self.marks.get(log, 0) :].decode(errors="replace")
            texts.append(f"--- {log.name}\n{text[-5000:]}")
        return "\n".join(texts)

    # Requests and queries of the tests

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


class JobStack(Stack):
    """A project with its broker, database, web, Beat and workers, on real servers.

    It has two `workers`: both consume the queue `celery`, the first also `cpu`, the second `io`.
    """

    imports = IMPORTS

    def __init__(self, project, broker, folder, database=None, **variables):
        """`database` is a PostgreSQL; without one, the project uses SQLite."""
        # As in compose.yaml: PostgreSQL keeps the plans of statements that are run again.
        url = database and f"{database.create(folder.name)}?prepare_threshold=0"
        variables = {"DATABASE_URL": url or f"sqlite:///{folder}/db.sqlite3", **variables}
        super().__init__(project, broker, folder, **variables)
        self.database = database
        self.web = self.make_web(workers=4)
        self.beat, self.others = self.make_beat(), []
        self.workers = []
        self.worker, self.other = self.add_worker("cpu"), self.add_worker("io")

    def make_worker(self, queues, name, pool=None, **options):
        return super().make_worker(name, f"--queues {queues}", pool=pool, **options)

    def add_worker(self, queue, pool=None):
        """Add a worker to the stack, for `celery` and for another queue."""
        self.workers.append(self.make_worker(f"celery,{queue}", queue, pool))
        return self.workers[-1]

    def replace_worker(self, **variables):
        """Start a worker with these variables in place of the first one, until the test ends."""
        self.worker.stop()
        worker = self.make_worker("celery,cpu", "other-cpu", **variables)
        worker.start()
        return worker

    def replace_beat(self, app="config", **variables):
        """Start a Beat with these variables in place of the stack's, until the test ends."""
        self.beat.stop()
        beat = self.make_beat(f"beat-of-{app}", app, **variables)
        beat.is_ready = lambda: " is starting." in beat.printed
        beat.start()
        return beat

    @property
    def processes(self):
        return [self.web, self.beat, *self.others, *self.workers]

    def printed(self):
        """Also what each thread of a worker does."""
        for worker in self.workers:
            if worker.is_running():
                os.kill(worker.pid, signal.SIGUSR1)  # Celery then prints its threads
        time.sleep(1)
        return super().printed()

    def start(self, processes=None):
        """Start the servers and these processes, by default all."""
        self.broker.start()
        self.launch(processes or self.processes)
        if self.database:
            self.ask('connection.cursor().execute(open("faults/tables.sql").read())')

    def recover(self):
        """Make the whole stack run again, and remove what a test has left."""
        self.run_again(*filter(None, [self.broker, self.database]))
        self.ask("cancel(Job.objects.all())")
        with self.supervised(*self.workers):  # a worker that lost its broker may be about to end
            self.wait_until_final(*[self.enqueue("quick", queue=queue) for queue in ["cpu", "io"]])

    def renew_web(self):
        """Restart the web server, which ends its pause after a failed send. Let it send again."""
        self.web.stop()
        self.web.start()
        jobs = [job for job, _ in self.post_many(30, "quick")]
        self.wait_until_final(*jobs)

    @contextmanager
    def locked(self, statement):
        """Hold the lock that this statement takes in the database until the block ends."""
        url, _, _ = self.variables["DATABASE_URL"].partition("?")  # psql knows no other options
        psql = subprocess.Popen(
            [self.database.binaries / "psql", "--quiet", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            psql.stdin.write(f"BEGIN;\n{statement};\n\\echo locked\n")
            psql.stdin.flush()
            assert "locked\n" in iter(psql.stdout.readline, ""), statement
            yield
        finally:
            psql.stdin.close()  # psql ends with its input, and releases the lock
            psql.wait()

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
        return self.send_json("faults/", task=task, args=[str(arg) for arg in args], **data)

    def send_json(self, path, **data):
        """Return the id in the answer. Raises if this is not 202."""
        headers = {"Authorization": f"Token {self.token}", **BEHIND_A_PROXY}
        status, _, answer = fetch(f"http://127.0.0.1:{self.port}/{path}", data, headers)
        assert status == 202, status
        return answer["id"]

    def send_raw(self, path, body, content_type="application/json", *, token=None, key=None):
        """Send a GET, or a POST with `body`, to the API. Return (status, text).

        The status is 0 if the web closes the connection because it does not read the body.
        """
        headers = {"Authorization": f"Token {token or self.token}", "Content-Type": content_type}
        headers |= BEHIND_A_PROXY
        if key:
            headers["Idempotency-Key"] = key
        if isinstance(body, str):
            body = body.encode()
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request("GET" if body is None else "POST", f"/api/{path}", body, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (BrokenPipeError, ConnectionResetError):
            return 0, ""

    def post_many(self, count, task):
        """Post `count` jobs at once. Return [(id, seconds until the answer)]."""

        def post(_):
            start = time.monotonic()
            return self.post(task), time.monotonic() - start

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(post, range(count)))

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
            code = (
                "result = [j for j in Job.objects.filter(pk__in=jobs, state__in=ACTIVE).values()]"
            )
            raise AssertionError(self.ask(code, jobs=jobs)) from error
        if self.database:
            assert self.finals(*jobs) == len(jobs)
        return self.rows(*jobs)

    def notes(self, what, job):
        """Return the ids of the processes whose body of this job noted "start" or "end"."""
        words = [line.split() for line in self.notes_file.read_text().splitlines()]
        return [int(pid) for kind, task, pid in words if (kind, task) == (what, job)]

    def wait_until_started(self, *jobs, times=1):
        """Wait for `times` runs of each job. Return the process id of the first job's last run."""
        for job in jobs:
            wait_for(lambda job=job: len(self.notes("start", job)) >= times)
        return self.notes("start", jobs[0])[-1]


def prepare(project, broker, folder, database, **variables):
    """Install a baked project, add the tasks and views of the tests, and return its JobStack.

    `broker` is one of the classes in SETUPS. `folder` is for the files of all processes.
    """
    project.install()
    routes = 'CELERY_TASK_ROUTES["faults.tasks.routed"] = {"queue": "io"}'
    project.add_app("faults", f"{broker.settings}\n{routes}\nDURABLE_JOBS['LIMITS'] = {LIMITS}")
    with open(project / "config/urls.py", "a") as file:
        file.write(
            "\nfrom faults.views import add, enqueue, work\n"
            'urlpatterns += [path("faults/", enqueue), path("faults/batches/", work)]\n'
            'urlpatterns += [path("api/faults/add/", add)]\n'
        )
    (folder / "broker").mkdir()
    return JobStack(project, broker(folder / "broker", project), folder, database, **variables)
