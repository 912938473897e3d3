"""Fixtures for tests of running outputs, which are installed from their own pyproject.toml."""

import itertools
import re
import shutil
from contextlib import contextmanager

import pytest

from . import servers
from .bake import CHOICES, DEFAULTS, WITH_JOBS, baked, name, product
from .mails import mails
from .project import Console, Project, fetch, started, wait_for
from .stack import SCHEDULE

ORDER = {"product": "Tea", "quantity": 2}
# Those of `make check` that test_bake.py cannot run, and production's, in one process.
CHECKS = """
from django.core.management import call_command
call_command("check", deploy=True, fail_level="WARNING")
call_command("makemigrations", check_changes=True, dry_run=True)
call_command("spectacular", validate=True, fail_on_warn=True, file="/dev/null")
"""
# Runs an action of the admin that stores a batch. The job after its jobs sends a mail.
MAIL_SUM = """
from django.test import Client
from users.models import User
client = Client(HTTP_HOST="localhost")
client.force_login(User.objects.get())
data = {"action": "mail_sum", "_selected_action": [1]}
result = client.post("/admin/orders/order/", data).status_code
"""
# A job with progress
COUNT = """

from durable_jobs.tasks import JobTask


@shared_task(base=JobTask, bind=True)
def count(self, to):
    for done in range(to):
        self.report(done, to, f"{done} of {to}")
        time.sleep(0.1)
    return to
"""
# When a plain task with a countdown of 2 s was sent, and the results of a task and of a chord, or
# the names of the errors without a result backend.
PLAIN = """
import time
from celery import chord
from celery.result import AsyncResult
from trials.tasks import add, tick, total
result = [time.time()]
tick.apply_async([path], countdown=2)
for get in (
    lambda: AsyncResult(add.delay(1, 2).id).get(timeout=60),
    lambda: chord([add.s(1, 2), add.s(3, 4)])(total.s()).get(timeout=60),
):
    try:
        result.append(get())
    except NotImplementedError as error:
        result.append(type(error).__name__)
"""


def combinations():
    """Yield every broker with every result backend and pool; schedule and example vary."""
    options, schedules = ("broker", "result_backend", "worker_pool"), CHOICES["periodic_tasks"]
    for number, chosen in enumerate(product({option: CHOICES[option] for option in options})):
        yield {
            **DEFAULTS,
            **WITH_JOBS,
            **chosen,
            "periodic_tasks": schedules[number % len(schedules)],
            "include_example": "no" if number % 5 == 4 else "yes",
        }


def first(**answers):
    """Return the first of the combinations with these answers."""
    return next(each for each in combinations() if answers.items() <= each.items())


def one_for_each_broker():
    return [first(broker=broker) for broker in CHOICES["broker"]]


def outputs(*answers):
    """Return a mark: run the test with these outputs, each in one process, to install it once."""
    params = [
        pytest.param(each, id=name(each), marks=pytest.mark.xdist_group(name(each)))
        for each in answers
    ]
    return pytest.mark.parametrize("output", params, indirect=True)


# Each broker with each pool: the first pool with the first result backend, the others with the
# other backends in turn. ../test_first_run.py makes the tour of the very first.
PAIRS = product({"broker": CHOICES["broker"], "worker_pool": CHOICES["worker_pool"][1:]})
OTHERS = itertools.cycle(CHOICES["result_backend"][1:])
other_tours = outputs(
    *one_for_each_broker()[1:],
    *(first(**pair, result_backend=next(OTHERS)) for pair in PAIRS),
)
every_pool = outputs(*(first(worker_pool=pool) for pool in CHOICES["worker_pool"]))
default_output = outputs(first())
plain_output = outputs(DEFAULTS)
both_outputs = outputs(*({**DEFAULTS, "durable_jobs": each} for each in CHOICES["durable_jobs"]))


@pytest.fixture(scope="module")
def output(request, cookies_session):
    """A baked project; outputs() says with which answers."""
    return baked(cookies_session, request.param)


@pytest.fixture(scope="module")
def project(output):
    """The output, installed."""
    output.install()
    return output


@pytest.fixture(scope="module")
def broker(output, tmp_path_factory):
    """Variables of real servers for this output alone. Requested first, as one may be missing."""
    with servers.real(output, tmp_path_factory.mktemp("servers")) as variables:
        yield variables


@pytest.fixture
def addresses(project, tmp_path):
    """Variables of servers that run for this test alone: a moto, too, if the project needs it."""
    used = servers.servers_of(project, tmp_path)
    with started(*used):
        yield servers.variables_of(used, project)


