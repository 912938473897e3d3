"""Outputs run, installed from their own pyproject.toml, with a real worker on a real broker."""

import os
import pty
import re
import signal
import socket
import subprocess
from contextlib import suppress
from functools import partial
from urllib.parse import urlsplit

import pytest

from harness.bake import CHOICES, baked
from harness.browser import browser
from harness.outputs import (
    ORDER,
    default_output,
    every_pool,
    first,
    one_for_each_broker,
    other_tours,
    outputs,
    use,
)
from harness.project import (
    connects,
    env,
    fetch,
    free_ports,
    processes_in,
    started,
    wait_for,
)
from harness.servers import BACKENDS


@other_tours
def test_it_runs(broker, with_tasks, tmp_path):
    use(with_tasks, tmp_path, **broker)


@pytest.fixture
def sqlite(tmp_path):
    """The variable of a new database."""
    return {"DATABASE_URL": f"sqlite:///{tmp_path}/db.sqlite3"}


@default_output
def test_the_pages_start_show_cancel_and_repeat_a_job(project, tmp_path):
    with project.up() as site, browser(tmp_path) as tab:
        tab.log_in(site)
        tab.click("#start button")
        newest = "(document.querySelector('.job')?.innerText ?? '')"
        tab.wait(f"{newest}.includes('Write report')")
        assert site.request("/api/orders/", ORDER)[0] == 202  # a job that the page has not started
        tab.wait(f"{newest}.includes('Send confirmation')")
        tab.wait(f"{newest}.includes('Sent to')")

        bar = ".job:nth-child(2) progress"
        seen = []

        def moves():
            seen.append(tab.run(f"document.querySelector('{bar}').value"))
            return len(set(seen)) > 4

        wait_for(moves, site=site)
        assert seen == sorted(seen) and seen[-1] < 100
        tab.click(".job:nth-child(2) button")
        tab.wait("document.querySelectorAll('.job')[1].dataset.state == 'cancelled'")

        tab.click(".job:nth-child(2) h2 a")  # the page of this job alone
        tab.wait("location.pathname.startsWith('/jobs/') && document.querySelector('.job')")
        tab.wait("document.querySelector('.job').innerText.includes('Write report')")
        assert tab.run("document.querySelectorAll('.job').length") == 1
        pk = tab.run("location.pathname.split('/')[2]")
        wait_for(lambda: site.find_in_flower(pk, "REVOKED"), site=site)
        tab.click(".job button[data-part=again]")  # a superuser may do this with every job
        tab.wait("document.querySelector('.job').dataset.state == 'running'")
        tab.click(".job button[data-part=cancel]")
        tab.wait("document.querySelector('.job').dataset.state == 'cancelled'")

        tab.open(f"{site.web}/admin/durable_jobs/job/{pk}/change/")
        tab.click("button[value=run_again]")
        tab.wait("document.body.innerText.includes('1 job queued again')")
        tab.click(".messagelist a")
        tab.wait("document.querySelector('button[value=cancel]')")
        tab.click("button[value=cancel]")
        tab.wait("document.body.innerText.includes('1 job cancelled')")

        tab.open(site.web)
        tools = tab.run("[...document.querySelectorAll('.bar a')].map((a) => a.href).join()")
        assert site.flower in tools


BATCH = """
from durable_jobs import actions, batches
from orders.tasks import write_report
from users.models import User

owner = User.objects.get()
report = write_report.using(countdown=999).s(owner.pk)
batch = batches.enqueue([report] * 25, owner=owner, label="Reports")
actions.cancel(batch.jobs.first())
write_report.using(owner=owner, label="One report", countdown=999).enqueue(owner.pk)
"""


