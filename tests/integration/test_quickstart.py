"""The quick start of the library's README works in a bare Django project, as it is written."""

import re
import sys

import pytest

from harness.bake import LIBRARY
from harness.blocks import Reader, blocks
from harness.project import Project, wait_for
from harness.servers import Process, RabbitMQ, Redis
from test_wheel import WHEEL

README = (LIBRARY / "README.md").read_text("utf-8")
STATE = """
from durable_jobs.models import Job
job = Job.objects.latest("created_at")
print(job.progress, job.crashes, job.state)
"""


@pytest.fixture
def project(tmp_path):
    """What `django-admin startproject` writes, with an environment of its own."""
    project = Project(tmp_path / "project")
    project.mkdir()
    project.call(sys.executable, "-m", "uv", "venv", "--quiet", ".venv")
    install = ["uv", "pip", "install", "--quiet", "--python", ".venv/bin/python"]
    project.call(sys.executable, "-m", *install, str(WHEEL), "celery[redis]")
    project.call(".venv/bin/django-admin", "startproject", "mysite", ".")
    project.manage("startapp", "reports")
    return project


@pytest.mark.parametrize(
    "server",
    [
        pytest.param(Redis, id="redis", marks=pytest.mark.xdist_group("quickstart-redis")),
        pytest.param(RabbitMQ, id="rabbitmq", marks=pytest.mark.xdist_group("quickstart-rabbitmq")),
    ],
)
def test_a_job_of_a_killed_worker_finishes_in_a_bare_project(server, project, tmp_path):
    (tmp_path / "broker").mkdir()
    broker = server(tmp_path / "broker")
    processes = [broker]
    reader = Reader(project)
    commands = re.findall(r"^celery -A mysite (?:worker|beat)$", README, re.MULTILINE)
    worker, beat, again = (
        Process(command.split(), tmp_path / f"{number}.log", cwd=project, variables=path(project))
        for number, command in enumerate(commands)
    )
    try:
        broker.start()
        for block in blocks(README):
            code = re.sub('"redis://.*"', f'"{broker.variables["CELERY_BROKER_URL"]}"', block.code)
            if block.use in ("file", "sh"):
                getattr(reader, f"run_{block.use}")(code, block.file)
        processes += [worker, beat, again]
        worker.launch()
        beat.launch()
        [enqueue] = [block.code for block in blocks(README) if ".enqueue(" in block.code]
        reader.run_shell(enqueue, None)
        wait_for(lambda: int(project.manage("shell", "-v0", "-c", STATE).split()[0]) > 5)
        worker.kill()
        again.launch()
        state = wait_for(lambda: final(project))
        assert state[1:] == ["1", "succeeded"], again.printed
    finally:
        for process in processes:
            if process.is_running():
                process.kill()


def path(project):
    return {"PATH": f"{project}/.venv/bin:/usr/bin:/bin"}


def final(project):
    words = project.manage("shell", "-v0", "-c", STATE).split()
    return words if words[-1] in ("succeeded", "failed") else None
