"""Outputs in containers, built and started as baked: Compose's services, and Kubernetes' pods.

A plugin of pytest (see conftest.py) for the fixture `engine`.
"""

import json
import re
import subprocess
from contextlib import contextmanager

import pytest

from . import kustomize, missing, need
from .bake import CHOICES, PINNED, baked
from .project import (
    BEHIND_A_PROXY,
    CONSOLE_MAIL,
    FILE_MAIL,
    Project,
    Site,
    fetch,
    free_ports,
    responds,
    wait_for,
)

HTTPS = {"Host": "example.com", **BEHIND_A_PROXY}  # what the proxy sends
MANAGE = "python", "manage.py"


def brokers(group, names=CHOICES["broker"]):
    """Return a parameter for each broker. The tests of one stack run one after the other."""
    return [
        pytest.param(broker, marks=pytest.mark.xdist_group(f"{group}-{broker}")) for broker in names
    ]


def docker(*command):
    return Project().call("docker", *command).strip()


@pytest.fixture(scope="module")
def engine():
    """Call missing() on a machine without a Docker engine or without Compose v2."""
    need("docker", "docker.io")
    for command in ("info", "compose version"):
        if subprocess.run(["docker", *command.split()], capture_output=True).returncode:
            missing(f"`docker {command}` fails: no engine, or no Compose v2")


def has_image(image):
    """Whether an image is on this machine or can be downloaded."""
    commands = (["docker", "image", "inspect", image], ["docker", "pull", "--quiet", image])
    found = any(not subprocess.run(each, capture_output=True).returncode for each in commands)
    if not found:
        print(f"not tested: there is no image {image}")
    return found


@contextmanager
def composed(stack, cookies_session, **answers):
    """Start an output in containers; remove them and their data at the end.

    `stack` is the class of what it gives. `.env` gets a shorter soft shutdown, because workers wait
    that long at each stop.
    """
    names = ["PORT", "FLOWER_PORT", "MAILPIT_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"]
    ports = dict(zip(names, free_ports(5), strict=True))
    slug = f"shop_{ports['PORT']}"
    answers = {"deployment": "kubernetes", "project_slug": slug, **answers}
    project = baked(cookies_session, answers)
    project.append(".env", "SOFT_SHUTDOWN_SECONDS=2\n")
    if not has_image(PINNED.mailpit):
        image = f"    image: {PINNED.mailpit}\n"
        project.edit("compose.yaml", f"{image}.*", f"{image}    profiles: [missing]")
        project.append(".env", f"EMAIL_BACKEND={FILE_MAIL}\n")
        project.append("config/settings.py", '\nEMAIL_FILE_PATH = "/tmp/mail"\n')
    stack = stack(project, None, ports)
    try:
        stack.make_up()
        yield stack
    finally:
        stack.compose("--profile", "*", "down", "--volumes", "--remove-orphans")
        subprocess.run(["docker", "image", "rm", project.name], capture_output=True)
    label = f"label=com.docker.compose.project={project.name}"
    assert not docker("volume", "ls", "--quiet", "--filter", label)


def compose_config(project, **variables):
    """Return what Compose reads from a project's files, without the help of an engine."""
    return json.loads(project.call("docker", "compose", "config", "--format", "json", **variables))


