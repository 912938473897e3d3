"""A reader of an output's pages, who types what they say and looks at what they promise.

For each block of code there is a step in TYPED or RUN, a test in ELSEWHERE or a reason in NOT_RUN.
"""

import ast
import itertools
import json
import os
import re
import subprocess
import textwrap
from functools import cache

from .bake import render
from .browser import browser
from .pages import blocks
from .project import env, wait_for
from .servers import Process

# The outputs whose pages are followed. In the other outputs, the steps' blocks have the same code.
FOLLOWED = [
    {},
    {"broker": "rabbitmq", "worker_pool": "threads", "include_example": "no"},
]
TYPED = {}  # {(page, heading, first line of the block): what a reader types before `make run`}
RUN = {}  # ... and what he does while it runs
ELSEWHERE = {  # the test that takes the block from the page
    (
        "README.md",
        "Start",
        "Jobs     http://127.0.0.1:8000/          your jobs: state, progress, result, cancel",
    ): "tests/test_first_run.py::test_it_runs",
    ("docs/workers.md", "The broker: RabbitMQ", "from config import celery_app"): (
        "tests/integration/test_plain_tasks.py::test_a_dead_letter_is_kept_and_can_be_sent_again"
    ),
    ("docs/workers.md", "The broker: Amazon SQS", "Resources:"): (
        "tests/integration/test_pages.py::test_the_template_makes_the_queues_of_the_project"
    ),
    ("docs/workers.md", "The result backend: DynamoDB", "Resources:"): (
        "tests/integration/test_pages.py::test_the_template_makes_a_table_that_keeps_results"
    ),
    ("docs/production.md", "With systemd", "[Unit]"): (
        "tests/integration/test_production.py::test_systemd_accepts_the_unit_of_the_page"
    ),
    ("docs/production.md", "On the internet", "COMPOSE_PROFILES=https"): (
        "tests/integration/test_docker.py::test_the_profile_https_serves_the_project"
    ),
    ("docs/operation.md", "Prometheus", "# prometheus.yml"): (
        "tests/integration/test_operation.py::test_prometheus_accepts_the_configuration"
    ),
    (
        "docs/sentinel.md",
        "Settings",
        "# Redis behind Sentinel: what a URL with sentinel:// cannot say",
    ): "tests/test_bake.py::test_the_settings_for_sentinel_fit_every_project_with_redis",
}
KUBERNETES = "kubectl delete job migrate --namespace my-project --ignore-not-found"
MONITORING = "docker compose --profile monitoring up --detach --wait"
CLONE = "git clone https://example.com/my_project.git"
FAILOVER = "redis-cli -h host1 -p 26379 sentinel failover mymaster"
MASTER = "redis-cli -h host1 -p 26379 sentinel get-master-addr-by-name mymaster"
NOT_RUN = {
    ("docs/workers.md", "How many slots", "slots = tasks per second × seconds per task × 1.33"): (
        "a formula"
    ),
    ("docs/production.md", "In containers", "make up"): (
        "needs Docker: tests/integration/test_docker.py runs it"
    ),
    ("docs/production.md", "In containers", MONITORING): (
        "needs Docker: tests/integration/test_docker.py runs it"
    ),
    ("docs/production.md", "With systemd", "useradd --system my_project"): "needs systemd",
    ("docs/production.md", "On the internet", CLONE): "the reader's own repository",
    ("docs/production.md", "On Kubernetes", KUBERNETES): "needs a cluster",
    ("docs/sentinel.md", "Try it", "python manage.py check --deploy"): "needs a Sentinel",
    ("docs/sentinel.md", "Try it", FAILOVER): "needs a Sentinel with two hosts",
    ("docs/sentinel.md", "Try it", MASTER): "needs a Sentinel with two hosts",
    ("jobs/README.md", "How a job lives", "stateDiagram-v2"): "a picture",
}
# Tests of code that stands in a page without a test of its own.
TESTS = """
import asyncio
from types import SimpleNamespace

import pytest
from asgiref.sync import async_to_sync
from celery import current_app, shared_task
from celery.beat import Scheduler
from django.db import IntegrityError
from rest_framework.decorators import api_view
from rest_framework.test import APIRequestFactory, force_authenticate

from jobs.models import Failure, Job
from jobs.tasks import JobError, JobTask
from jobs.views import accepted
from reports.models import Account
from reports.tasks import build_report, charge_all, fetch_pages, my_task


@pytest.fixture(autouse=True)
def without_the_work(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
"""


