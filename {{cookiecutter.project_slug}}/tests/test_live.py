{% from "chosen.jinja" import servers, has_flower, has_results with context %}
"""Jobs on a real worker, a real Beat and a real broker, as after an upgrade of Celery.

The broker is the one that the settings name. If none answers there, it is the stand-in that
`make run` would start. To skip these tests: make test ARGS="-m 'not live'"
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from celery import shared_task
from django.db import connection
from honcho.environ import parse_procfile

import config.wsgi  # noqa: F401  sets up Django for `celery -A test_live`
import dev
from config.celery import app
from durable_jobs.models import Job
from durable_jobs.tasks import JobTask

pytestmark = [pytest.mark.live, pytest.mark.django_db(transaction=True)]

QUEUE = "test"  # a worker of `make run` on the same broker does not use it
STEPS = 30


@shared_task(base=JobTask, bind=True)
def count(self):
    for step in range(STEPS):
        self.report(step, STEPS, f"Step {step}")
        time.sleep(0.1)
    return STEPS


@shared_task(base=JobTask, bind=True)
def hold(self, gate):
    """Wait until this file exists."""
    while not Path(gate).exists():
        self.report(50)
        time.sleep(0.1)


@shared_task(base=JobTask, bind=True, autoretry_for=(OSError,), default_retry_delay=0)
def try_twice(self):
    if self.request.retries == 0:
        raise OSError("no route")


{% if has_results %}
@shared_task
def double(number):
    return 2 * number


{% endif %}
def wait_until(job, condition):
    for _ in range(3000):  # five minutes, for a busy machine
        job.refresh_from_db()
        if condition(job):
            return
        time.sleep(0.1)
    pytest.fail(f"The job is {job.state} at {job.progress} %, crashes: {job.crashes}")


def has_ended(job):
    return job.finished_at


def is_held(job):
    return job.state == "running" and job.progress == 50


def kill(process):
    """Kill a process and its children, without a warning."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def broker():
    try:
        processes = {% for server in servers %}{{ " + " if not loop.first }}dev.start_{{ server.name }}(){% endfor %}

    except SystemExit as reason:
        pytest.skip(str(reason))
    with app.connection_for_write() as opened:
        opened.ensure_connection(max_retries=50, interval_start=0.1, interval_step=0)
    yield
    for process in processes:
        kill(process)


@pytest.fixture(scope="module")
def start(broker, django_db_setup, tmp_path_factory):
    """Return a function that starts a process of the Procfile on the test database."""
    folder = Path(__file__).parent
    commands = parse_procfile((folder.parent / "Procfile").read_text()).processes
    schedule = f"{tmp_path_factory.mktemp('beat')}/beat"
    options = {"worker": f"--queues {QUEUE}", "beat": f"-s {schedule}"}
    name = quote(str(connection.settings_dict["NAME"]))
    url = os.environ.get("DATABASE_URL") or "sqlite:///"
    environment = os.environ | {
        "DATABASE_URL": re.sub("(//[^/]*/)[^?]*", rf"\g<1>{name}", url),
        "JOB_LEASE_SECONDS": "3",
        "JOB_SWEEP_SECONDS": "0.2",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "SOFT_SHUTDOWN_SECONDS": "1",
        "WORKER_CONCURRENCY": "2",
    }
    processes = []

    def start(name):
        command = commands[name].replace("-A config", "-A test_live")
        if name == "worker":  # two nodes with one name confuse a broker, or are refused
            command += f" -n {QUEUE}-{os.getpid()}-{len(processes)}@%h"
        process = subprocess.Popen(
            f"exec {command} {options[name]}",
            shell=True,
            cwd=folder.parent,
            env=environment,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            kill(process)


@pytest.fixture(scope="module")
def worker(start):
    return start("worker")


@pytest.fixture(scope="module")
def beat(start):
    return start("beat")


{% if has_results %}
def test_a_plain_task_returns_its_result(worker):
    assert double.apply_async([21], queue=QUEUE).get(timeout=300) == 42


{% endif %}
def test_a_job_shows_its_progress_and_its_result(worker):
    job = Job.objects.enqueue(count, queue=QUEUE)
    wait_until(job, lambda job: job.progress > 0)
    assert (job.state, job.message[:5]) == ("running", "Step ")
    wait_until(job, has_ended)
    assert (job.state, job.progress, job.result) == ("succeeded", 100, STEPS)


def test_a_job_is_retried(worker, beat):
    job = Job.objects.enqueue(try_twice, queue=QUEUE)
    wait_until(job, has_ended)
    assert (job.state, job.retries, job.failures.count()) == ("succeeded", 1, 1)


{% if has_flower %}
def test_a_worker_cancels_a_revoked_job_and_runs_it_again(worker, beat, tmp_path):
    """Flower and `celery control revoke` send this."""
    gate = tmp_path / "gate"
    job = Job.objects.enqueue(hold, [str(gate)], queue=QUEUE)
    wait_until(job, is_held)
    app.control.broadcast("revoke", arguments={"task_id": str(job.pk)})
    wait_until(job, has_ended)
    assert job.state == "cancelled"
    gate.touch()
    job.run_again()
    wait_until(job, has_ended)
    assert job.state == "succeeded"


{% endif %}
def test_a_job_survives_that_its_worker_is_stopped_and_killed(worker, beat, start, tmp_path):
    """Only the kill counts as a crash."""
    gate = tmp_path / "gate"
    job = Job.objects.enqueue(hold, [str(gate)], queue=QUEUE)
    wait_until(job, is_held)
    worker.terminate()  # SIGTERM, as in a deploy
    worker.wait(300)
    stopped, second = job.worker, start("worker")
    wait_until(job, lambda job: is_held(job) and job.worker != stopped)
    kill(second)
    start("worker")
    gate.touch()
    wait_until(job, has_ended)
    assert (job.state, job.crashes) == ("succeeded", 1)