class ComposeStack(Site):
    """A site that `docker compose up` started."""

    @property
    def log(self):
        return self.compose("ps", "--all") + self.compose("logs", "--no-color")

    def compose(self, *command):
        return self.project.call("docker", "compose", *command, **self.environment)

    def exec(self, service, *command):
        """Run a command in a service's container and return what it prints."""
        return self.compose("exec", "-T", service, *command)

    def make(self, *words):
        return self.project.call("make", *words, **self.environment)

    def make_up(self):
        """Run `make up`, which prints addresses and passwords, and keep the token from there."""
        try:
            printed = self.make("up")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None
        user = self.user()
        assert f"{self.web}/    {user['USERNAME']} / {user['PASSWORD']}" in printed
        assert not self.has_flower or self.flower in printed
        self.token = re.findall("Token ([0-9a-f]{40})", printed)[-1]

    def up(self, *options):
        """Start what has ended, without a build."""
        self.compose("up", "--detach", "--wait", *options)

    @contextmanager
    def monitored(self):
        """Run the services of the profile `monitoring` until the block ends. Give their names.

        Without Grafana if its image is not on this machine and cannot be downloaded.
        """
        services = self.project.services()
        names = [name for name in services if services[name].get("profiles") == ["monitoring"]]
        if "grafana" in names:
            if not has_image(services["grafana"]["image"]):
                names.remove("grafana")
        profile = ("--profile", "monitoring")
        self.compose(*profile, "up", "--detach", "--wait", *names)
        try:
            yield names
        finally:
            self.compose(*profile, "rm", "--force", "--stop", *names)

    def ask_prometheus(self, path):
        port = self.environment["PROMETHEUS_PORT"]
        return fetch(f"http://127.0.0.1:{port}{path}")[2]["data"]

    def is_scraped(self):
        """Whether Prometheus has read the metrics since its last start."""
        targets = self.ask_prometheus("/api/v1/targets")["activeTargets"]
        assert all(target["health"] != "down" for target in targets), targets
        return targets and all(target["health"] == "up" for target in targets)

    def psql(self, sql, database="postgres"):
        """Run SQL, as docs/production.md says; return what it prints."""
        user = self.project.name
        return self.exec("db", "psql", "-U", user, "-d", database, "-tAc", sql).strip()

    def mails(self):
        """Return the texts of all emails: those of Mailpit, or without its image, of files."""
        if f"EMAIL_BACKEND={FILE_MAIL}" in self.project.read(".env"):
            return self.exec("worker", "sh", "-c", "cat /tmp/mail/* 2>/dev/null || true")
        api = f"http://127.0.0.1:{self.environment['MAILPIT_PORT']}/api/v1"
        listed = fetch(f"{api}/messages")[2]["messages"]
        return "".join(fetch(f"{api}/message/{each['ID']}")[2]["Text"] for each in listed)

    def shell(self, code):
        """Run Python code in the web container; return the last word that it prints."""
        return self.exec("web", *MANAGE, "shell", "-v0", "-c", code).split()[-1]

    def containers(self, *options):
        """Return what `docker inspect` says about the containers: {service: [containers]}."""
        ids = self.compose("ps", "--quiet", *options).split()
        found = {}
        for container in json.loads(docker("inspect", *ids)):
            service = container["Config"]["Labels"]["com.docker.compose.service"]
            found.setdefault(service, []).append(container)
        return found


def inspect(container):
    [about] = json.loads(docker("inspect", container))
    return about


def is_healthy(container):
    state = inspect(container)["State"]
    assert state["Running"], log_of(container)
    return state["Health"]["Status"] == "healthy"


def check_rights(containers, public=None):
    """Assert that services run with few rights, and that only `public` has public ports."""
    for service, [container] in containers.items():
        state, host = container["State"], container["HostConfig"]
        if state["Running"]:
            wait_for(lambda id=container["Id"]: is_healthy(id))
            assert host["RestartPolicy"]["Name"] == "unless-stopped", service
            assert docker("exec", container["Id"], "id", "-u") != "0", service
        else:
            assert state["ExitCode"] == 0, service
        assert container["Config"]["User"] not in ("", "0", "root"), service
        assert host["ReadonlyRootfs"] and host["Init"] and host["Memory"], service
        assert host["CapDrop"] == ["ALL"], service
        added = [name.removeprefix("CAP_") for name in host["CapAdd"] or []]
        assert added == ["NET_BIND_SERVICE"] * (service == public), service
        assert host["SecurityOpt"] == ["no-new-privileges:true"], service
        assert host["LogConfig"]["Config"]["max-size"], service
        address = "0.0.0.0" if service == public else "127.0.0.1"
        ports = host["PortBindings"].values()
        assert all(port["HostIp"] == address for [port] in ports), service


def options_of(spec, container, project):
    """Return what Docker needs to give a container its pod's rights, and a project's volumes."""
    rights, limits = container["securityContext"], container.get("resources", {"limits": {}})
    options = ["--init", "--user", str(spec["securityContext"]["runAsUser"])]
    options += [f"--cap-drop={name}" for name in rights["capabilities"]["drop"]]
    options += ["--read-only"] * rights["readOnlyRootFilesystem"]
    options += [f"--security-opt=no-new-privileges={not rights['allowPrivilegeEscalation']}"]
    for mount in container["volumeMounts"]:
        [volume] = [each for each in spec["volumes"] if each["name"] == mount["name"]]
        if folder := volume.get("emptyDir"):
            size = folder["sizeLimit"].removesuffix("i")
            options += ["--tmpfs", f"{mount['mountPath']}:size={size}"]
        elif claim := volume.get("persistentVolumeClaim"):
            options += ["--volume", f"{project}-{claim['claimName']}:{mount['mountPath']}"]
        else:
            assert volume["configMap"]["optional"], mount
    if memory := limits["limits"].get("memory"):
        options += ["--memory", memory.removesuffix("i"), "--memory-swap", memory.removesuffix("i")]
    return options


