"""A default output gets durable jobs by the library's page, without baking again."""

import re
import shutil

import pytest

from harness.bake import LIBRARY
from harness.blocks import code
from harness.mails import Mails
from harness.outputs import CHECKS
from harness.project import Process, started, wait_for
from harness.servers import Redis
from test_wheel import WHEEL

PAGE = (LIBRARY / "docs/existing-project.md").read_text("utf-8")
ORDER = """
from rest_framework.test import APIClient
from users.models import User
client = APIClient(headers={"host": "localhost"})
client.force_login(User.objects.create_user("customer", email="customer@example.com"))
print(client.post("/api/orders/", {"product": "Tea"}).status_code)
"""
STATE = """
from durable_jobs.models import Job
from orders.models import Order
job = Job.objects.get()
print(f"{job.state},{job.crashes},{bool(Order.objects.get().confirmed_at)}")
"""


@pytest.fixture
def project(bake):
    project = bake()
    wheel = shutil.copy(WHEEL, project / "vendor")
    project.run("uv", "add", "--frozen", "--quiet", wheel)
    patch(project, code(PAGE, "config/settings.py"))
    project.install()
    return project


def patch(project, diff):
    """Change the files of a project, like a reader of this diff: it has no line numbers."""
    _, *parts = re.split(r"^ # (.+)\n", diff, flags=re.MULTILINE)
    for file, hunks in zip(parts[::2], parts[1::2], strict=True):
        for found, added in re.findall(r"((?:^[ -].*\n)+)((?:^\+.*\n)*)", hunks, re.MULTILINE):
            kept = re.sub(r"^-.*\n", "", found, flags=re.MULTILINE)
            old, new = (
                re.sub("^.", "", text, flags=re.MULTILINE) for text in (found, kept + added)
            )
            text = project.read(file)
            assert old in text, f"{file} does not have these lines of the page:\n{old}"
            (project / file).write_text(text.replace(old, new), "utf-8")


def test_a_task_of_a_default_output_becomes_a_job(project, tmp_path):
    """Its worker is killed while it sends the email. Then it starts again, and sends it once."""
    project.call("make", "check")
    extra = {"FLOWER_BASIC_AUTH": "admin:password", "DEBUG": "False"}
    project.manage("shell", "-v0", "-c", CHECKS, **project.production(), **extra)
    with started(Redis(tmp_path / "broker")) as [broker], Mails(count=0) as mails:
        variables = {**broker.variables, **mails.variables}
        printed = project.call("make", "test", **broker.variables)
        assert re.search(r"= \d+ passed in", printed), printed  # none was skipped
        project.manage("migrate", **variables)
        commands = re.findall("^(?:worker|beat): (celery .*)", project.read("Procfile.dev"), re.M)
        path = {"PATH": f"{project}/.venv/bin:/usr/bin:/bin", **variables}
        worker, beat = (
            Process(command.split(), tmp_path / f"{number}.log", cwd=project, variables=path)
            for number, command in enumerate(commands)
        )
        with started(worker, beat):
            assert project.shell(ORDER, **variables) == "201"
            wait_for(lambda: project.shell(STATE, **variables) == "running,0,False")
            worker.kill()
            mails.proceed.set()
            worker.start()
            wait_for(lambda: project.shell(STATE, **variables) == "succeeded,1,True")
            assert mails.received == ["customer@example.com"]
            assert worker.stop() == 0