def step(table, page, heading, first_line=""):
    def register(function):
        table[page, heading, first_line] = function
        return function

    return register


def import_lines(code):
    """Yield the numbers of the lines that are imports, from 0."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node.lineno - 1


class Reader:
    def __init__(self, project, folder, **variables):
        self.project, self.folder, self.variables = project, folder, variables
        # As if the environment were activated: pages also write `celery` without .venv/bin/.
        self.path = f"{project}/.venv/bin:{os.environ['PATH']}"
        self.site = None
        self.jobs = []  # [(URL of a job that was started, its result)]

    # Typing

    def call(self, command, typed=None):
        """Run a command of a page in the project's folder, and return what it prints.

        The addresses and the token are those of `make run`. `typed` is what the command reads.
        """
        variables = self.variables
        if self.site:
            variables = self.site.environment
            for address in ("http://127.0.0.1:8000", "https://example.com"):
                command = command.replace(address, self.site.web)
            command = command.replace("Token …", f"Token {self.site.token}")
        result = subprocess.run(
            ["bash", "-ec", command],  # each line must succeed
            cwd=self.project,
            env=env(**{**variables, "PATH": self.path}),
            input=typed,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        return result.stdout

    def write(self, file, code):
        path = self.project / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, "utf-8")

    def add(self, file, code):
        """Add code to a file: its imports to those of the file, the rest at the end."""
        own, lines = self.project.read(file).splitlines(), code.splitlines()
        imports = [lines[number] for number in import_lines(code)]
        rest = [line for line in lines if line not in imports]
        place = next(import_lines("\n".join(own)), 0)
        own[place:place] = [line for line in imports if line not in own]
        self.write(file, "\n".join([*own, "", *rest, ""]))

    def insert(self, file, name, item):
        """Add an item to a list or dictionary that is the value of this name or key."""
        lines = self.project.read(file).splitlines(keepends=True)
        values = []
        for node in ast.walk(ast.parse("".join(lines))):
            match node:
                case ast.Assign([ast.Name(id)], ast.Dict() | ast.List() as value) if id == name:
                    values.append(value)
                case ast.Dict(keys, of_keys):
                    named = {ast.unparse(k): v for k, v in zip(keys, of_keys, strict=True) if k}
                    values += [named[repr(name)]] if repr(name) in named else []
        [value] = values
        number, column = value.end_lineno - 1, value.end_col_offset - 1
        before, after = "".join(lines[:number]) + lines[number][:column], lines[number][column:]
        comma = "" if before.rstrip()[-1] in ",[{" else ", "
        self.write(file, before + comma + item + after + "".join(lines[number + 1 :]))

    def test(self, name, code, fixtures="run_jobs, user"):
        """Add a test to reports/test_pages.py."""
        file = "reports/test_pages.py"
        own = self.project.read(file) if (self.project / file).exists() else TESTS
        body = textwrap.indent(textwrap.dedent(code).strip(), "    ")
        self.write(file, f"{own}\n\ndef test_{name}({fixtures}):\n{body}\n")

    # Looking

    def evaluate(self, code):
        """Type code into a shell of Django, and return the value of the last expression."""
        *body, last = ast.parse(code).body
        lines = [*map(ast.unparse, body), f"result = {ast.unparse(last.value)}"]
        return self.site.ask("\n".join(lines))

    def newest_job(self):
        return self.site.request("/api/jobs/")[2]["results"][0]

    def expect(self, job, result):
        """Let finish() wait until this job has succeeded with this result."""
        self.jobs.append((f"/api/jobs/{job}/", result))

    def finish(self):
        for url, result in self.jobs:
            *_, job = self.site.follow(url)
            assert (job["state"], job["result"]) == ("succeeded", result), job


@cache
def followed():
    """Return the code of each block that the tests follow, {(page, heading, first line): codes}."""
    found = {}
    for answers, page in itertools.product(FOLLOWED, {page for page, *_ in TYPED | RUN}):
        text = render(page, project_name="My Project", description="A project", **answers)
        for block in blocks(page, text):
            if block.key in TYPED | RUN:
                found.setdefault(block.key, set()).add(block.code)
    return found


def check_code(page, text):
    """Assert that each block of code on a page of any output is tested, or that we say why not."""
    for block in blocks(page, text):
        if block.code and block.key not in ELSEWHERE | NOT_RUN:
            assert block.key in followed(), f"harness/reader.py has no step for {block.key}"
            assert block.code in followed()[block.key], f"no output of FOLLOWED has this\n{block}"


def follow(reader, project_blocks):
    """Type what the blocks say, from top to bottom. Then start the project, and use it so."""
    for block in project_blocks:
        if type_it := TYPED.get(block.key):
            type_it(reader, block)
    reader.call("make lint check")
    printed = reader.call("make test ARGS='reports/test_crash.py reports/test_pages.py'")
    assert re.search(r"= \d+ passed in", printed), printed
    with reader.project.up(**reader.variables) as reader.site:
        for block in project_blocks:
            if use_it := RUN.get(block.key):
                use_it(reader, block)
        reader.finish()


# README.md


@step(RUN, "README.md", "Start", "make run")
def start(reader, block):
    """follow() has typed it."""
    assert reader.site.process.args == block.code.split()


@step(TYPED, "README.md", "Your first job", "import time")
def create_the_app(reader, block):
    reader.call(block.said("Create an app: {}"))
    item, name, file = block.said("Add {} to {} in {}")
    reader.insert(file, name, item)
    reader.write(block.said("Write {}. Arguments"), block.code)


SHELL = "from reports.tasks import build_report  # the shell has imported User"


@step(RUN, "README.md", "Your first job", SHELL)
def enqueue_in_the_shell(reader, block):
    reader.call(block.said("open {} in a second terminal"), block.code)
    job = reader.newest_job()
    reader.expect(job["id"], {"pages": 10})


@step(TYPED, "README.md", "Your first job", "from drf_spectacular.utils import extend_schema")
def write_the_view(reader, block):
    reader.write(block.said("Write {}:"), block.code)
    file, line = block.said("In {} write {}")
    reader.add(file, line)
    for sentence in ("add {} to {}, and", "and add {} to {}"):
        item, name = block.said(sentence)
        reader.insert(file, name, item)


CURL = "curl -X POST -H 'Authorization: Token …' http://127.0.0.1:8000/api/reports/"


@step(TYPED, "README.md", "Your first job", CURL)
def check_it_all(reader, block):
    assert re.search(r"= \d+ passed in", reader.call(block.said("Run {}")))  # none was skipped


@step(RUN, "README.md", "Your first job", CURL)
def send_a_request(reader, block):
    job = json.loads(reader.call(block.code))
    assert job["id"] == reader.newest_job()["id"]
    reader.expect(job["id"], {"pages": 10})


@step(TYPED, "README.md", "Test a job", "from jobs.models import Job")
def test_the_job(reader, block):
    reader.write(block.said("Write {}:"), block.code)
    assert "= 2 passed in" in reader.call(block.said("{} runs these two"))


# AGENTS.md

AGENTS = "AGENTS.md"


@step(
    TYPED,
    AGENTS,
    "For programs and people who change this code",
    "make run                           # the whole project, until Ctrl-C",
)
def type_the_commands(reader, block):
    """Those that run the whole project and all tests are typed in steps of README.md."""
    run, test, *others = block.code.splitlines()
    assert run.startswith("make run ") and test.startswith("make test ")
    for line in others:
        reader.call(line)


@step(TYPED, AGENTS, "Six mistakes that cost jobs")
def avoid_the_mistakes(reader, block):
    reader.test(
        "mistakes",
        f"""