@default_output
def test_the_page_lists_batches_and_the_jobs_of_one(project, tmp_path):
    with project.up() as site, browser(tmp_path) as tab:
        tab.log_in(site)
        site.ask(BATCH + "result = None")
        rows = "[...document.querySelectorAll('.job')].map((row) => row.innerText)"
        tab.wait(f"{rows}[0]?.includes('One report') && !{rows}.join().includes('1 of 25 done')")
        tab.click("#filter a:last-child")  # tests before this one have stored jobs, but no batch
        tab.wait(f"{rows}.length == 1 && {rows}[0].includes('1 of 25 done, 1 cancelled')")

        tab.click(".job h2 a")
        tab.wait(f"{rows}.length == 21 && {rows}[0].includes('Reports')")  # it, and a page of jobs
        tab.click("#pages a:last-child")
        tab.wait(f"{rows}.length == 6 && {rows}[0].includes('Reports')")
        tab.click("#filter [href*='state=cancelled']")
        tab.wait(f"{rows}.length == 2 && {rows}[1].startsWith('Cancelled')")
        tab.click(".job:nth-child(2) h2 a")  # the page of this job
        tab.wait("location.pathname.startsWith('/jobs/')")
        tab.wait(f"{rows}.length == 1 && {rows}[0].includes('All jobs in this batch')")
        tab.click("[data-part=batch]")
        tab.wait(f"location.pathname == '/' && {rows}.length == 21")

        tab.click(".job button")
        tab.wait(f"{rows}[0].includes('25 cancelled of 25')")
        tab.click("#back a")
        tab.wait(f"{rows}.length == 1 && {rows}[0].startsWith('Cancelled')")


LIMITED = """
@shared_task(base=JobTask, bind=True, limit=lambda tenant_id, **_: f"tenant:{tenant_id}")
def call_api(self, tenant_id):
    while True:
        self.report(1, 2, "Calls the API")
        time.sleep(0.1)
"""
CALLS = """
from durable_jobs import pauses
from trials.tasks import call_api, count
from users.models import User
owner = User.objects.get()
for number in range(3):
    job = call_api.using(owner=owner, label=f"Call {number}").enqueue(7)
pauses.pause(count.name, "SMTP is down")
paused = count.using(owner=owner, label="Paused").enqueue(1)
result = [str(job.pk), str(paused.pk)]
"""


@default_output
def test_the_pages_say_what_a_blocked_job_waits_for(with_tasks, tmp_path):
    with_tasks.append("trials/tasks.py", LIMITED)
    with_tasks.append("config/settings.py", 'DURABLE_JOBS["LIMITS"] = {"tenant": "2"}\n')
    with with_tasks.up() as site, browser(tmp_path) as tab:
        tab.log_in(site)
        blocked, paused = site.ask(CALLS)
        rows = "[...document.querySelectorAll('.job')].map((row) => row.innerText)"
        reason = "Waiting: limit tenant:7 is full (2 of 2 slots taken)"
        tab.wait(f"{rows}[0]?.match(/Paused for [0-9]+ s: SMTP is down/)")  # newest first
        tab.wait(f"{rows}[1].includes({reason!r})")
        for pk, text in (blocked, reason), (paused, ": SMTP is down"):
            tab.open(f"{site.web}/jobs/{pk}/")
            tab.wait(f"{rows}[0]?.includes('Queued') && {rows}[0].includes({text!r})")
            tab.picture(tmp_path / f"{pk}.png")
        tab.open(f"{site.web}/jobs/{blocked}/")
        tab.wait(f"{rows}[0]?.includes({reason!r})")
        running = site.request("/api/jobs/?state=running")[2]["results"]
        site.request(f"/api/jobs/{running[0]['id']}/cancel/", {})
        tab.wait(f"{rows}[0].includes('Running') && {rows}[0].includes('Calls the API')")
        with_tasks.manage("durable_jobs", "resume", "trials.tasks.count", **site.environment)
        tab.open(f"{site.web}/jobs/{paused}/")
        tab.wait(f"{rows}[0]?.includes('Paused') && !{rows}[0].includes('SMTP')")  # its label


@default_output
def test_the_log_names_each_event_and_has_one_traceback(with_tasks):
    with with_tasks.up() as site:
        *_, job = site.follow(site.enqueue("count", "no number"))
        assert job["state"] == "failed"
        list(site.follow(site.enqueue("count", 1)))

        def log():
            return re.sub(r"\x1b\[\d*m", "", site.log)

        wait_for(lambda: re.search("task_succeeded.* task=trials.tasks.count", log()), site=site)
        log = log()
    assert log.count("Traceback") == 1
    for event in "task_started", "task_failed", "task_succeeded":
        assert re.search(rf"{event}.* task=trials.tasks.count", log), log
    assert "GET /" not in log
    assert "task_enqueued" not in log  # a bulk would log as many lines


@default_output
def test_production_names_all_missing_variables(project):
    (project / ".env").rename(project / ".env.away")
    try:
        variables = project.production()
        assert {"SECRET_KEY", "DATABASE_URL", "CELERY_BROKER_URL"} <= set(variables)
        with pytest.raises(AssertionError) as all_at_once:
            project.manage("check")
        said = re.search("Environment variables invalid: (.*)", str(all_at_once.value))[1]
        assert set(re.findall(r"'(\w+)': \['Environment variable not set", said)) == set(variables)
    finally:
        (project / ".env.away").rename(project / ".env")


