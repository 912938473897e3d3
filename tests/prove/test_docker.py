"""Outputs in containers, built and started as baked."""

import itertools
import json
import re
import shutil
import subprocess
import time

import pytest
import yaml

from harness import missing
from harness.bake import CHOICES, baked
from harness.project import Site, env, free_ports, wait_for

ORDER = {"email": "you@example.com", "product": "Tea", "quantity": 1}
SOFT_SHUTDOWN_SECONDS = 2
# A job that runs much longer than SOFT_SHUTDOWN_SECONDS and reports 1,000 times.
LONG_JOB = """
from users.models import User
from jobs.models import Job
from orders.tasks import forecast_demand
arguments = {"rounds": 1_000_000}
print(Job.objects.enqueue(forecast_demand, ["Tea"], arguments, owner=User.objects.get()).pk)
"""
CRASHES = "from jobs.models import Job; print(Job.objects.get(pk='{}').crashes)"
MEGABYTE = 1_000_000

# An image with the newest Python and all packages, including those for tests.
TESTED = """
FROM python:3.14-slim
COPY --from=ghcr.io/astral-sh/uv:0.13.8 /uv /usr/local/bin/
ENV UV_LINK_MODE=copy UV_CACHE_DIR=/cache VIRTUAL_ENV=/venv PATH=/venv/bin:$PATH
COPY pyproject.toml /
RUN --mount=type=cache,target=/cache uv venv /venv && uv pip install -r pyproject.toml --group dev
WORKDIR /app
"""
VERSIONS = {  # of Django
    "default": ["5.2", "6.1"],
    "admin": ["5.2", "6.0"],  # django-celery-beat has no release for 6.1
}
ANSWERS = {"default": {}, "admin": {"periodic_tasks": "admin", "result_backend": "database"}}

# The tests of one stack run one after the other.
STACKS = [
    pytest.param(broker, marks=pytest.mark.xdist_group(f"docker-{broker}"))
    for broker in CHOICES["broker"]
]
on_one = pytest.mark.parametrize("stack", STACKS[:1], indirect=True)