@contextmanager
def working(project, folder, **variables):
    """Run the servers of a project, a worker and a console, on SQLite. Give these two."""
    used = servers.servers_of(project, folder)
    variables |= servers.variables_of(used, project)
    variables["DATABASE_URL"] = f"sqlite:///{folder}/db.sqlite3"
    project.manage("migrate", "-v0", **variables)
    command, log = "celery -A config worker", folder / "worker.log"
    worker = project.process(command, log, says=" ready.", **variables)
    console = Console(project, folder / "console.log", **variables)
    with started(*used, worker, console):
        yield worker, console


@pytest.fixture
def copied(project, tmp_path):
    """A copy of the project, for a test that changes it."""
    skipped = shutil.ignore_patterns("__pycache__", "*.sqlite3*", ".data")
    copy = Project(shutil.copytree(project, tmp_path / "copy", symlinks=True, ignore=skipped))
    copy.answers = project.answers
    return copy


@pytest.fixture
def with_tasks(project, tmp_path):
    """The project with the app `trials`, a job and a periodic task: it needs no example."""
    settings = project / "config/settings.py"
    before = settings.read_text()
    project.add_app("trials", SCHEDULE.format(path=tmp_path / "ticked"))
    project.append("trials/tasks.py", COUNT)
    yield project
    settings.write_text(before)
    shutil.rmtree(project / "trials")


def use(project, tmp_path, **environment):
    """Start the project and use each of its parts. Return what it printed."""
    with project.up(**environment) as site:
        show_addresses(site)
        *_, done = site.follow(site.enqueue("count", 5))
        assert (done["state"], done["result"]) == ("succeeded", 5), done
        assert site.request("/api/jobs/", Authorization="")[0] == 401
        assert site.scrape()['durable_jobs_running{queue="celery"}'] == 0
        wait_for(lambda: site.scrape()["durable_jobs_sweep_age_seconds"] < 60, site=site)  # Beat

        if (project / "orders").exists():
            status, headers, order = site.request("/api/orders/", ORDER)
            assert (status, headers["Retry-After"]) == (202, "1")
            *_, job = site.follow(headers["Location"])
            assert job["state"] == "succeeded"
            assert site.request(f"/api/orders/{order['id']}/")[2]["confirmed_at"]
            assert "Thank you! You ordered 2 × Tea." in mails(project)
            assert site.ask(MAIL_SUM) == 302
            wait_for(lambda: "Subject: What was ordered" in mails(project), site=site)
            assert re.search(r"What was ordered.*^2 × Tea$", mails(project), re.DOTALL | re.M)

        late = tmp_path / "late"
        has_results = "RESULT_BACKEND" in project.read("config/settings.py")
        sent, *results = site.ask(f"path = {str(late)!r}{PLAIN}")
        assert results == ([3, 10] if has_results else ["NotImplementedError"] * 2)
        ran = wait_for(lambda: late.exists() and late.read_text(), site=site)
        assert float(ran) - sent > 1.9  # not 2: gevent counts from the start of its loop's round

        if site.has_flower:  # so the broker supports events and remote control
            show_in_flower(site, done["id"])
        endless = site.enqueue("count", 1000)
        following = site.follow(endless)
        while not next(following)["progress"]:
            pass
        if site.has_flower:
            assert site.ask_flower(f"/api/task/revoke/{endless.split('/')[3]}", {})[0] == 200
        else:
            assert site.request(f"{endless}cancel/", {})[0] == 200
        assert [job["state"] for job in following][-1] == "cancelled"

        wait_for((tmp_path / "ticked").exists, site=site)  # Beat
        for state in "succeeded", "cancelled":
            total = f'durable_jobs_ended{{state="{state}",task="trials.tasks.count"}}'
            assert site.scrape()[total] >= 1
        return site.log


def show_addresses(site):
    """Assert that `make run` printed the addresses of its pages, and that each one answers."""
    found = dict(re.findall(r"^ +(\w+) +(http://\S+)", site.log, re.MULTILINE))
    assert len(found) == 3 + site.has_flower, found
    for label, address in found.items():
        status = fetch(address)[0]
        assert status == 200 or (label, status) == ("Flower", 401)  # without its password


def show_in_flower(site, done):
    """Assert that Flower shows this job and its worker, and only with the password."""
    for path in "/api/workers", "/api/tasks":
        assert site.ask_flower(path, authenticated=False)[0] == 401
    wait_for(lambda: site.worker in site.ask_flower("/api/workers?refresh=1")[2], site=site)
    wait_for(lambda: site.find_in_flower(done), site=site)
    assert done in site.ask_flower("/api/tasks")[2]
