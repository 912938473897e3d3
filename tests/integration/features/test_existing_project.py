"""A default output gets durable jobs by the library's page alone, and loses them again by it."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from harness.bake import LIBRARY
from harness.blocks import code
from harness.mails import Mails
from harness.outputs import CHECKS
from harness.project import Project, started, wait_for
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
LEFT = """
from django.apps import apps
from django.db import connection
tables = connection.introspection.table_names()
print(apps.is_installed("durable_jobs") or any("durable" in name for name in tables))
"""


@pytest.fixture
def project(bake):
    """The project that the page's example makes of a default output."""
    project = bake()
    project.commit()
    shutil.copy(WHEEL, project / "vendor")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    # Frozen: the lock file would be that of all platforms.
    project.call("sh", "-c", code(PAGE, "uv add"), PATH=path, UV_FROZEN="1")
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


def test_a_task_of_a_default_output_becomes_a_job_and_a_task_again(project, database, tmp_path):
    """Its worker is killed while it sends the email. Then it starts again, and sends it once."""
    project.call("make", "check")
    image_installs(project, tmp_path / "image")
    extra = {"FLOWER_BASIC_AUTH": "admin:password", "DEBUG": "False"}
    project.manage("shell", "-v0", "-c", CHECKS, **project.production(), **extra)
    with started(Redis(tmp_path / "broker")) as [broker], Mails(count=0) as mails:
        url = database.create("existing_project")
        variables = {**broker.variables, **mails.variables, "DATABASE_URL": url}
        run_tests(project, **broker.variables, DATABASE_URL=url)
        project.manage("migrate", **variables)
        commands = re.findall("^(?:worker|beat): .*(celery .*)", project.read("Procfile.dev"), re.M)
        worker, beat = (
            project.process(command, tmp_path / f"{number}.log", **variables)
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
        go_back(project, **variables)
        assert project.shell(LEFT, **variables) == "False"
        run_tests(project, **broker.variables, DATABASE_URL=url)


def run_tests(project, **variables):
    printed = project.call("make", "test", **variables)
    assert re.search(r"= \d+ passed in", printed), printed  # none was skipped


def image_installs(project, folder):
    """With what its Dockerfile copies before it installs."""
    stage = project.read("Dockerfile").partition("\nRUN")[0]
    names = " ".join(re.findall(r"^COPY (?!--)(.+) \S+$", stage, re.M)).split()
    for path in [path for name in names for path in project.glob(name)]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        (folder / path.name).parent.mkdir(exist_ok=True)
        copy(path, folder / path.name)
    install = "uv pip install --dry-run --all-extras -r pyproject.toml --python".split()
    Project(folder).run(*install, project / ".venv/bin/python")


def go_back(project, **variables):
    """Do what the page says: a plain task with another name, then no job, then no app."""
    [job] = re.findall(r"^@job\(.*?(?=\n\n\n)", project.read("orders/tasks.py"), re.M | re.DOTALL)
    project.call("git", "checkout", "HEAD", "--", "orders", "tests")
    for file in [*project.glob("orders/*.py"), *project.glob("tests/*.py")]:
        text = project.read(file)
        file.write_text(text.replace("send_confirmation", "email_confirmation"), "utf-8")
    plain = project.read("orders/tasks.py")
    project.append("orders/tasks.py", f"\n\nfrom durable_jobs.tasks import job\n\n\n{job}\n")
    [query] = re.findall(r"`(Job\.objects\.filter\(.*?)`", PAGE)
    query = query.replace("app.tasks.old", "orders.tasks.send_confirmation")
    script = f"from durable_jobs.models import Job\nprint({query}.exists())"
    assert project.shell(script, **variables) == "False"
    (project / "orders/tasks.py").write_text(plain, "utf-8")
    [command] = re.findall("`manage.py (migrate .* zero)`", PAGE)
    project.manage(*command.split(), **variables)
    project.call("git", "checkout", "HEAD", "--", "config", "pyproject.toml")
    (project / "vendor" / WHEEL.name).unlink()
    (project / ".venv").unlink()
    project.install()
