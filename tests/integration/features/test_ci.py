"""CI does what its files say: its job runs in a fresh clone, on the services that it declares."""

import json
import re
import subprocess
import tomllib
from urllib.parse import urlsplit

import pytest
import yaml
from kombu import Connection
from packaging.specifiers import SpecifierSet

from harness.bake import CHOICES
from harness.ci import expand, job_of, move
from harness.outputs import first, outputs
from harness.project import Project, env, free_ports

CIS = [ci for ci in CHOICES["ci"] if ci != "none"]
RESULTS, POOLS = CHOICES["result_backend"], CHOICES["worker_pool"]


def turn(options, number):
    return options[number % len(options)]


# Each broker with each CI, in turn with jobs and without; result backends and pools in turn, too
OUTPUTS, PLAIN = [], []
for number, broker in enumerate(CHOICES["broker"]):
    jobs = {"result_backend": turn(RESULTS, number), "worker_pool": turn(POOLS, -number)}
    OUTPUTS.append({**first(broker=broker, **jobs), "ci": turn(CIS, number)})
    later = number + len(CHOICES["broker"])  # so that each result backend has a turn
    plain = {"result_backend": turn(RESULTS, later), "worker_pool": turn(POOLS, number)}
    plain = {**first(broker=broker, **plain), "durable_jobs": "no"}
    PLAIN.append({**plain, "ci": turn(CIS, number + 1)})
one_for_each_ci = outputs(*OUTPUTS[: len(CIS)])
FILES = {  # that only this choice writes
    "github": {
        ".github/workflows/ci.yml",
        ".github/dependabot.yml",
    },
    "gitlab": {".gitlab-ci.yml", "renovate.json"},
    "none": set(),
}
# What Dependabot can update, and the files with the versions.
ECOSYSTEMS = {
    "uv": "pyproject.toml",
    "github-actions": ".github/workflows/ci.yml",
    "docker": "Dockerfile",
    "docker-compose": "compose.yaml",
}
LAST_CHECK = "manage.py spectacular --validate --fail-on-warn"
SETTINGS = "config/settings.py"
# A file, lines to add to it, and what the job prints when it refuses them.
BREAKS = {
    "format": (SETTINGS, "x  = 1", "1 file would be reformatted"),
    "lint": (SETTINGS, "import json", "E402"),
    "migrations": (
        SETTINGS,
        'DEFAULT_AUTO_FIELD = "django.db.models.AutoField"',
        "Alter field id on user",
    ),
    "settings": (SETTINGS, "TEMPLATES = []", "admin.E403"),
    "schema": (
        "config/rest.py",
        'SPECTACULAR_SETTINGS["ENUM_NAME_OVERRIDES"] = {"State": "no.such.Enum"}',
        "unable to load choice override for State",
    ),
    "test": ("tests/test_broken.py", "def test_sum():\n    assert 1 + 1 == 3", "1 failed in"),
}


@pytest.fixture
def job(output):
    return job_of(output)


@pytest.fixture
def checkout(output, tmp_path):
    """A clone of the output, which has no `.env`."""
    if not (output / ".git").exists():
        output.commit()
    output.call("git", "clone", "--quiet", output, tmp_path / "checkout")
    checkout = Project(tmp_path / "checkout")
    assert not (checkout / ".env").exists()
    checkout.install()
    return checkout


@outputs(*OUTPUTS, *PLAIN)
def test_the_job_runs_all_checks_and_all_tests_on_its_services(output, job, checkout, tmp_path):
    # `make` writes .env with these addresses. The job's variables replace some.
    variables = {**checkout.addresses(".env.example"), **job.variables}
    if moto := variables.pop("AWS_ENDPOINT_URL", {}):  # no service: the tests start it
        moto = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}"}
    with job.servers(tmp_path) as servers:
        variables = move(variables, servers)
        printed = job.run(checkout, variables | moto)
        checked, _, tested = printed.partition("test session starts")
        assert LAST_CHECK in checked, printed
        assert re.search(r"= \d+ passed in", tested), printed  # none was skipped
        for file in checkout.glob("tests/test_*.py"):
            assert f"tests/{file.name} ." in tested, printed
        used = dict(variables)
        used.pop("CELERY_RESULT_BACKEND", None)  # no test of an output needs a result
        for service in job.services:
            server = servers[service.place]
            urls = [url for url in map(urlsplit, used.values()) if url.port == server.port]
            USED[service.name](server, urls)


def postgresql_was_used(server, urls):
    assert "connection authorized: user=postgres database=test_" in server.printed


