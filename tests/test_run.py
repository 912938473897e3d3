"""Outputs run: installed from their own pyproject.toml, with a real worker on a real broker."""

import os
import pty
import re
import signal
import socket
import subprocess
import time

import pytest
import servers
from project import env, free_ports, processes_in, wait_for
from test_bake import CHOICES

EXTRA = {"FLOWER_BASIC_AUTH": "admin:password", "DEBUG": "False"}
ORDER = {"email": "you@example.com", "product": "Tea", "quantity": 2}
CHORD = """
from jobs.tasks import *
print(chord([add.s(1, 2), add.s(3, 4)])(add_all.s()).get(timeout=60))
"""
COUNTDOWN = """
from jobs.tasks import *
print(add.apply_async([1, 2], countdown=2).id)
"""
SCHEDULE = """
CELERY_BEAT_SCHEDULE = {{
    "tick": {{"task": "jobs.tasks.touch", "schedule": 1, "args": ["{path}"]}}
}}
"""


def runs():
    """Every result backend, and every other choice of a pool and a schedule, on every broker."""
    default = {option: choices[0] for option, choices in CHOICES.items()}
    for broker in CHOICES["broker"]:
        for result_backend in CHOICES["result_backend"]:
            yield {**default, "broker": broker, "result_backend": result_backend}
        for option in ("worker_pool", "periodic_tasks"):
            for choice in CHOICES[option][1:]:
                yield {**default, "broker": broker, option: choice}
    yield {**default, "include_example": False}


def name(answers):
    return "-".join(str(choice) for choice in answers.values())


def outputs(*answers):
    """Run the test with these outputs."""
    return pytest.mark.parametrize("project", answers, ids=map(name, answers), indirect=True)


every_output = outputs(*runs())
default_output = outputs(next(runs()))


@pytest.fixture
def broker(project, tmp_path):
    """The variables of a real server, where `make run` starts none by itself."""
    if "amqp://" in project.read(".env"):
        with servers.rabbitmq(tmp_path) as variables:
            yield {**project.free_servers(), **variables}
    elif "redis://127.0.0.1:6379" in project.read(".env"):
        with servers.redis(tmp_path) as variables:
            yield {**project.free_servers(), **variables}
    else:
        yield project.free_servers()


@every_output
def test_it_passes_its_own_checks_and_tests(project, broker):
    project.call("make", "check")
    project.manage("check", "--deploy", "--fail-level", "WARNING", **project.production(), **EXTRA)
    printed = project.call("make", "test", **broker)
    assert re.search(r"= \d+ passed in", printed), printed  # none was skipped


@pytest.fixture
def with_tasks(project, tmp_path):
    """The project with tasks of our own, so that it needs no example, one of them periodic."""
    tasks, settings = project / "jobs/tasks.py", project / "config/settings.py"
    before = {file: file.read_text() for file in (tasks, settings)}
    project.add_tasks()
    settings.write_text(before[settings] + SCHEDULE.format(path=tmp_path / "ticked"))
    yield project
    for file, text in before.items():
        file.write_text(text)


@every_output
def test_it_runs(with_tasks, broker, tmp_path):
    project = with_tasks
    with project.up(**broker) as site:
        states = list(site.follow(site.enqueue("count", 15)))
        assert states[-1]["state"] == "succeeded", states[-1]
        assert states[-1]["result"] == 15
        assert any(0 < job["progress"] < 100 for job in states)
        assert site.request("/api/jobs/", Authorization="")[0] == 401

        if (project / "orders").exists():
            status, headers, order = site.request("/api/orders/", ORDER)
            assert (status, headers["Retry-After"]) == (202, "1")
            *_, job = site.follow(headers["Location"])
            assert job["state"] == "succeeded"
            assert site.request(f"/api/orders/{order['id']}/")[2]["confirmed_at"]
            assert "Thank you! You ordered 2 × Tea." in site.log

        if "CELERY_RESULT_BACKEND" in project.read("config/settings.py"):
            assert project.shell(CHORD, **site.environment) == "10"
        if site.has_flower:
            task = project.shell(COUNTDOWN, **site.environment)
            assert wait_for(lambda: site.find_in_flower(task), 60, site)
            assert wait_for(lambda: site.find_in_flower(states[-1]["id"]), 60, site)
            assert site.ask_flower("/api/workers", authenticated=False)[0] == 401

        wait_for((tmp_path / "ticked").exists, 60, site)  # Beat


