"""CI runs as its file says: its services, its variables and its scripts, in a fresh clone."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from kombu import Connection

from harness.bake import CHOICES
from harness.ci import JOBS, move
from harness.outputs import one_of_each_pair, outputs
from harness.project import Project, env, free_ports

RESULTS = len(CHOICES["result_backend"])
OUTPUTS = [  # each broker with each CI; the result backends in turn
    {**one_of_each_pair()[RESULTS * broker + (broker - turn) % RESULTS], "ci": ci}
    for turn, ci in enumerate(sorted(set(CHOICES["ci"]) - {"none"}))
    for broker in range(len(CHOICES["broker"]))
]
one_of_each_ci = outputs(*OUTPUTS[:: len(CHOICES["broker"])])
FILES = {  # those that only this choice writes
    "github": {".github/workflows/ci.yml", ".github/dependabot.yml"},
    "gitlab": {".gitlab-ci.yml", "renovate.json"},
    "none": set(),
}
# What Dependabot calls them, and the file that lists what is to be updated.
ECOSYSTEMS = {
    "uv": "pyproject.toml",
    "github-actions": ".github/workflows/ci.yml",
    "docker": "Dockerfile",
    "docker-compose": "compose.yaml",
}
# Lines of settings.py that a part of `make check` refuses, and what it prints.
BREAKS = {
    "format": ("x  = 1", "Would reformat: config/settings.py"),
    "lint": ("import json", "E402"),
    "migrations": ('DEFAULT_AUTO_FIELD = "django.db.models.AutoField"', "Alter field id on user"),
    "settings": ("TEMPLATES = []", "admin.E403"),
    "schema": (
        'SPECTACULAR_SETTINGS["ENUM_NAME_OVERRIDES"] = {"State": "no.such.Enum"}',
        "unable to load choice override for State",
    ),
}


@pytest.fixture
def checkout(output, tmp_path):
    """A clone of the output, as CI has it: without `.env`."""
    if not (output / ".git").exists():
        output.call("git", "init", "--quiet")
        output.call("git", "add", "--all")
        who = ["-c", "user.name=You", "-c", "user.email=you@example.com"]
        output.call("git", *who, "commit", "--quiet", "--message", "Start")
    output.call("git", "clone", "--quiet", output, tmp_path / "checkout")
    checkout = Project(tmp_path / "checkout")
    assert not (checkout / ".env").exists()
    checkout.install()
    return checkout


@pytest.fixture
def job(request, output):
    return JOBS[request.node.callspec.params["output"]["ci"]](output)


@outputs(*OUTPUTS)
def test_the_job_runs_all_checks_and_tests_on_its_services(job, checkout, tmp_path):
    # `make` writes .env, with addresses that the job's variables may replace.
    variables = {**checkout.addresses(".env.example"), **job.variables}
    amazon = {}
    if "AWS_ENDPOINT_URL" in variables:  # no service: the tests start moto there
        amazon = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}"}
        del variables["AWS_ENDPOINT_URL"]
    with job.servers(tmp_path) as servers:
        variables = move(variables, servers)
        success, printed = job.run(checkout, variables | amazon)
        assert success, printed
        checked, tested = printed.split("test session starts")
        assert "manage.py spectacular --validate --fail-on-warn" in checked  # the last check
        assert re.search(r"= \d+ passed in", tested), printed  # none was skipped
        for file in checkout.glob("tests/test_*.py"):
            assert f"tests/{file.name} ." in tested
        for service in job.services:
            left = [urlsplit(url) for url in variables.values() if urlsplit(url).port == servers[service.place].port]
            TRACES[service.name](servers[service.place], left)


def find_in_postgresql(server, urls):
    assert re.search("connection authorized: user=postgres database=test_", server.printed)


def find_in_redis(server, urls):
    """Tasks and results are in the databases that the URLs name, and in no others."""
    command = ["redis-cli", "-p", str(server.port), "info", "keyspace"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^db(\d+):", printed, re.M)) == {url.path[1:] for url in urls}


def find_in_rabbitmq(server, urls):
    with Connection(server.variables["CELERY_BROKER_URL"]) as connection:
        connection.default_channel.queue_declare("test", passive=True)  # fails if it is missing


TRACES = {
    "postgres": find_in_postgresql,
    "redis": find_in_redis,
    "rabbitmq": find_in_rabbitmq,
}