@default_output
def test_closing_the_terminal_ends_everything(project):
    ports = dict(zip(["PORT", "FLOWER_PORT"], free_ports(2), strict=True))
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(project)
        os.execvpe("bash", ["bash", "--norc", "-i"], env(**ports, **project.free_servers()))
    os.write(terminal, b"make run\n")
    printed = b""
    while b"Ctrl-C stops everything" not in printed:
        printed += os.read(terminal, 4096)
    os.close(terminal)

    wait_for(lambda: not processes_in(project))
    os.waitpid(child, 0)


@default_output
def test_killed_processes_start_again(with_tasks):
    """The job that was running succeeds."""
    with with_tasks.up() as site:
        following = site.follow(site.enqueue("count", 50))
        while next(following)["state"] != "running":
            pass
        for name in "worker", "beat":
            for pid in site.find(f"bin/celery.* {name}"):  # not dev.py, which watches it
                with suppress(ProcessLookupError):  # its parent was killed before
                    os.kill(pid, signal.SIGKILL)
        for name in "worker", "beat":
            text = f"Starting again: celery -A config {name}"
            wait_for(lambda text=text: text in site.log, site=site)
        wait_for(lambda: site.log.count(f"{site.worker} ready") == 2, site=site)
        *_, done = following
        assert done["state"] == "succeeded"


@default_output
def test_all_processes_end_when_one_cannot_start(project):
    with pytest.raises(AssertionError, match="A process exited"):
        with project.up(FLOWER_BASIC_AUTH=""):
            pass
    wait_for(lambda: not processes_in(project))


@default_output
def test_a_port_in_use_is_named(project):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AssertionError, match=f"Port {port} is taken.*PORT={port + 1}"):
            project.call("make", "run", PORT=port)


@default_output
def test_make_run_starts_no_broker_for_another_host(project):
    with pytest.raises(AssertionError, match="Can't reach Redis at 127.0.0.2:1"):
        web, flower = free_ports(2)
        url = "redis://127.0.0.2:1/0"
        project.call("make", "run", PORT=web, FLOWER_PORT=flower, CELERY_BROKER_URL=url)


@outputs(first(broker="rabbitmq"))
def test_make_run_starts_no_rabbitmq(project):
    web, flower, port = free_ports(3)
    variables = {"PORT": web, "FLOWER_PORT": flower}
    variables["CELERY_BROKER_URL"] = f"amqp://guest:guest@127.0.0.1:{port}//"
    with pytest.raises(AssertionError, match=f"No RabbitMQ answers at 127.0.0.1:{port}"):
        project.call("make", "run", **variables)


@every_pool
def test_a_worker_typed_by_hand_uses_the_projects_settings(broker, project, request, tmp_path):
    """Pool, concurrency, all queues. If idle, it ends before SOFT_SHUTDOWN_SECONDS have passed.

    The first one has the default concurrency of its pool.
    """
    own = request.node.callspec.params["output"]["worker_pool"]
    command = "celery -A config worker -l info"
    commands = {pool: f"{command} --pool {pool}" for pool in ("prefork", "threads", own)}
    commands |= {own: command} if own != "gevent" else {}
    settings = {"SOFT_SHUTDOWN_SECONDS": 3600}
    slots = {"prefork": os.cpu_count(), "threads": 20, "gevent": 100}[own]
    if own == "gevent":
        refused = project.process(command, tmp_path / "log", **broker)
        refused.launch()
        assert refused.wait() == 1
        assert "Type the option in full: --pool gevent" in refused.printed
    runs = [(signal.SIGINT, own), *((signal.SIGTERM, pool) for pool in commands)]
    for number, pool in runs:
        options = {"says": " ready.", **settings, **broker}
        with started(project.process(commands[pool], tmp_path / "log", **options)) as [worker]:
            printed = worker.printed
            concurrency, kind = re.search(r"concurrency: (\d+) \((\w+)\)", printed).groups()
            assert int(concurrency) == slots and kind in pool
            queues = re.findall(r"\.> (\w+) +exchange=", printed)
            assert sorted(queues) == ["celery", "cpu", "io"]
            worker.stop(number)
        settings["WORKER_CONCURRENCY"] = slots = 3