class Pods(Site):
    """The pods of the manifests: containers with the same commands, variables and rights.

    They use a stack's servers, but a database of their own. Only addresses and passwords differ
    from those in the manifests.
    """

    def __init__(self, stack):
        super().__init__(stack.project, None, stack.environment)
        self.headers = HTTPS
        documents = kustomize.manifests(stack.project)
        self.specs = {name: spec for (_, name), spec in kustomize.pods(documents).items()}
        config = compose_config(stack.project, **stack.environment)
        here = config["services"]["web"]["environment"]
        here["DATABASE_URL"] = here["DATABASE_URL"].rsplit("/", 1)[0] + "/pods"
        here |= {"EMAIL_BACKEND": CONSOLE_MAIL, "CACHE_URL": ""}
        settings = kustomize.only("ConfigMap", documents)["data"]
        secret = kustomize.only("Secret", documents)["data"]
        own = {name: here[name] for name in here if name in secret or name.startswith("AWS_")}
        self.variables = settings | own | {"EMAIL_BACKEND": CONSOLE_MAIL}
        self.containers = []
        self.ids = {}  # {pod: id of its container}

    def run(self, pod, kind="containers"):
        """Run the container of this kind in a pod; return its id."""
        spec, [container] = self.specs[pod], self.specs[pod][kind]
        variables = self.variables | {
            each["name"]: each["value"] for each in container.get("env", [])
        }
        own = self.project.name
        options = ["--network", f"{own}_default", *options_of(spec, container, own)]
        for name, value in variables.items():
            options += ["--env", f"{name}={value}"]
        command = container.get("command", [])
        self.containers.append(docker("run", "--detach", *options, own, *command))
        return self.containers[-1]

    def start(self):
        """Migrate, start all pods, and wait until they pass their probes."""
        first = self.run("web", "initContainers")
        migrate = self.run("beat", "initContainers")
        assert docker("wait", migrate) == "0", self.log
        wait_for(lambda: self.ended_at(first), site=self)
        assert self.ended_at(migrate) < self.ended_at(first)

        self.ids = {pod: self.run(pod) for pod in self.specs}
        assert {pod for pod, _ in self.probes()} == set(self.ids)
        for pod, kind in self.probes():
            wait_for(lambda pod=pod, kind=kind: self.answers(pod, kind), site=self)
        user = {"USERNAME": "root", "EMAIL": "root@example.com", "PASSWORD": "root"}
        user = [f"DJANGO_SUPERUSER_{name}={value}" for name, value in user.items()]
        self.call("web", "env", *user, *MANAGE, "createsuperuser", "--noinput")
        token = self.call("web", *MANAGE, "drf_create_token", "root")
        self.token = re.search("[0-9a-f]{40}", token)[0]
        self.web = f"http://{self.address('web')}:8000"

    def call(self, pod, *command):
        """Run a command in a pod and return what it prints."""
        return docker("exec", self.ids[pod], *command)

    def probes(self):
        """Return all (pod, kind of probe)."""
        kinds = "startupProbe", "livenessProbe", "readinessProbe"
        containers = {pod: spec["containers"][0] for pod, spec in self.specs.items()}
        return {(pod, kind) for pod in containers for kind in kinds if kind in containers[pod]}

    def answers(self, pod, kind):
        """Probe a pod as a kubelet does; return whether it is well."""
        [container] = self.specs[pod]["containers"]
        probe = container[kind]
        if "exec" in probe:
            command = ["docker", "exec", self.ids[pod], *probe["exec"]["command"]]
            return subprocess.run(command, capture_output=True).returncode == 0
        get = probe["httpGet"]
        url = f"http://{self.address(pod)}:{get['port']}{get['path']}"
        return responds(url, timeout=probe.get("timeoutSeconds", 1))

    def ended_at(self, id):
        """Return the time at which a container ended, or None."""
        state = inspect(id)["State"]
        return state["FinishedAt"] if state["Status"] == "exited" else None

    def address(self, pod):
        [network] = inspect(self.ids[pod])["NetworkSettings"]["Networks"].values()
        return network["IPAddress"]

    @property
    def log(self):
        return "\n".join(map(log_of, self.containers))


@contextmanager
def running_pods(stack):
    """Run the pods, and not the stack's worker and Beat, until the block ends. Give the Pods."""
    stack.psql("CREATE DATABASE pods")
    stack.compose("stop", "worker", "beat")  # which would take the pods' messages
    pods = Pods(stack)
    try:
        pods.start()
        yield pods
    finally:
        docker("rm", "--force", *pods.containers)
        docker("volume", "rm", "--force", f"{stack.project.name}-media")
        stack.compose("start", "worker", "beat")


def log_of(id):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(["docker", "logs", id], **streams).stdout