@api_view(["POST"])
def view(request):
    {block.said("Enqueue a job: {}.")}

request = APIRequestFactory().post("/")
force_authenticate(request, user)
response = view(request)
assert response.status_code == 202

{block.said("Declare a job: {}.")}
def charge(self, pk):
    return pk

account = user
with pytest.raises({block.said("It raises {}.")}):
    {block.said("as in {}. It raises")}
job = {block.said("Pass its key, {}, and load")}
@shared_task(base=JobTask, bind=True)
def order(self, pk):
    {block.said("{} stores it together with")}

order.enqueue(user.pk)
assert Job.objects.count() == 3
run_jobs()
assert Job.objects.filter(task=charge.name, state="succeeded").count() == 2
assert api.get(response["{block.said("in the header {}.")}"]).json()["state"] == "succeeded"
assert Job.objects.get(pk=job.pk).result == user.pk
""",
        "run_jobs, api, user",
    )


# docs/tasks.md

TASKS = "docs/tasks.md"


@step(
    TYPED,
    TASKS,
    "Enqueue a job",
    'job = build_report.using(owner=request.user, label="Report of March").enqueue(10)',
)
def enqueue(reader, block):
    countdown = block.said("{} starts the job 60 seconds later")
    later = block.code.replace("using(", f"using({countdown}, ")
    many = block.said("{} stores all jobs or none").replace("…", "user")
    in_async_view = textwrap.indent(block.said("In an async view, write {}."), "    return ")
    reader.test(
        "enqueue",
        f"""
