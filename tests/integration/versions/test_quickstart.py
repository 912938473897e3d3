"""The quick start of the library's README works in a bare Django project, as it is written."""

import re

import pytest

from harness.bake import LIBRARY
from harness.blocks import Reader, blocks
from harness.libraries import SUPPORTED, environment
from harness.project import Project, started, wait_for
from harness.servers import RabbitMQ, Redis
from test_wheel import STEADY_WHEEL, WHEEL

CELERY = SUPPORTED["celery"]
README = (LIBRARY / "README.md").read_text("utf-8")
GUIDE = (LIBRARY / "docs/guide.md").read_text("utf-8")
ALL_STATES = """
from durable_jobs.models import Batch, Job
rows = [*Batch.objects.all(), *Job.objects.filter(due_at__isnull=False)]
print(*sorted({row.state for row in rows}))
"""
STATE = """
from durable_jobs.models import Job
job = Job.objects.latest("created_at")
print(job.progress, job.crashes, job.state)
"""


@pytest.fixture(params=[CELERY[-1]])
def project(tmp_path, request):
    """What `django-admin startproject` writes, with an environment of its own."""
    project = Project(tmp_path / "project")
    project.mkdir()
    environment(project, STEADY_WHEEL, WHEEL, f"celery[redis]~={request.param}.0")
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
@pytest.mark.parametrize("project", [CELERY[0], CELERY[-1]], indirect=True)
def test_a_job_of_a_killed_worker_finishes_in_a_bare_project(server, project, tmp_path):
    reader = Reader(project)
    worker, beat, again = commands(project, tmp_path)
    with started(server(tmp_path / "broker")) as [broker]:
        follow(README, reader, broker, "file", "sh")
        with started(worker, beat):
            [enqueue] = [block.code for block in blocks(README) if ".enqueue(" in block.code]
            reader.run("shell", enqueue)
            wait_for(lambda: int(project.manage("shell", "-v0", "-c", STATE).split()[0]) > 5)
            worker.kill()
            with started(again):
                state = wait_for(lambda: final(project))
                assert state[1:] == ["1", "succeeded"], again.printed


def test_the_code_of_the_guide_runs(project, tmp_path):
    """All of its jobs succeed, among them those of its batches."""
    worker, beat, _ = commands(project, tmp_path)
    with started(Redis(tmp_path / "broker")) as [broker]:
        reader = Reader(project)
        follow(README, reader, broker, "file", "sh")
        follow(GUIDE, reader, broker, "file", "shell")
        with started(worker, beat):
            states = wait_for(lambda: all_final(project))
            assert states == ["succeeded"], worker.printed


def commands(project, folder):
    """Return the processes of the README: a worker, Beat, and another worker."""
    found = re.findall(r"^celery -A mysite (?:worker|beat)$", README, re.MULTILINE)
    logs = (folder / f"{number}.log" for number in range(len(found)))
    return [project.process(*each) for each in zip(found, logs, strict=True)]


def follow(page, reader, broker, *uses):
    """Do what the blocks of a page with these uses say."""
    for block in blocks(page):
        code = re.sub('"redis://.*"', f'"{broker.variables["CELERY_BROKER_URL"]}"', block.code)
        if block.use in uses:
            reader.run(block.use, code, block.file)


def final(project):
    words = project.manage("shell", "-v0", "-c", STATE).split()
    return words if words[-1] in ("succeeded", "failed") else None


def all_final(project):
    states = project.manage("shell", "-v0", "-c", ALL_STATES).split()
    return None if {"open", "queued", "running"} & {*states} else states