# Starts no worker: prints what it would have.
WORKER_SETTINGS = """
import sys
from celery.__main__ import main
from celery.worker.worker import WorkController

def start(worker):
    conf, options = worker.app.conf, worker.app.conf.broker_transport_options
    print(
        worker.pool_cls.__module__.split(".")[-1],
        worker.concurrency,
        worker.prefetch_multiplier,
        conf.worker_cancel_long_running_tasks_on_connection_loss,
        worker.app._fixups[0].worker_fixup.db_reuse_max,  # Celery reads its setting only once
        options["visibility_timeout"],
        worker.options["without_gossip"],
    )
    worker.exitcode = 0

WorkController.start = start
main()
"""
CPUS = os.cpu_count()


@every_pool
def test_a_worker_with_any_pool_has_the_settings_of_the_project(project, request):
    """Options of its command come first."""
    own = request.node.callspec.params["output"]["worker_pool"]
    of_project = {
        "prefork": [CPUS, 1, False, 1000],
        "threads": [20, 1, False, 1000],
        "gevent": [100, 4, False, None],
    }[own]
    _, _, *others = of_project
    expected = {
        "--pool prefork": ["prefork", *of_project],
        "-P threads": ["thread", *of_project],
        "--pool=threads -c 7 --prefetch-multiplier 3": ["thread", 7, 3, *others],
        "--pool processes": ["prefork", *of_project],
        "--pool solo": ["solo", *of_project],
    }
    if own == "gevent":
        expected |= {"-P gevent": [own, *of_project], "-P gevent -c 7": [own, 7, *of_project[1:]]}
    else:
        expected[""] = [own.removesuffix("s"), *of_project]
    by_pool = {"gevent": [120, True]}  # celery-steady's
    for options, values in expected.items():
        values += by_pool.get(values[0], [120, False])
        assert worker_settings(project, options) == " ".join(map(str, values)), options
    by_variable = worker_settings(project, "--pool threads", WORKER_CONCURRENCY=9)
    assert by_variable == " ".join(map(str, ["thread", 9, *of_project[1:], 120, False]))


def worker_settings(project, options, **variables):
    command = ["-c", WORKER_SETTINGS, "-A", "config", "worker", *options.split()]
    return project.call(".venv/bin/python", *command, **variables).splitlines()[-1]


@outputs(*({**each, "include_example": "yes"} for each in one_for_each_broker()))
def test_a_worker_without_queues_takes_tasks_from_each_one(broker, with_tasks, tmp_path):
    """Plain tasks, at once and after a countdown."""
    script = f"""
from durable_jobs.messages import known_queues
from trials.tasks import tick
for queue in known_queues():
    for countdown in 0, 2:
        path = f"{tmp_path}/{{queue}}{{countdown}}"
        tick.apply_async([path], queue=queue, countdown=countdown)
result = known_queues()
"""
    with with_tasks.up(**broker) as site:
        queues = site.ask(script)
        assert queues == ["celery", "cpu", "io"]
        files = [tmp_path / f"{queue}{countdown}" for queue in queues for countdown in (0, 2)]
        wait_for(lambda: all(file.exists() for file in files), site=site)


@default_output
def test_flower_typed_by_hand_uses_the_projects_settings(broker, project, tmp_path):
    [port] = free_ports(1)
    typed = partial(project.process, "celery -A config flower", tmp_path / "log")
    variables = {**broker, "FLOWER_PORT": port}
    with started(typed(is_ready=partial(connects, port), **variables)):
        assert fetch(f"http://127.0.0.1:{port}/api/workers")[0] == 401
        with pytest.raises(ConnectionRefusedError):  # it listens on no other address
            socket.create_connection(("127.0.0.2", port))

    for users in "", "admin:change-me", "me:secret,admin:":
        flower = typed(**{**variables, "FLOWER_BASIC_AUTH": users})
        flower.launch()
        assert flower.wait() == 1
        assert "set FLOWER_BASIC_AUTH=user:password" in flower.printed