request = SimpleNamespace(user=user)
{block.code}
assert (job.owner, job.label) == (user, "Report of March")
{later}
job.refresh_from_db()
assert 50 < (job.due_at - job.created_at).total_seconds() <= 61
assert {block.said("{} cancels the job")} and not {block.said("{} cancels the job")}
job.refresh_from_db()
assert job.state == "cancelled"

@async_to_sync
async def view():
{in_async_view}

jobs = [{block.said("Without options, write {}")}, view(), *{many}]
assert [job.owner for job in jobs] == [None, user, user, user]
run_jobs()
pages = [Job.objects.get(pk=job.pk).result["pages"] for job in jobs]
assert pages == [10, 10, 10, 20]
""",
    )


@step(
    TYPED,
    TASKS,
    "Other ways to enqueue",
    "from django_tasks import task  # Django 6: from django.tasks import task",
)
def declare_a_function(reader, block):
    reader.add(block.said("add a function to {}"), block.code)


@step(TYPED, TASKS, "Other ways to enqueue", "from jobs.models import Job")
def enqueue_in_other_ways(reader, block):
    reader.test(
        "other_ways",
        f"""
{block.code}
run_jobs()
jobs = [(job.result, job.owner) for job in Job.objects.all()]  # stored in the same millisecond
assert len(jobs) == 3
for job in (10, user), ({{"pages": 10}}, None), ({{"pages": 10}}, user):
    assert job in jobs
""",
    )


@step(TYPED, TASKS, "Continue after a crash", "from django.db import transaction")
def continue_after_a_crash(reader, block):
    model, field = block.said("{} stands for a model of yours with a number {}")
    reader.add(
        "reports/models.py",
        f"""
from django.db import models


class {model}(models.Model):
    {field} = models.IntegerField()

    def __str__(self):
        return str(self.{field})
""",
    )
    reader.add(block.said("Add to {}:"), block.code)


@step(TYPED, TASKS, "Test a crash", "import pytest")
def test_a_crash(reader, block):
    """As the page does, then with accounts: each is charged exactly once."""
    reader.write(block.said("write {}:"), block.code)
    header = "def test_it_continues_after_a_crash(run_jobs, monkeypatch):\n"
    body = textwrap.dedent(block.code.split(header)[1])
    crash = body.replace("list(range(150))", "[account.pk for account in accounts]")
    reader.test(
        "each_account_is_charged_once",
        f"""
accounts = Account.objects.bulk_create(Account(balance=number) for number in range(150))
{crash}
assert [account.balance for account in Account.objects.order_by("pk")] == list(range(-1, 149))
""",
        "run_jobs, monkeypatch",
    )


@step(TYPED, TASKS, "Retries and errors")
def retry(reader, block):
    decorator = block.said("{} retries after errors")
    reader.test(
        "retries",
        f"""
class Away(OSError):
    pass

{decorator.replace("…", "base=JobTask, bind=True")}
def retry_by_itself(self):
    if self.request.retries < 8:
        raise Away

@shared_task(base=JobTask, bind=True)
def retry_explicitly(self):
    if not self.request.retries:
        {block.said("{} retries explicitly")}

for task, retries in [(retry_by_itself, 8), (retry_explicitly, 1)]:
    job = Job.objects.enqueue(task)
    run_jobs()
    job.refresh_from_db()
    assert (job.state, job.retries) == ("succeeded", retries)
""",
    )
    decorator = block.said("With {} its owner can do this, too").replace("…", "base=JobTask")
    reader.test(
        "an_owner_runs_a_job_again",
        f"""
{decorator}
def fail_once():
    if not Failure.objects.exists():
        raise OSError

job = fail_once.using(owner=user).enqueue()
run_jobs()
assert api.get(f"/api/jobs/{{job.pk}}/").json()["can_run_again"]
again = api.post(f"/api/jobs/{{job.pk}}/run_again/")
assert (again.status_code, again.json()["id"]) == (202, str(job.pk))
run_jobs()
job.refresh_from_db()
assert job.state == "succeeded"
assert api.post(f"/api/jobs/{{job.pk}}/run_again/").status_code == 403
""",
        "run_jobs, api, user",
    )
    error = block.said("{} ends the job")
    [text] = re.findall('"(.+)"', error)
    reader.test(
        "an_error_for_the_owner",
        f"""
@shared_task(base=JobTask, bind=True)
def fail(self):
    {error}

