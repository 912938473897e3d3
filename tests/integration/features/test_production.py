"""The output's docs/production.md without containers: its commands make the project run."""

import re
import subprocess
import time
from uuid import uuid4

import pytest
import requests
import yaml

from harness import need, servers
from harness.bake import CHOICES, DEFAULTS, WITH_JOBS, render
from harness.blocks import blocks, code
from harness.containers import HTTPS
from harness.outputs import ORDER, outputs
from harness.project import (
    CONSOLE_MAIL,
    Process,
    Site,
    connects,
    fetch,
    free_ports,
    started,
    wait_for,
)

TABLE = "^\\| `((?:gunicorn|celery) .+?)` \\|"  # of processes
SECRET = "only-this-test-knows"
LARGE, TIMEOUT = bytes(10_000_000), 10  # seconds
# Only Beat starts a job whose countdown is over.
LATER = """
from durable_jobs.enqueue import enqueue
from orders.tasks import forecast_demand
from users.models import User
owner = User.objects.get()
print(enqueue(forecast_demand, ["Tea"], {"rounds": 1}, countdown=1, owner=owner).pk)
"""

# Its name has a hash of its content.
SCRIPT = """
from django.templatetags.static import static
print(static("durable_jobs/jobs.js"))
"""


@pytest.fixture
def machine(bake, database, tmp_path):
    """An output without containers on a server: Git brought no .env, and nothing is installed."""
    project = bake(durable_jobs="yes", deployment="none")
    with servers.real(project, tmp_path) as addresses:
        (project / ".env").unlink()
        variables = {
            **project.production(),
            **addresses,
            "DATABASE_URL": database.create(f"production_{uuid4().hex}"),
            "EMAIL_BACKEND": CONSOLE_MAIL,
            "FLOWER_BASIC_AUTH": f"admin:{SECRET}",
        }
        variables |= dict(zip(["PORT", "FLOWER_PORT"], free_ports(2), strict=True))
        variables["PATH"] = project.search_path
        yield project, variables


def test_the_commands_of_the_page_run_a_project(machine, tmp_path):
    """With deployment=none, the variables of .env.example and no packages for tests.

    Clients that download slowly block no other, and are not cut at gunicorn's timeout.
    """
    project, variables = machine
    page = project.read("docs/production.md")
    project.call("uv", "lock")
    project.call(*re.search(r"uv sync( --[a-z-]+)+", page)[0].split())
    assert not (project / ".venv/bin/pytest").exists()
    printed = {
        command: project.call(*command.split(), **variables)
        for block in blocks(page)
        for command in re.findall("^(python manage.py .+)", block.code, re.M)
    }
    assert [command.split()[2] for command in printed] == ["check", "migrate", "collectstatic"]
    assert "no issues" in printed["python manage.py check --deploy"]
    root = {"USERNAME": "root", "EMAIL": "root@example.com", "PASSWORD": SECRET}
    root = {f"DJANGO_SUPERUSER_{name}": value for name, value in root.items()}
    project.manage("createsuperuser", "--noinput", **variables, **root)
    token = project.manage("drf_create_token", "root", **variables)

    (project / "staticfiles/large").write_bytes(LARGE)  # more than the buffers on its way
    variables["GUNICORN_CMD_ARGS"] = f"--preload --timeout {TIMEOUT}"
    site = Site(project, None, variables)
    site.headers = HTTPS
    site.token = re.search("[0-9a-f]{40}", token)[0]
    options = {"cwd": project, "variables": variables}
    processes = [
        Process(["sh", "-c", f"exec {command}"], tmp_path / name, **options)
        for name, command in commands(project, page).items()
    ]
    with started(*processes) as [web, worker, _, flower]:
        wait_for(lambda: connects(variables["PORT"]) or not web.is_running())
        started_at = time.monotonic()
        downloads = [download(site) for _ in range(15)]  # gunicorn has 16 threads
        for path in ("/health/live", "/health/ready"):
            assert get(site, path, Host="10.0.0.1")[0] == 200, web.printed  # a load balancer
        assert get(site, "/", Host="example.org")[0] == 400
        assert get(site, "/", Host="example.com") == (301, "https://example.com/")
        script = project.shell(SCRIPT, **variables)
        assert get(site, script, **HTTPS)[0] == 200

        status, headers, order = site.request("/api/orders/", ORDER)
        assert status == 202, web.printed
        later = f"/api/jobs/{project.shell(LATER, **variables)}/"
        for url in (headers["Location"], later):
            *_, job = site.follow(url)
            assert job["state"] == "succeeded", job
        assert site.request(f"/api/orders/{order['id']}/")[2]["confirmed_at"]

        wait_for(lambda: connects(variables["FLOWER_PORT"]) or not flower.is_running())
        for password, answer in ((None, 401), (("admin", SECRET), 200)):
            assert fetch(f"{site.flower}/api/workers", auth=password)[0] == answer
        assert worker.stop() == 0
        time.sleep(max(0, started_at + TIMEOUT + 3 - time.monotonic()))
        for slow in downloads:
            assert slow.content == LARGE, web.printed
        assert "[WARNING]" not in web.printed