def docker(*command):
    result = subprocess.run(["docker", *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def engine():
    """Call missing() on a machine without a Docker engine or without Compose v2."""
    if not shutil.which("docker"):
        missing("docker is not installed")
    for command in ("info", "compose version"):
        if subprocess.run(["docker", *command.split()], capture_output=True).returncode:
            missing(f"`docker {command}` fails: no engine, or no Compose v2")


@pytest.fixture(scope="module", params=STACKS)
def stack(request, engine, cookies_session):
    """Start the output for a broker in containers; remove them and their data at the end.

    Only `.env` is changed: a shorter soft shutdown, because workers wait that long at each stop.
    """
    port, flower = free_ports(2)
    project = baked(cookies_session, {"broker": request.param, "project_slug": f"shop_{port}"})
    with open(project / ".env", "a") as file:
        file.write(f"SOFT_SHUTDOWN_SECONDS={SOFT_SHUTDOWN_SECONDS}\n")
    stack = Stack(project, PORT=port, FLOWER_PORT=flower)
    try:
        stack.up("--build")
        yield stack
    finally:
        stack.compose("down", "--volumes", "--remove-orphans")
        subprocess.run(["docker", "image", "rm", project.name], capture_output=True)


class Stack(Site):
    """A site that `docker compose up` started."""

    def __init__(self, project, **environment):
        super().__init__(project, process=None, environment=environment)
        self.began = time.monotonic()

    @property
    def log(self):
        return self.compose("ps", "--all") + self.compose("logs", "--no-color")

    def compose(self, *command):
        return self.project.call("docker", "compose", *command, **self.environment)

    def up(self, *options):
        command = ["docker", "compose", "up", "--detach", "--wait", *options]
        result = subprocess.run(
            command,
            cwd=self.project,
            env=env(**self.environment),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr + self.log
        printed = self.compose("logs", "--no-color", "migrate")
        self.token = re.findall("Token ([0-9a-f]{40})", printed)[-1]

    def shell(self, code):
        """Run Python code in the web container; return the last word that it prints."""
        command = ("python", "manage.py", "shell", "-v0", "-c", code)
        return self.compose("exec", "-T", "web", *command).split()[-1]

    def containers(self, *options):
        """Return what `docker inspect` says about the containers: {service: [containers]}."""
        ids = self.compose("ps", "--quiet", *options).split()
        found = {}
        for container in json.loads(docker("inspect", *ids)):
            service = container["Config"]["Labels"]["com.docker.compose.service"]
            found.setdefault(service, []).append(container)
        return found

    def order(self):
        """Place an order, wait until its job has succeeded; return the order's URL and the job."""
        status, headers, order = self.request("/api/orders/", ORDER)
        assert status == 202, self.log
        *_, job = self.follow(headers["Location"])
        assert job["state"] == "succeeded", job
        return f"/api/orders/{order['id']}/", job

    def start_long_job(self):
        """Start LONG_JOB, wait for its first progress of 5 or more; return its URL and its id."""
        self.order()
        pk = self.shell(LONG_JOB)
        url = f"/api/jobs/{pk}/"
        job = next(job for job in self.follow(url) if job["progress"] >= 5)
        assert job["state"] == "running", f"too quick: {job}"
        return url, pk


def test_an_order_becomes_a_succeeded_job(stack, record_property):
    url, job = stack.order()
    seconds = time.monotonic() - stack.began
    record_property("seconds from up to succeeded", round(seconds))
    print(f"{stack.project.name}: {seconds:.0f} s from up to succeeded, the build included")

    assert stack.request(url)[2]["confirmed_at"]
    assert "Thank you! You ordered 1 × Tea." in stack.compose(
        "exec", "-T", "worker", "sh", "-c", "cat .data/mail/*"
    )
    assert stack.request("/api/jobs/", Authorization="")[0] == 401
    if stack.has_flower:
        assert wait_for(lambda: stack.find_in_flower(job["id"]), site=stack)
        assert stack.ask_flower("/api/workers", authenticated=False)[0] == 401


def test_the_worker_reads_an_uploaded_file(stack):
    status, headers, _ = stack.upload("/api/imports/", "product,quantity\nTea,2\nTea,3")
    assert status == 202, stack.log
    *_, job = stack.follow(headers["Location"])
    assert (job["label"], job["result"]) == ("Import upload.csv", {"imported": 2}), job


def test_each_service_is_healthy_and_has_few_rights(stack):
    for service, [container] in stack.containers("--all").items():
        state, host = container["State"], container["HostConfig"]
        if state["Running"]:
            assert state["Health"]["Status"] == "healthy", service
            assert host["RestartPolicy"]["Name"] == "unless-stopped", service
            assert docker("exec", container["Id"], "id", "-u") != "0", service
        else:
            assert state["ExitCode"] == 0, service
        assert container["Config"]["User"] not in ("", "0", "root"), service
        assert host["ReadonlyRootfs"] and host["Init"] and host["Memory"], service
        assert host["CapDrop"] == ["ALL"], service
        assert host["SecurityOpt"] == ["no-new-privileges:true"], service
        assert host["LogConfig"]["Config"]["max-size"], service
        ports = host["PortBindings"].values()
        assert all(port["HostIp"] == "127.0.0.1" for [port] in ports), service


def test_the_image_is_small_and_contains_no_secret(stack):
    image, base = stack.project.name, "python:3.14-slim"
    sizes = [int(docker("image", "inspect", "-f", "{{.Size}}", name)) for name in (image, base)]
    added = (sizes[0] - sizes[1]) / MEGABYTE
    print(f"{image}: {sizes[0] / MEGABYTE:.0f} MB, {added:.0f} MB on top of {base}")
    assert added <= (130 if stack.has_flower else 170)  # boto3 knows every service of AWS

    layers = subprocess.run(["docker", "image", "save", image], stdout=subprocess.PIPE).stdout
    assert b"config/settings.py" in layers
    secrets = re.findall("[0-9a-f]{24}", stack.project.read(".env"))
    assert secrets
    assert not [secret for secret in secrets if secret.encode() in layers]


def test_a_stop_in_the_middle_of_a_job_loses_nothing(stack):
    """The data also outlives the containers."""
    order, _ = stack.order()
    url, pk = stack.start_long_job()
    token = stack.token
    stack.compose("down")
    stack.up()
    *_, job = stack.follow(url)

    assert job["state"] == "succeeded"
    assert stack.shell(CRASHES.format(pk)) == "0"  # the worker handed it back
    assert stack.token == token
    assert stack.request(order)[0] == 200


@on_one
def test_a_job_of_a_killed_worker_runs_again(stack):
    url, pk = stack.start_long_job()
    stack.compose("kill", "worker")
    stack.compose("start", "worker")
    *_, job = stack.follow(url)

    assert job["state"] == "succeeded"
    assert stack.shell(CRASHES.format(pk)) == "1"


@on_one
def test_compose_scales_the_workers(stack):
    stack.up("--scale", "worker=3")
    assert len(stack.containers()["worker"]) == 3

    def workers():
        return len(stack.ask_flower("/api/workers?refresh=1")[2] or []) >= 3

    if stack.has_flower:
        assert wait_for(workers, site=stack)
    stack.up("--scale", "worker=1")


@on_one
def test_the_query_that_scales_workers_counts_jobs(stack, bake):
    """The query is in deploy/kubernetes/ and needs PostgreSQL."""
    manifests = bake(deployment="kubernetes").read("deploy/kubernetes/base/workers.yaml")
    queries = [
        each["spec"]["triggers"][0]["metadata"]["query"]
        for each in yaml.safe_load_all(manifests)
        if each["kind"] == "ScaledObject"
    ]
    [query] = [query for query in queries if "'cpu'" in query]

    def count():
        name = stack.project.name
        psql = ("psql", "-U", name, "-d", name, "-tAc", query)
        return int(stack.compose("exec", "-T", "db", *psql))

    assert count() == 0
    url, _ = stack.start_long_job()
    stack.shell(LONG_JOB)
    stack.shell(LONG_JOB.replace("owner", "countdown=3600, owner"))
    assert count() == 2
    for job in stack.request("/api/jobs/")[2]["results"]:
        stack.request(f"{job['url'].removeprefix(stack.web)}cancel/", {})
    assert count() == 0


@on_one
def test_a_frozen_service_is_unhealthy(stack):
    """Its container runs, but SIGSTOP has paused every process in it."""
    services = ["web", "worker", "beat"]

    def health():
        containers = stack.containers()
        return {containers[service][0]["State"]["Health"]["Status"] for service in services}

    for service in services:
        stack.compose("exec", "-T", service, "sh", "-c", "kill -STOP -1")
    wait_for(lambda: health() == {"unhealthy"}, site=stack)
    for service in services:
        stack.compose("exec", "-T", service, "sh", "-c", "kill -CONT -1")
    wait_for(lambda: health() == {"healthy"}, site=stack)


def test_compose_reads_every_file(engine, bake):
    """It finds what the schema cannot: wrong references, and variables missing from .env."""
    seen = set()
    options = ("broker", "result_backend", "worker_pool")
    for values in itertools.product(*(CHOICES[option] for option in options)):
        project = bake(**dict(zip(options, values, strict=True)))
        if (text := project.read("compose.yaml")) not in seen:
            seen.add(text)
            project.call("docker", "compose", "config", "--quiet")
    assert len(seen) > 1


ATTACKS = """
from django.db import connection
for sql in [
    "COPY (SELECT 1) TO PROGRAM 'touch /tmp/broken'",
    "CREATE TEMP TABLE t (x text); COPY t FROM PROGRAM 'id'",
    "SELECT pg_read_file('/etc/passwd')",
    "CREATE ROLE another SUPERUSER",
    "CREATE DATABASE another",
    "ALTER ROLE CURRENT_USER SUPERUSER",
]:
    try:
        with connection.cursor() as cursor:
            cursor.execute(sql)
        print("DONE:", sql)
    except Exception as error:
        assert "permission denied" in str(error), error
print("refused")
"""
AS_SUPERUSER = """
import psycopg
from django.db import connection
options = {**connection.get_connection_params(), "user": "postgres"}
try:
    psycopg.connect(**{name: options[name] for name in ("host", "user", "password", "dbname")})
    print("connected")
except psycopg.OperationalError as error:
    assert "password authentication failed" in str(error), error
    print("refused")
"""


@on_one
def test_the_app_has_no_power_over_the_database_server(stack):
    assert stack.shell(ATTACKS) == "refused"
    assert stack.shell(AS_SUPERUSER) == "refused"


@on_one
def test_no_command_line_shows_a_secret(stack):
    secrets = re.findall("[0-9a-f]{24}", stack.project.read(".env"))
    assert secrets
    for service, [container] in stack.containers("--all").items():
        arguments = [container["Path"], *container["Args"]]
        if container["State"]["Running"]:
            arguments += [docker("top", container["Id"], "-o", "pid,args")]
        assert not [secret for secret in secrets if secret in " ".join(arguments)], service


def test_the_image_contains_no_backup(engine, bake, tmp_path):
    """Neither the backup file of docs/operation.md nor one with another usual name of a dump."""
    project = bake()
    [backup] = set(re.findall(r"pg_dump .* > (\S+?)`", project.read("docs/operation.md")))
    backups = [backup, "shop-2026-01-31.sql.gz", "shop.dump"]
    for name in backups:
        (project / name).write_text("secrets")
    (project / "jobs/report.sql").write_text("SELECT 1")  # part of the program
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    project.call(
        *("docker", "build", "--file", tmp_path / "Dockerfile"),
        *("--output", tmp_path / "image", "."),
        DOCKER_BUILDKIT=1,
    )
    project.call("git", "init", "--quiet")
    tracked = project.call("git", "ls-files", "--others", "--exclude-standard").split()

    assert (tmp_path / "image/jobs/report.sql").exists()
    assert "jobs/report.sql" in tracked
    for name in backups:
        assert not (tmp_path / "image" / name).exists()
        assert name not in tracked


@pytest.mark.parametrize(
    ("answers", "django"), [(name, version) for name in VERSIONS for version in VERSIONS[name]]
)
def test_its_own_tests_pass_with_these_versions(engine, bake, answers, django):
    """With only the version of Django edited, in Python 3.14. A DeprecationWarning fails a test."""
    project = bake(**ANSWERS[answers])
    pyproject = project.read("pyproject.toml")
    assert '"django~=5.2.0"' in pyproject
    pyproject = pyproject.replace("django~=5.2.0", f"django~={django}.0")
    (project / "pyproject.toml").write_text(pyproject)
    (project / "Dockerfile").write_text(TESTED)
    image = f"{project.name}_{answers}_{django}"
    docker("build", "--quiet", "--tag", image, str(project))
    test = ["python", "-W", "error::DeprecationWarning", "-m", "pytest"]
    run = ["run", "--rm", "--volume", f"{project}:/app", image]
    try:
        assert docker(*run, "django-admin", "--version").startswith(django)
        printed = docker(*run, *test)
    finally:
        subprocess.run(["docker", "image", "rm", image], capture_output=True)
    assert re.search(r"= \d+ passed in", printed), printed


@on_one
def test_make_dev_restarts_the_worker_after_an_edit(stack):
    """What `make up` starts does not restart: it has the code of its image."""
    tasks = stack.project / "orders/tasks.py"

    def starts():
        return stack.compose("logs", "worker").count(" ready.")

    stack.project.call("make", "dev", **stack.environment)
    try:
        before = starts()
        tasks.write_text(tasks.read_text() + "\n# edited\n")
        wait_for(lambda: starts() > before, site=stack)
        stack.order()
    finally:
        stack.up()
    before = starts()
    tasks.write_text(tasks.read_text() + "\n# edited again\n")
    time.sleep(5)
    assert starts() == before