@default_output
def test_changed_code_reaches_the_worker(with_tasks):
    with with_tasks.up() as site:
        tasks = with_tasks / "trials/tasks.py"
        code = tasks.read_text()
        pk = site.enqueue("count", 100).split("/")[3]

        def ask(field):  # does not ask the web, which restarts, too
            return site.ask(
                f"from durable_jobs.models import Job; result = Job.objects.get(pk='{pk}').{field}"
            )

        wait_for(lambda: ask("state") == "running", site=site)
        (with_tasks / "trials/new.py").write_text("")
        wait_for(lambda: ask("state") == "queued", site=site)  # the old worker hands its job back
        wait_for(lambda: site.log.count(f"{site.worker} ready") == 2, site=site)
        assert site.log.count("Starting again: celery -A config beat") == 1

        tasks.write_text(f"{code}\n1 +")  # not finished
        wait_for(lambda: site.log.count("SyntaxError") >= 2, site=site)
        tasks.write_text(code)
        wait_for(lambda: site.log.count(f"{site.worker} ready") == 3, site=site)
        wait_for(lambda: ask("state") == "succeeded", site=site)
        assert ask("crashes") == 0
        tasks.touch()  # Django may have looked at it for the first time after the repair
        wait_for(lambda: connects(site.environment["PORT"]), site=site)

        restarts = site.log.count("Starting again")
        (with_tasks / "trials/page.html").write_text("")  # Django keeps templates in memory
        wait_for(lambda: site.log.count("Starting again") > restarts, site=site)
        site.stop()
        wait_for(lambda: not site.processes(), site=site)


@default_output
def test_ctrl_c_keeps_a_broker_that_another_project_uses(project, tmp_path):
    with project.up() as site:
        ports = dict(zip(["PORT", "FLOWER_PORT"], free_ports(2), strict=True))
        port = urlsplit(site.environment["CELERY_BROKER_URL"]).port
        options = {"says": "Ctrl-C stops everything", **site.environment, **ports}
        with started(project.process("python dev.py", tmp_path / "log", **options)) as [second]:
            assert f" on port {port}" not in second.printed
            second.stop(signal.SIGINT)
            assert "A process exited" not in second.printed
            assert connects(port)


@outputs(first(broker="rabbitmq"))
def test_its_own_tests_pass_beside_a_worker(broker, project, tmp_path):
    worker = project.process("celery -A config worker", tmp_path / "log", says=" ready.", **broker)
    with started(worker):
        assert re.search(r"= \d+ passed", project.call("make", "test", ARGS="-m live", **broker))


# A client of the admin, in a new database
ADMIN = """
from django.core.management import call_command
from django.test import Client
from users.models import User
call_command("migrate", verbosity=0)
client = Client(HTTP_HOST="localhost")
client.force_login(User.objects.create_superuser("admin"))
"""
S3 = """
import boto3
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
boto3.client("s3").create_bucket(Bucket="uploads")
names = [default_storage.save("imports/tea.csv", ContentFile(text)) for text in (b"1", b"2")]
print(*[default_storage.open(name).read().decode() for name in names])
"""
UPLOAD_TWICE = """
from django.core.files.uploadedfile import SimpleUploadedFile
from orders.models import Import
key = {"Idempotency-Key": "key"}
for line in [b"Tea,1", b"Tea,1", b"Tea,2"]:
    file = SimpleUploadedFile("tea.csv", b"product,quantity" + (b"\\n" + line) * 500_000)
    print(client.post("/api/imports/", {"file": file}, headers=key).status_code)
print(Import.objects.get().file.size)
"""


@outputs(first(broker="sqs", result_backend="dynamodb"))  # with moto and the example
def test_uploads_go_to_a_bucket(addresses, project, sqlite, tmp_path):
    """With the package that docs/production.md names. Two uploads with one name are two files.

    A request with the same Idempotency-Key stores nothing, although the first one was read by S3.
    """
    packages = ["--target", tmp_path, "django-storages[s3]"]
    subprocess.run(["uv", "pip", "install", "--quiet", *packages], check=True, env=env())
    variables = {**addresses, "S3_BUCKET": "uploads", "PYTHONPATH": tmp_path}
    variables["AWS_DEFAULT_REGION"] = "us-east-1"  # there a bucket needs no region
    assert project.manage("shell", "-v0", "-c", S3, **variables).split()[-2:] == ["1", "2"]
    printed = project.manage("shell", "-v0", "-c", ADMIN + UPLOAD_TWICE, **variables, **sqlite)
    printed = printed.split()
    assert printed[-4:] == ["202", "202", "422", str(len("product,quantity") + 6 * 500_000)]


NAME_ON_PAGES = """
pages = [client.get(page) for page in ("/", "/admin/", "/api/schema/")]
client.logout()
pages.append(client.get("/login/"))
print(*(b"My Project" in page.content for page in pages))
"""