job = Job.objects.enqueue(fail, owner=user)
run_jobs()
seen = api.get(f"/api/jobs/{{job.pk}}/").json()
assert (seen["state"], seen["error"]) == ("failed", {text!r})
""",
        "run_jobs, api, user",
    )


@step(TYPED, TASKS, "Only once")
def only_once(reader, block):
    unique = block.said("{} returns the active job")
    key = block.said("{} accepts each key once").replace("…", "user", 1)
    reader.test(
        "only_once",
        f"""
assert {unique} == {unique}
{key}
with pytest.raises(IntegrityError):
    {key}
""",
    )


@step(
    RUN,
    TASKS,
    "Only once",
    "curl -i http://127.0.0.1:8000/api/orders/ -H 'Authorization: Token …' \\",
)
def order_once(reader, block):
    """Twice, then with another body."""
    heads, orders = zip(*(reader.call(block.code).split("\n\n") for _ in range(2)), strict=True)
    assert all(head.startswith("HTTP/1.1 202") for head in heads)
    assert json.loads(orders[0])["job"] == json.loads(orders[1])["job"]
    assert reader.site.request("/api/orders/")[2]["count"] == 1
    [status] = re.findall(r"With another body the answer is (\d+)", block.before)
    other = reader.call(block.code.replace("Tea", "Coffee"))
    assert other.startswith(f"HTTP/1.1 {status}")


@step(TYPED, TASKS, "Upload a file", "from django.conf import settings")
@step(TYPED, TASKS, "Upload a file", "from .models import Upload")
@step(TYPED, TASKS, "Upload a file", "from rest_framework import serializers, viewsets")
def write_the_upload(reader, block):
    files = re.findall(r"Add [a-z ]*to `(reports/\w+\.py)`", block.before)
    reader.add(files[-1], block.code)


AT_ONCE = "At most so many at once"


@step(TYPED, TASKS, AT_ONCE, '@shared_task(base=JobTask, limit="tenant:{tenant_id}")')
def limit_what_runs_at_once(reader, block):
    reader.add(block.said("Add to {}:"), block.code)
    file, item, name = block.said("In {} add {} to {}.")
    reader.insert(file, name, item)
    reader.test(
        "keys",
        f"""
from jobs.models import Job
from reports.tasks import sync_contact

job = {block.said("{} has the key")}
assert job.limit_key == "{block.said("has the key {}, and")}"
Job.objects.enqueue_many(sync_contact, [[7, number] for number in range(9)])
run_jobs()
assert Job.objects.filter(state="succeeded").count() == 10
""",
    )


@step(RUN, TASKS, AT_ONCE, '@shared_task(base=JobTask, limit="tenant:{tenant_id}")')
def see_that_no_more_run_at_once(reader, block):
    code = "Job.objects.enqueue_many(sync_contact, [[7, number] for number in range(5)])"
    imports = "from jobs.models import Job; from reports.tasks import sync_contact"
    ids = reader.evaluate(f"{imports}; [str(job.pk) for job in {code}]")
    ends = [list(reader.site.follow(f"/api/jobs/{id}/"))[-1] for id in ids]
    assert [job["state"] for job in ends] == 5 * ["succeeded"]
    [(most, key)] = re.findall(r'turn: 2 of (\d) of (.+) are running"', block.after)
    times = [(job["started_at"], job["finished_at"]) for job in ends]
    overlaps = [sum(start <= time < end for start, end in times) for time, _ in times]
    assert max(overlaps) <= int(most) == 2 and key == "tenant 7", times


@step(TYPED, TASKS, "So many a minute", '@shared_task(base=JobTask, limit="openai")')
def limit_a_rate(reader, block):
    reader.add(block.said("Add to {}:"), block.code)
    file, item, name = block.said("In {} add {} to {}:")
    reader.insert(file, name, item)
    rates = [block.said(text) for text in ("Other rates are {}", "such as {}.")]
    rates += block.said("{}, and {} for ten in five minutes")
    reader.test(
        "rates",
        f"""
from jobs.limits import parse

for rate in {rates}:
    assert parse(rate).rate == rate
assert parse("10/5min").starts == 10 and parse("10/5min").period.total_seconds() == 300
from reports.tasks import ask