def download(site):
    """Begin to download a large file; return the response."""
    url = f"{site.web}/static/large"
    return requests.get(url, headers=HTTPS, stream=True, timeout=60)


def commands(project, page):
    """Return the commands of Procfile.dev, with that of the page for `web`, {name: command}.

    They are those in the page's table.
    """
    procfile = project.read("Procfile.dev").replace("python dev.py ", "")
    processes = dict(line.split(": ", 1) for line in procfile.splitlines())
    [processes["web"]] = re.findall(r"`web: (gunicorn [^`]*)`", page)
    assert re.findall(TABLE, page, re.M) == list(processes.values())
    return processes


def verify(folder, name, unit):
    """Assert that systemd accepts this unit and says nothing."""
    need("systemd-analyze", "systemd")
    (folder / name).write_text(unit)
    command = ["systemd-analyze", "verify", "--man=no", name]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("worker_pool", CHOICES["worker_pool"])
@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_systemd_accepts_the_unit_of_the_page(tmp_path, broker, worker_pool):
    """Its commands are those of the page's table, with files where this user may write."""
    answers = {"durable_jobs": "yes", "deployment": "none"}
    page = render("docs/production.md", broker=broker, worker_pool=worker_pool, **answers)
    unit = code(page, "[Unit]")
    name = re.search(r"\w+@\.service", page)[0]
    verify(tmp_path, name, unit)

    commands = dict(re.findall('^Environment="([a-z]+)=(.+)"$', unit, re.M))
    table = re.findall(TABLE, page, re.M)
    for (process, command), line in zip(commands.items(), table, strict=True):
        assert command.startswith(line), process
    for process in commands:
        assert f"my_project@{process}" in page


@pytest.mark.parametrize("worker_pool", CHOICES["worker_pool"])
def test_a_queue_has_a_worker_of_its_own_where_the_page_says(tmp_path, worker_pool):
    """In Procfile.dev, in the unit and in the files of Compose, it is the same command."""
    row = re.compile(r"^\| [^|]+ \| `([^`]*--queues reports[^`]*)`", re.M)
    _, service, service_of_code = row.findall(render("docs/production.md", worker_pool=worker_pool))
    page = render("docs/production.md", worker_pool=worker_pool, deployment="none")
    procfile, unit = row.findall(page)
    command = procfile.removeprefix("reports: python dev.py ")
    assert command == f"{re.findall(TABLE, page, re.M)[1]} --queues reports -n reports@%h"

    added = code(page, "[Unit]").replace("[Service]\n", f"[Service]\n{unit}\n")
    assert unit == f'Environment="reports={command.replace("%", "%%")}"'  # % is special there
    verify(tmp_path, "shop@.service", added)

    compose = render("compose.yaml", worker_pool=worker_pool)
    compose = re.sub("^  beat:", f"  {service}\n\n  beat:", compose, flags=re.M)
    services = yaml.safe_load(compose)["services"]
    in_container = services["reports"].pop("command")
    assert f"{in_container} -n reports@%h" == command
    without_command = {key: value for key, value in services["worker"].items() if key != "command"}
    assert services["reports"] == {**without_command, "scale": 1}

    compose = render("compose.dev.yaml", worker_pool=worker_pool)
    compose = yaml.safe_load(f"{compose.rstrip()}\n\n  {service_of_code}\n")
    reports = {**compose["x-code"], "command": f"python dev.py {in_container}"}
    assert compose["services"]["reports"] == reports


# The page as a staff user sees it
PAGE = """
from django.test import Client
from users.models import User
staff, _ = User.objects.get_or_create(username="staff", is_staff=True)
client = Client()
client.force_login(staff)
print(client.get("/", secure=True, headers={"host": "example.com"}).text)
"""


@outputs(DEFAULTS, {**DEFAULTS, **WITH_JOBS})
def test_production_links_to_flower_only_where_its_address_is_set(project):
    """Not to the machine of whoever reads the page."""
    variables = {"DATABASE_URL": "sqlite:///pages.sqlite3", "ALLOWED_HOSTS": "example.com"}
    project.manage("migrate", "-v0", **variables)
    project.manage("collectstatic", "-v0", "--noinput", **variables, DEBUG="False")

    def page(**more):
        return project.manage("shell", "-v0", "-c", PAGE, **variables, **more)

    assert "Admin</a>" in page(DEBUG="False") and "Flower</a>" not in page(DEBUG="False")
    assert ">Flower</a>" in page(DEBUG="True")
    hashed = r"/static/(?:\w+/)*\w+\.[0-9a-f]{12}\.js"  # browsers may keep them
    assert re.search(hashed, page(DEBUG="False")) and not re.search(hashed, page(DEBUG="True"))
    url = "https://flower.example.com/"
    assert f'<a href="{url}">Flower</a>' in page(DEBUG="False", FLOWER_URL=url)


def get(site, path, **headers):
    """Send a GET with these headers alone. Return (status, Location)."""
    status, found, _ = fetch(site.web + path, headers=headers, allow_redirects=False, timeout=300)
    return status, found.get("Location")
