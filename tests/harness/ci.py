"""The job of an output's CI, read from its file and run on this machine.

Real servers stand in for its services. Each has the environment that the file gives it, but listens
on a free port. So the addresses in the job's variables are changed, and each must be a service's.
"""

import re
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from string import Template

import yaml

from .project import started
from .servers import SERVERS, PostgreSQL

# {name in its image: where its server listens}
PORTS = {"postgres": 5432, "redis": 6379, "rabbitmq": 5672}
ADDRESS = r"(?<=://)([^/@]*@)?([\w.-]+):(\d+)"  # in a URL: user and password, host, port


def name_of(image):
    """Return the image's last name, without its version: `valkey` for `valkey/valkey:9`."""
    return image.split("/")[-1].split(":")[0]


@dataclass
class Service:
    image: str
    place: tuple  # host and port, as the job's scripts reach it
    variables: dict

    @property
    def name(self):
        return name_of(self.image)


@dataclass
class Job:
    services: list
    variables: dict
    shell: list
    scripts: list  # each runs in a shell of its own
    python: str  # its version
    cached: list  # folders

    @contextmanager
    def servers(self, folder):
        """Run a server for each service until the block ends. Give {place: server}."""
        with ExitStack() as stack:
            found = {}
            for service in self.services:
                variables = dict(service.variables)
                if service.name == "postgres":
                    password = variables.pop("POSTGRES_PASSWORD")  # the image needs one
                    server = PostgreSQL("fsync=off", "log_connections=on", password=password)
                else:
                    server = SERVERS[service.name](folder / service.name)
                assert not variables, f"{service.name}: our server does not read these"
                [found[service.place]] = stack.enter_context(started(server))
            yield found

    def run(self, checkout, variables):
        """Run the scripts, and return what they printed. Fails if one of them does."""
        variables = expand(variables, checkout)
        runs = (checkout.call(*self.shell, each, CI="true", **variables) for each in self.scripts)
        return "".join(runs)


def expand(variables, checkout):
    """Return the variables with the value of `$CI_PROJECT_DIR`. An unknown variable is an error."""
    return {
        name: Template(value).substitute(CI_PROJECT_DIR=checkout)
        for name, value in variables.items()
    }


def move(variables, servers):
    """Return the variables with the real address of each server, {place: server}."""
    used = set()

    def address(match):
        user, host, port = match.groups("")
        place = host, int(port)
        assert place in servers, f"{match.string}: no service of the job is at {host}:{port}"
        used.add(place)
        return f"{user}127.0.0.1:{servers[place].port}"

    moved = {name: re.sub(ADDRESS, address, value) for name, value in variables.items()}
    assert used == servers.keys(), "a service that no variable names"
    return moved


def known(mapping, *keys):
    """Assert that we know these keys: an `if` or `allow_failure` would change what CI does."""
    assert set(mapping) <= set(keys), set(mapping) - set(keys)
    return mapping


def github(project):
    workflow = yaml.safe_load(project.read(".github/workflows/ci.yml"))
    # YAML 1.1 reads the key `on` as True.
    known(workflow, "name", True, "permissions", "concurrency", "jobs")
    assert workflow[True] == {"push": {"branches": ["main"]}, "pull_request": None}
    job = known(workflow["jobs"], "test", "image")["test"]  # image: integration/docker/
    known(job, "runs-on", "timeout-minutes", "services", "env", "steps")
    services = []
    for service in job["services"].values():
        known(service, "image", "env", "ports", "options")
        name = name_of(service["image"])
        [published] = service["ports"]
        ours, its = map(int, published.split(":"))
        assert its == PORTS[name], f"{name} does not listen on port {its}"
        services.append(Service(service["image"], ("127.0.0.1", ours), service.get("env", {})))
    actions, scripts = {}, []
    for step in job["steps"]:
        if "run" in step:
            scripts.append(known(step, "run")["run"])
        else:
            assert not scripts, "an action after a script may change what it did"
            actions[step["uses"].split("@")[0]] = known(step, "uses", "with")["with"]
    assert list(actions) == ["actions/checkout", "actions/setup-python", "actions/cache"]
    return Job(
        services,
        job["env"],
        ["bash", "-e", "-c"],
        scripts,
        python=actions["actions/setup-python"]["python-version"],
        cached=[actions["actions/cache"]["path"]],
    )


def gitlab(project):
    job = known(yaml.safe_load(project.read(".gitlab-ci.yml")), "test", "build")["test"]
    known(job, "image", "timeout", "services", "variables", "cache", "script")
    services = []
    for service in job["services"]:
        known(service, "name", "alias")
        name = name_of(service["name"])
        place = service.get("alias", name), PORTS[name]
        # GitLab gives a service all variables of the job; its server reads those with its name.
        own = {key: job["variables"][key] for key in job["variables"] if name in key.lower()}
        services.append(Service(service["name"], place, own))
    return Job(
        services,
        job["variables"],
        ["bash", "-e", "-o", "pipefail", "-c"],
        ["\n".join(job["script"])],
        python=job["image"].removeprefix("python:"),
        cached=job["cache"]["paths"],
    )


READERS = {"github": github, "gitlab": gitlab}


def job_of(project):
    """Return the job of the project's CI."""
    ci = project.answers["ci"]
    assert ci in READERS, f"tests/harness/ci.py needs a function that reads the files of ci={ci}"
    return READERS[ci](project)