job = ask.enqueue("why")
run_jobs()
job.refresh_from_db()
assert (job.limit_key, job.result) == ("openai", "WHY")
""",
    )


MANY = "Work that consists of many jobs"


@step(TYPED, TASKS, MANY, "@shared_task(base=JobTask)")
def write_tasks_of_a_batch(reader, block):
    reader.add(block.said("Add to {}:"), block.code)


@step(TYPED, TASKS, MANY, "from jobs.models import Batch")
def enqueue_a_batch(reader, block):
    reader.test(
        "a_batch",
        f"""
{block.code}
members = [job.pk for job in batch.jobs.all()]
run_jobs()
batch.refresh_from_db()
assert (batch.state, batch.counts) == ("succeeded", {{"succeeded": 2}})
after = Job.objects.filter(follows=batch.pk).order_by("task")
assert [(job.result, job.message, job.owner) for job in after] == [
    (6, "", user), (None, "Hamlet has ended", user),
]
seen = api.get("/api/jobs/", {{"batch": batch.pk}}).json()["results"]
assert {{job["id"] for job in seen}} == {{str(pk) for pk in members}}
assert len(api.get("/api/jobs/").json()["results"]) == 2
assert api.get(f"/api/batches/{{batch.pk}}/").json()["state"] == "succeeded"

step = {block.said("{} gives them a queue and a label").replace("reports", "celery")}
failing = Batch.objects.enqueue(count_words, [[1]], then=step, ended=note_end.si("It"))
run_jobs()
failing.refresh_from_db()
assert (failing.state, failing.error) == ("failed", "1 failed of 1")
failing.run_failed_again()
failing.refresh_from_db()
assert failing.state == "open"
run_jobs()
assert Job.objects.get(follows=failing.pk).message == "It has ended"  # there is one

of_django = Batch.objects.enqueue(my_task, [[1], [2]], then=my_task.s())
run_jobs()
assert Job.objects.get(follows=of_django.pk).result == [1, 2]

empty = Batch.objects.enqueue(count_words, [], then=step)
run_jobs()
job = Job.objects.get(follows=empty.pk)
assert (job.result, job.label) == (0, "The sum")
""",
        "run_jobs, user, api",
    )


@step(
    TYPED,
    TASKS,
    MANY,
    'with Batch.objects.open(owner=user, label="Two acts", then=add_up.s()) as batch:',
)
def open_a_batch(reader, block):
    reader.test(
        "members_of_several_tasks",
        f"""
from jobs.models import Batch
from reports.tasks import add_up, count_words

{block.code}
run_jobs()
assert Job.objects.get(follows=batch.pk).result == 6
with pytest.raises(ValueError, match="has ended"):
    batch.enqueue(count_words, ["late"])

@shared_task(base=JobTask, bind=True)
def find(self, text):
    {block.said("A member can add others, because a batch cannot end while it runs: {}.")}
    return 10

batch = Batch.objects.enqueue(find, [["to be"]], then=add_up.s())
run_jobs()
assert Job.objects.get(follows=batch.pk).result == 12
""",
    )


@step(TYPED, TASKS, "A next step", "@shared_task(base=JobTask, bind=True)")
def write_a_next_step(reader, block):
    reader.add(block.said("Add to {}:"), block.code)
    reader.test(
        "a_next_step",
        """
from reports.tasks import read_play

job = read_play.using(owner=user).enqueue("Hamlet")
run_jobs()
step = Job.objects.get(follows=job.pk)
assert (step.message, step.label, step.owner) == ("Hamlet has ended", "The end", user)
job = read_play.enqueue(5)  # its body fails
run_jobs()
assert not Job.objects.filter(follows=job.pk).exists()
""",
    )


@step(TYPED, TASKS, "Chains, groups and chords", "from celery import chain, chord, group")
def send_a_canvas(reader, block):
    [result] = re.findall(r"waits for the result, here (\d+)", block.after)
    reader.test(
        "a_canvas",
        f"""
{block.code}
run_jobs()
assert Job.objects.filter(owner=user, label="A chain", state="succeeded").count() == 2
assert (sums.get(), sums.parent.completed_count()) == ({result}, 2)

@shared_task
def plain():
    pass

with pytest.raises(TypeError, match="plain"):
    chain(note_end.si("Hamlet"), plain.si())()