@default_output
def test_production_names_what_is_missing(project):
    (project / ".env").rename(project / ".env.away")
    try:
        variables = project.production()
        assert {"SECRET_KEY", "DATABASE_URL", "CELERY_BROKER_URL"} <= set(variables)
        for variable in variables:
            with pytest.raises(AssertionError, match=f"ImproperlyConfigured: .*{variable}"):
                project.manage("check", **{**variables, variable: ""})
    finally:
        (project / ".env.away").rename(project / ".env")


@default_output
def test_it_runs_on_the_stand_in(with_tasks, tmp_path):
    """On fakeredis, which `make run` takes where no Redis is installed."""
    [port] = free_ports(1)
    command = [with_tasks / ".venv/bin/python", "-c", f"import dev; dev.serve_fakeredis({port})"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env(PYTHONPATH=with_tasks))
    url = f"redis://127.0.0.1:{port}"
    fakeredis = {"CELERY_BROKER_URL": f"{url}/0", "CELERY_RESULT_BACKEND": f"{url}/1"}
    try:
        with with_tasks.up(**fakeredis) as site:
            *_, job = site.follow(site.enqueue("count", 5))
            assert job["state"] == "succeeded"
            assert with_tasks.shell(CHORD, **site.environment) == "10"
            assert wait_for(lambda: site.find_in_flower(job["id"]), 60, site)
            wait_for((tmp_path / "ticked").exists, 60, site)
    finally:
        process.terminate()
        process.wait()


@default_output
def test_a_killed_child_loses_no_job(with_tasks):
    """With the default timings: within 60 s."""
    with with_tasks.up() as site:
        url = site.enqueue("count", 30)
        following = site.follow(url, seconds=90)
        while next(following)["progress"] < 20:
            pass
        _, *children = sorted(site.find("celery -A config worker"))
        for child in children:
            os.kill(child, signal.SIGKILL)
        killed_at = time.monotonic()
        restarted_after = None
        for job in following:
            if job["state"] == "running" and job["progress"] < 20 and not restarted_after:
                restarted_after = time.monotonic() - killed_at

        assert job["state"] == "succeeded"
        assert restarted_after < 60


@default_output
def test_ctrl_c_ends_everything(project):
    with project.up() as site:
        assert len(site.processes()) > 5
        site.stop()

        wait_for(lambda: not site.processes(), 30, site)


@default_output
def test_closing_the_terminal_ends_everything(project):
    ports = dict(zip(["PORT", "FLOWER_PORT"], free_ports(2), strict=True))
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(project)
        os.execvpe("make", ["make", "run"], env(**ports, **project.free_servers()))
    printed = b""
    while b"Ctrl-C ends everything" not in printed:
        printed += os.read(terminal, 4096)
    os.close(terminal)

    wait_for(lambda: not processes_in(project), 30)
    os.waitpid(child, 0)


@pytest.mark.parametrize("command", ["serve_fakeredis|redis-server", "runserver", "beat", "flower"])
@default_output
def test_when_one_process_dies_all_end(project, command):
    with project.up() as site:
        for pid in site.find(command):
            os.kill(pid, signal.SIGKILL)

        assert site.process.wait(60) != 0
        assert "A process has ended" in site.log
        wait_for(lambda: not site.processes(), 30, site)


@default_output
def test_a_taken_port_is_named(project):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AssertionError, match=f"Port {port} is taken.*PORT={port + 1}"):
            project.call("make", "run", PORT=port)


@default_output
def test_a_broker_elsewhere_gets_no_stand_in(project):
    with pytest.raises(AssertionError, match="No Redis answers at 127.0.0.2:1"):
        web, flower = free_ports(2)
        url = "redis://127.0.0.2:1/0"
        project.call("make", "run", PORT=web, FLOWER_PORT=flower, CELERY_BROKER_URL=url)