def redis_was_used(server, urls):
    """It has keys in each database that a URL names."""
    keyspace = server.cli("info", "keyspace")
    assert re.findall(r"^db(\d+):", keyspace, re.M) == sorted(url.path[1:] for url in urls)


def rabbitmq_was_used(server, urls):
    with Connection(server.variables["CELERY_BROKER_URL"]) as connection:
        connection.default_channel.queue_declare("test", passive=True)  # fails if it is missing


USED = {"postgres": postgresql_was_used, "redis": redis_was_used, "rabbitmq": rabbitmq_was_used}


@outputs(OUTPUTS[0])
@pytest.mark.parametrize("what", BREAKS)
def test_the_job_fails_if_a_check_or_a_test_fails(job, checkout, what):
    assert_it_fails(job, checkout, what)


@outputs(*OUTPUTS[1 : len(CIS)])
@pytest.mark.parametrize("what", ["lint", "test"])  # the first and the last script
def test_the_job_of_another_ci_fails_too(job, checkout, what):
    assert_it_fails(job, checkout, what)


def assert_it_fails(job, checkout, what):
    file, lines, refusal = BREAKS[what]
    checkout.append(file, f"{lines}\n")
    # No service runs. Of the tests, only the broken one would.
    alone = {"DATABASE_URL": "sqlite:///db.sqlite3", "ARGS": "tests/test_broken.py"}
    with pytest.raises(AssertionError, match=refusal):
        job.run(checkout, job.variables | alone)


@one_for_each_ci
def test_the_job_has_the_versions_of_production(output, job):
    services = output.services().values()
    images = {service["image"] for service in services if "image" in service}
    assert {service.image for service in job.services} <= images
    assert re.findall("^FROM python:([0-9.]+)-slim", output.read("Dockerfile"), re.M) == [
        job.python,
        job.python,
    ]
    about = tomllib.loads(output.read("pyproject.toml"))["project"]
    assert job.python in SpecifierSet(about["requires-python"])


@one_for_each_ci
def test_the_job_caches_the_folder_of_uv(job, tmp_path):
    home, checkout = tmp_path / "home", tmp_path / "checkout"
    variables = {"PATH": env()["PATH"], "HOME": home, **expand(job.variables, checkout)}
    command = ["uv", "cache", "dir"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    cached = [str(checkout / path.replace("~", str(home))) for path in job.cached]
    assert cached == [result.stdout.strip()]


@pytest.mark.parametrize("ci", CHOICES["ci"])
def test_ci_adds_its_own_files_and_changes_only_the_readme(bake, ci):
    without, project = bake(ci="none"), bake(ci=ci)
    before = {str(file.relative_to(without)) for file in without.files()}
    assert ci in FILES, f"FILES lacks the files that ci={ci} writes"
    assert {str(file.relative_to(project)) for file in project.files()} == before | FILES[ci]
    assert not before & set().union(*FILES.values())
    for file in before - {".env", "README.md"}:  # .env has other secrets
        assert (project / file).read_bytes() == (without / file).read_bytes(), file


@pytest.mark.parametrize("deployment", CHOICES["deployment"])
def test_dependabot_updates_every_file_with_versions(bake, deployment):
    """Each week, when a version is a week old."""
    project = bake(ci="github", deployment=deployment)
    updates = yaml.safe_load(project.read(".github/dependabot.yml"))["updates"]
    exist = [kind for kind, file in ECOSYSTEMS.items() if (project / file).exists()]
    assert [update.pop("package-ecosystem") for update in updates] == exist
    for kind, update in zip(exist, updates, strict=True):
        ignored = update.pop("ignore", [])
        names = {"uv": ["django"], "docker-compose": ["postgres"]}.get(kind, [])
        assert [rule["dependency-name"] for rule in ignored] == names
        assert update == {
            "directory": "/",
            "schedule": {"interval": "weekly"},
            "cooldown": {"default-days": 7},
            "groups": {"all": {"patterns": ["*"]}},
        }


def test_renovate_updates_every_file_with_versions(bake):
    """All that it finds, as it does by default, and uv.lock, when a version is a week old."""
    settings = json.loads(bake(ci="gitlab").read("renovate.json"))
    _, rule = settings.pop("packageRules")
    assert (rule["matchPackageNames"], rule["enabled"]) == (["postgres"], False)
    assert settings == {
        "extends": ["config:recommended", "group:allNonMajor"],
        "lockFileMaintenance": {"enabled": True},
        "minimumReleaseAge": "7 days",
    }