""",
    )


@step(
    TYPED,
    TASKS,
    "Upload a file",
    'router.register("uploads", UploadViewSet, basename="upload")',
)
def add_the_route(reader, block):
    file, view = block.said("In {} import {}")
    [route] = re.findall(r"^router\.register\(.+\n", reader.project.read(file), re.MULTILINE)[-1:]
    reader.write(file, reader.project.read(file).replace(route, route + block.code))
    reader.add(file, f"from reports.views import {view}")
    for command in block.said("Run {} and {}"):
        reader.call(command)


@step(
    RUN,
    TASKS,
    "Upload a file",
    "curl -H 'Authorization: Token …' -F file=@README.md http://127.0.0.1:8000/api/uploads/",
)
def upload(reader, block):
    upload = json.loads(reader.call(block.code))
    lines = len(reader.project.read("README.md").splitlines())
    reader.expect(upload["job"], {"lines": lines})
    assert re.match("Read uploads/README.*md$", reader.newest_job()["label"])


@step(
    RUN,
    TASKS,
    "Upload a file",
    "curl -H 'Authorization: Token …' -F file=@orders.csv http://127.0.0.1:8000/api/imports/",
)
def import_orders(reader, block):
    columns = block.said("takes a file with the columns {}")
    reader.write("orders.csv", f"{columns}\nTea,2\n")
    job = json.loads(reader.call(block.code))["job"]
    *_, done = reader.site.follow(f"/api/jobs/{job}/")
    assert done["state"] == "succeeded", done


@step(TYPED, TASKS, "Time limits")
def limit_the_time(reader, block):
    decorator = block.said("{} gives a job a limit of its own").replace("…", "base=JobTask")
    reader.test(
        "limits",
        f"""
{decorator}
def compute():
    pass

assert (compute.time_limit, compute.soft_time_limit) == (3600, 3240)
""",
    )


@step(TYPED, TASKS, "Async tasks", "import asyncio")
def write_a_coroutine(reader, block):
    reader.add("reports/tasks.py", block.code)
    reader.test(
        "a_coroutine",
        """
job = Job.objects.enqueue(fetch_pages, [2])
run_jobs()
job.refresh_from_db()
assert (job.state, job.progress, job.cursor) == ("succeeded", 100, 2)
""",
    )


@step(TYPED, TASKS, "Tasks on a schedule", '"nightly": {')
def schedule(reader, block):
    name, file = block.said("the tasks of {} in {}")
    if line := re.search("write `(from .+?)`", block.before):
        reader.add(file, line[1])
    reader.insert(file, name, block.code)
    reader.test(
        "a_schedule",
        """