@default_output
def test_the_pages_show_the_name_of_the_project(project, sqlite):
    """project_name is on the login, the jobs, the admin, and in the document of the API docs."""
    shown = project.manage("shell", "-v0", "-c", ADMIN + NAME_ON_PAGES, **sqlite)
    assert shown.split() == ["True"] * 4


# The results of plain tasks


# Stores a result, and prints how many seconds the server will keep it.
KEPT = {
    "redis": """
print(backend.client.ttl(backend.get_key_for_task("stored")))
""",
    "dynamodb": """
place = {"TableName": backend.table_name}
[item] = backend.client.scan(**place)["Items"]
expiry = backend.client.describe_time_to_live(**place)["TimeToLiveDescription"]
assert expiry["TimeToLiveStatus"] == "ENABLED"
print(round(float(item[expiry["AttributeName"]]["N"]) - float(item["timestamp"]["N"])))
""",
}


@outputs(*(first(result_backend=name) for name in BACKENDS))
def test_the_server_deletes_a_result_after_a_day(request, addresses, project):
    store = """
from config.celery import app
backend = app.backend
backend.store_result("stored", 5, "SUCCESS")
"""
    kept = KEPT[request.node.callspec.params["output"]["result_backend"]]
    assert project.shell(store + kept, **addresses) in ("86400", "86399")


# Code that finds an entry of Beat's schedule.
SCHEDULED = """
import tempfile
from celery.beat import Service
from config.celery import app

kind = app.conf.beat_scheduler
scheduler = Service(app, None, tempfile.mktemp(), scheduler_cls=kind).scheduler


def scheduled(name):
    if hasattr(scheduler, "Model"):  # of django-celery-beat, which omits what is due in two hours
        return scheduler.Model.objects.get(name=name, enabled=True)
    return scheduler.schedule[name]


"""
CLEANUP = """
from datetime import timedelta
from django.utils import timezone
from django_celery_results.models import TaskResult

for pk, hours in [("young", 23), ("old", 25)]:
    app.backend.store_result(pk, 5, "SUCCESS")
    done = timezone.now() - timedelta(hours=hours)
    TaskResult.objects.filter(task_id=pk).update(date_done=done)


def shown():
    page = client.get("/admin/django_celery_results/taskresult/").content.decode()
    return [pk for pk in ("young", "old") if f">{pk}<" in page]


before = shown()
app.tasks[scheduled("celery.backend_cleanup").task].apply(throw=True)
print(*before, *shown())
"""


@outputs(first(result_backend="database"))
def test_the_admin_shows_a_result_for_a_day(project, sqlite):
    shown = project.manage("shell", "-v0", "-c", ADMIN + SCHEDULED + CLEANUP, **sqlite)
    assert shown.split() == ["young", "old", "young"]


# The example


DAILY = """
entry = scheduled("daily-report")
print(entry.schedule.hour, entry.task, entry.task in app.tasks)
"""


@outputs(*(first(periodic_tasks=choice) for choice in CHOICES["periodic_tasks"]))
def test_beat_starts_the_daily_report(project, sqlite):
    """Every morning, whether the schedule is in the settings or was stored by a migration."""
    printed = project.manage("shell", "-v0", "-c", ADMIN + SCHEDULED + DAILY, **sqlite)
    assert printed.split() == ["{6}", "orders.tasks.send_daily_report", "True"]


# Two projects


SENT = """
from config.celery import app
app.send_task("any", queue="celery")
app.backend.store_result("stored", 5, "SUCCESS")
"""
SEEN = """
from config.celery import app
from durable_jobs.messages import messages_in
with app.connection_for_write() as broker:
    print(messages_in("celery", broker), app.backend.get_state("stored"))
"""


@outputs(first(), first(broker="sqs", result_backend="dynamodb"))
def test_two_projects_on_one_server_keep_apart(request, addresses, project, cookies_session):
    """Each has its own messages and results."""
    answers = {**request.node.callspec.params["output"], "project_slug": "other"}
    other = baked(cookies_session, answers)
    other.install()
    if "queues:" in other.read("Makefile"):
        other.call("make", "queues", **addresses)
    project.manage("shell", "-v0", "-c", SENT, **addresses)
    seen = [
        each.manage("shell", "-v0", "-c", SEEN, **addresses).split() for each in (project, other)
    ]
    assert seen == [["1", "SUCCESS"], ["0", "PENDING"]]