beat = Scheduler(current_app)
beat.apply_async(beat.schedule["nightly"])
run_jobs()
assert Job.objects.get().result == {"pages": 10}
""",
    )


# docs/workers.md: the others are in ELSEWHERE


@step(TYPED, "docs/workers.md", "Queues")
def add_a_queue(reader, block):
    file = block.said("unless `CELERY_TASK_ROUTES` in {} names another one")
    if "Add the route" in block.after:
        route, name = block.said("Add the route {} to {}")
        reader.insert(file, name, route)
    else:
        reader.add(file, block.said("Write {}."))
    queue, name = block.said("Add {} to {}.")
    reader.insert(file, name, queue)


@step(RUN, "docs/workers.md", "Queues")
def start_a_worker_for_it(reader, block):
    command = block.said("Start a worker for this queue alone: {}")
    variables = {**reader.site.environment, "PATH": reader.path}
    log = reader.folder / "worker.log"
    worker = Process(command.split(), log, cwd=reader.project, variables=variables)
    worker.is_ready = lambda: " ready." in worker.printed
    worker.launch()
    try:
        worker.wait_until_ready()
    finally:
        if worker.is_running():
            worker.stop()
    assert re.findall(r"\.> (\w+) +exchange=", worker.printed) == ["reports"]
    jobs = "Job.objects.filter(task='reports.tasks.build_report')"
    code = f"from jobs.models import Job; list({jobs}.values_list('queue', flat=True).distinct())"
    assert reader.evaluate(code) == ["reports"]


# docs/operation.md


@step(
    RUN,
    "docs/operation.md",
    "Why a job failed",
    "curl -X POST -H 'Authorization: Token …' https://example.com/api/jobs/<id>/run_again/",
)
def run_a_job_again(reader, block):
    code = "result = Job.objects.enqueue(build_report, [{}]).pk"
    failed = reader.site.ask(f"from reports.tasks import *; from jobs.models import Job; {code}")
    *_, job = reader.site.follow(f"/api/jobs/{failed}/")
    assert job["state"] == "failed"
    again = json.loads(reader.call(block.code.replace("<id>", failed)))
    assert again["id"] == failed and again["state"] == "queued"


@step(
    RUN,
    "docs/operation.md",
    "Pause a queue or a task",
    'python manage.py jobs pause celery reports.tasks.add_up --reason "SMTP is down"',
)
def pause_and_resume(reader, block):
    pause, paused, resume = block.code.splitlines()
    printed = reader.call(pause)
    assert re.match(r"celery: Paused since \d\d:\d\d: SMTP is down\n", printed)
    assert reader.call(paused) == printed
    code = "from reports.tasks import add_up; str(add_up.enqueue([1, 2]).pk)"
    job = reader.evaluate(code)
    [text] = re.findall(r'Owners read "Paused for 20 min(.+?)"', block.after)
    wait_for(lambda: reader.site.request(f"/api/jobs/{job}/")[2]["reason"].endswith(text))
    assert reader.call(resume) == "nothing is paused\n"
    reader.expect(job, 3)


@step(
    RUN,
    "docs/operation.md",
    "Metrics",
    "curl -H 'Authorization: Token …' https://example.com/metrics",
)
def read_the_metrics(reader, block):
    assert 'jobs_waiting{queue="celery"}' in reader.call(block.code)


@step(RUN, "docs/operation.md", "Backup and restore")
def back_up(reader, block):
    if "DATABASE_URL" in reader.variables:  # a PostgreSQL
        reader.call(block.said("All jobs are in the database: {}"))
        backup = reader.project.read("backup.sql")
        [table] = re.findall(r"^COPY public\.jobs_job .*?^\\\.$", backup, re.M | re.S)
        assert reader.jobs and all(url.split("/")[3] in table for url, _ in reader.jobs)


# docs/pages.md

PAGES = "docs/pages.md"


@step(TYPED, PAGES, "A page of your own", '{% extends "jobs/base.html" %}')
def write_a_page(reader, block):
    reader.write(block.said("Write {}. It extends"), block.code)


@step(
    TYPED,
    PAGES,
    "A page of your own",
    'reports_page = TemplateView.as_view(template_name="reports/index.html", extra_context=page)',
)
def write_the_view_of_the_page(reader, block):
    file, name = block.said("In {}, write this below {}")
    text = reader.project.read(file)
    ends = {ast.unparse(node).split(" = ")[0]: node.end_lineno for node in ast.parse(text).body}
    lines = text.splitlines()
    lines.insert(ends[name], block.code)
    reader.write(file, "\n".join([*lines, ""]))


@step(
    TYPED,
    PAGES,
    "A page of your own",
    'path("reports/", login_required(reports_page), name="reports"),',
)
def add_the_url(reader, block):
    reader.insert("config/urls.py", block.said("Add it to {}"), block.code.strip())
    links, name = block.said("set {} in {}")
    text = reader.project.read("config/urls.py")
    assert text.count('"links": {}') == 1 and name == "page"
    reader.write("config/urls.py", text.replace('"links": {}', links))


@step(TYPED, PAGES, "Scripts")
def add_a_script(reader, block):
    load, tag, name = re.findall(r"`([^`]+)`", block.after)[:3]
    page = reader.project / "reports/templates/reports/index.html"
    inline = "<script>document.title = 'inline'</script>"
    head = f"{{% block {name} %}}{tag}{inline}{{% endblock %}}"
    lines = page.read_text().splitlines()
    page.write_text("\n".join([lines[0], load, head, *lines[1:], ""]))
    [file] = re.findall("'(.+)'", tag)
    script = "addEventListener('load', () => document.body.dataset.script = 'ran')"
    reader.write(f"reports/static/{file}", script)


@step(RUN, PAGES, "A button that starts a job")
def look_at_the_pages(reader, block):
    """Press the button, and follow the link to the page of the next section."""
    label, _ = ast.literal_eval(f"{{{block.said('`buttons`: {}')}}}").popitem()
    with browser(reader.folder) as tab:
        tab.log_in(reader.site)
        buttons = "[...document.querySelectorAll('#start button')]"
        before = reader.newest_job()["id"]
        tab.run(f"{buttons}.find((button) => button.innerText == {label!r}).click()")
        wait_for(lambda: reader.newest_job()["id"] != before, reader.site)
        assert reader.newest_job()["task"] == "reports.tasks.build_report"
        tab.wait("document.querySelector('.job').innerText.includes('Build report')")
        tab.run("[...document.querySelectorAll('a')].find((a) => a.innerText == 'Reports').click()")
        tab.wait("document.body?.dataset.script == 'ran' && document.title.includes('Reports')")
        assert tab.run("document.querySelector('h1').innerText") == "Reports"


# docs/production.md


@step(RUN, "docs/production.md", "Install and deploy", "python manage.py check --deploy")
def deploy(reader, block):
    reader.call(block.code)
