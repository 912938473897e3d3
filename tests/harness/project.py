"""A baked project that the tests and `make demo` install, start and send requests to."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import requests
import yaml

FINAL = {"succeeded", "failed", "cancelled"}
LIMIT = 300  # seconds of every wait: a machine may be ten times slower than ours
# A variable and its address for development, in settings.py or .env.
ADDRESS = r"""([A-Z_]+)(?:=|["'], ["'])([\w+]+://(?:[^"'\s]*@)?127\.0\.0\.1:\d+[^"'\s]*)"""
# A variable without a default
ASKED = r"""env\.\w+\(\s*["']([A-Z_]+)["'](?=\)|,\s+\w+=)"""
CONSOLE_MAIL = "django.core.mail.backends.console.EmailBackend"
FILE_MAIL = "django.core.mail.backends.filebased.EmailBackend"
BEHIND_A_PROXY = {"X-Forwarded-Proto": "https"}  # of requests to a web as in production
APPS = Path(__file__).parent / "apps"  # Django apps for projects under test
CONSOLE = Path(__file__).parent / "console.py"


class Project(type(Path())):
    """The path of a baked project, which can also run commands."""

    answers = None  # of the bake
    environments = None  # a folder of environments that projects with equal dependencies share

    def run(self, *command, **environment):
        """Run a module of the test environment, such as `ruff check`, and return what it prints."""
        return self.call(sys.executable, "-m", *command, **environment)

    def call(self, *command, **environment):
        """Run a command in the project and return what it prints. Fails if the command does."""
        result = subprocess.run(
            command, cwd=self, env=env(**environment), capture_output=True, text=True
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        return result.stdout

    def manage(self, *command, **environment):
        return self.call(".venv/bin/python", "manage.py", *command, **environment)

    def shell(self, code, **environment):
        """Run Python code in the project and return the last word that it prints."""
        return self.manage("shell", "-v0", "-c", code, **environment).split()[-1]

    def read(self, file):
        return (self / file).read_text("utf-8")

    def append(self, file, text):
        with open(self / file, "a", encoding="utf-8") as opened:
            opened.write(text)

    def edit(self, file, pattern, new):
        """Replace the one match of this pattern in a file."""
        text, count = re.subn(pattern, new, self.read(file), flags=re.MULTILINE)
        assert count == 1, pattern
        (self / file).write_text(text, "utf-8")

    def services(self):
        """Return {name: service} of compose.yaml."""
        return yaml.safe_load(self.read("compose.yaml"))["services"]

    def production(self):
        """Return what production needs, with the values of .env.production.example."""
        file = self.read(".env.production.example")
        examples = dict(re.findall(r"^(?:# )?([A-Z_]+)=(.+)$", file, re.MULTILINE))
        needed = re.findall(ASKED, self.read("config/settings.py"))
        secret = {"SECRET_KEY": "only-this-test-knows-0123456789-abcdefghijklmnopqrstuvwxyz"}
        return {name: value for name, value in {**examples, **secret}.items() if name in needed}

    def addresses(self, file=".env"):
        """Return the variables whose value in the settings or this file is a server's address."""
        return dict(re.findall(ADDRESS, self.read("config/settings.py") + self.read(file)))

    def free_servers(self):
        """Return the variables that move each server of the project to a free port."""
        found = self.addresses()
        ports = {urlsplit(url).port for url in found.values()}
        free = dict(zip(ports, free_ports(len(ports)), strict=True))
        return {
            name: url.replace(f":{port}", f":{free[port]}")
            for name, url in found.items()
            for port in [urlsplit(url).port]
        }

    def files(self):
        """Return the paths of all files, without caches of tools."""
        return [path for path in self.rglob("*") if path.is_file() and "_cache" not in str(path)]

    def contents(self):
        """Return {name: bytes} of these files."""
        return {str(file.relative_to(self)): file.read_bytes() for file in self.files()}

    def tracked(self):
        """Return the names of the files in Git, and of those that it neither has nor ignores."""
        options = "-z", "--cached", "--others", "--exclude-standard"
        return self.call("git", "ls-files", *options).split("\0")[:-1]

    def commit(self, **environment):
        """Commit all files, in a new repository if there is none."""
        self.call("git", "init", "--quiet", "--initial-branch", "main")
        self.call("git", "add", "--all")
        author = "-c", "user.name=You", "-c", "user.email=you@example.com"
        self.call("git", *author, "commit", "--quiet", "--message", "A commit", **environment)

    def install(self):
        """Install what the project's own pyproject.toml declares, and nothing else."""
        if self.environments:
            environment = shared_environment(self, self.environments)
            (self / ".venv").symlink_to(environment)
            environment.touch()  # newer than pyproject.toml, so make does not install again
        else:
            self.call("make", ".venv")

    @property
    def search_path(self):
        """A PATH that begins with the project's own tools."""
        return f"{self}/.venv/bin:{os.environ['PATH']}"

    def process(self, command, log, *, says="", is_ready=None, **variables):
        """Make the process of a command that somebody types in the project."""
        variables = {"PATH": self.search_path, **variables}
        options = {"cwd": self, "variables": variables, "says": says, "is_ready": is_ready}
        return Process(command.split(), log, **options)

    def add_app(self, name, settings="", urls=""):
        """Copy one of our apps into the project, and append to its settings and its URLs."""
        shutil.copytree(APPS / name, self / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.append("config/settings.py", f'INSTALLED_APPS += ["{name}"]\n{settings}\n')
        self.append("config/urls.py", urls)

    @contextmanager
    def up(self, **environment):
        """Run `make run` on free ports until the block ends. Give the Site once it answers."""
        port, flower = free_ports(2)
        environment = {"PORT": port, "FLOWER_PORT": flower, **self.free_servers(), **environment}
        options = {"says": "Ctrl-C stops everything", "cwd": self, "variables": environment}
        site = Site(self, Process(["make", "run"], self.parent / "run.log", **options), environment)
        try:
            site.start()
            yield site
        finally:
            site.stop()


class Process:
    """A command in its own session, so that signals reach its children too."""

    def __init__(self, command, log, *, says="", is_ready=None, variables=(), **options):
        """It is ready when it has printed what it `says`, or as `is_ready` tells."""
        self.command, self.log = command, Path(log)
        self.options = {"env": env(**dict(variables)), **options}
        self.is_ready = is_ready or (lambda: says in self.printed)
        self.process = None

    @property
    def pid(self):
        return self.process.pid

    @property
    def printed(self):
        """Its output since its last start."""
        return self.log.read_bytes()[self.read_from :].decode(errors="replace")

    @property
    def peak(self):
        """Its peak memory in MB (Linux)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1000

    def is_running(self):
        return self.process is not None and self.process.poll() is None

    def launch(self):
        self.read_from = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **self.options}
            self.process = subprocess.Popen(self.command, start_new_session=True, **options)

    def wait_until_ready(self):
        wait_for(lambda: not self.is_running() or self.is_ready())
        assert self.is_running(), f"{self.command}\n{self.printed}"

    def start(self):
        self.launch()
        self.wait_until_ready()
        return self

    def signal_all(self, number):
        os.killpg(self.pid, number)

    def kill(self):
        """Kill the process and all its children with SIGKILL."""
        self.signal_all(signal.SIGKILL)
        self.process.wait()

    def pause(self):
        self.signal_all(signal.SIGSTOP)

    def resume(self):
        if self.is_running():
            self.signal_all(signal.SIGCONT)

    def end(self):
        """Kill the process if it runs, or is paused."""
        self.resume()
        if self.is_running():
            self.kill()

    def stop(self, number=signal.SIGTERM):
        """Send a signal to the process, not to its children. Return its exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self):
        """Wait until the process has ended. Return its exit code."""
        return self.process.wait(LIMIT)

    def recover(self):
        """Resume or start the process after a test. Return whether it had ended."""
        self.resume()
        if has_ended := not self.is_running():
            self.launch()
        return has_ended


@contextmanager
def started(*processes):
    """Run these until the block ends, and give them."""
    try:
        yield [process.start() for process in processes]
    finally:
        for process in processes:
            process.end()


class Console(Process):
    """Runs Python code in a project, as `manage.py shell` does, but starts only once."""

    def __init__(self, project, log, **variables):
        command = [project / ".venv/bin/python", CONSOLE]
        variables |= {"DJANGO_SETTINGS_MODULE": "config.settings", "PYTHONPATH": project}
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        super().__init__(command, log, cwd=project, variables=variables, **options)

    def ask(self, code):
        """Run code and return the value of its variable `result`."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("=>"):
                answer = json.loads(line[2:])
                assert "error" not in answer, answer["error"]
                return answer["result"]
        raise AssertionError(self.printed)


class Site:
    """What `make run` started."""

    def __init__(self, project, process, environment):
        self.project = project
        self.process = process
        self.web = f"http://127.0.0.1:{environment['PORT']}"
        self.flower = f"http://127.0.0.1:{environment['FLOWER_PORT']}"
        self.environment = environment
        self.headers = {}  # of every request, for a proxy that adds some
        self.token = self.worker = self.console = None

    @property
    def has_flower(self):
        """Whether the project has Flower: not every broker supports it."""
        return "flower" in self.project.read("Procfile.dev")

    @property
    def log(self):
        return self.process.printed

    def start(self):
        self.process.start()
        self.token = re.search("Token ([0-9a-f]{40})", self.log)[1]
        ready = r"(celery@\S+) ready"
        self.worker = wait_for(lambda: re.search(ready, self.log), site=self)[1]
        if self.has_flower:
            port = self.environment["FLOWER_PORT"]
            wait_for(lambda: connects(int(port)), site=self)

    def user(self):
        """Return USERNAME, PASSWORD and EMAIL of the demo user."""
        return dict(re.findall("^DJANGO_SUPERUSER_(.*)=(.*)$", self.project.read(".env"), re.M))

    def request(self, path, data=None, *, method=None, files=None, **headers):
        """Send a request as the demo user, as fetch() does. Return (status, headers, answer)."""
        headers = {"Authorization": f"Token {self.token}", **self.headers, **headers}
        return fetch(self.web + path, data, headers, method=method, files=files)

    def delete(self, path):
        """Send a DELETE as the demo user. Return the status."""
        return self.request(path, method="DELETE")[0]

    def scrape(self):
        """Return what Prometheus would read, {name with labels: value}."""
        lines = self.request("/metrics")[2].splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def enqueue(self, task, *args):
        """Enqueue a job of a task of the app `trials` for the demo user; return its URL."""
        code = f"""
from users.models import User
from durable_jobs.enqueue import enqueue
from trials import tasks
result = enqueue(tasks.{task}, {args!r}, owner=User.objects.get()).pk
"""
        return f"/api/jobs/{self.ask(code)}/"

    def ask(self, code):
        """Run Python code in the project and return its `result`. All calls use one process."""
        if not self.console:
            log = self.project.parent / "console.log"
            self.console = Console(self.project, log, **self.environment).start()
        return self.console.ask(code)

    def follow(self, url):
        """Yield the job at `url` each time it has changed, until it has a final state."""
        seen, until = None, time.monotonic() + LIMIT
        while time.monotonic() < until:
            _, _, job = self.request(url)
            looks = job["state"], job["progress"], job["message"]
            if looks != seen:
                seen = looks
                yield job
            if job["state"] in FINAL:
                return
            time.sleep(0.15)  # 400 a minute: below the throttle
        raise AssertionError(f"{job}\n{self.log}")

    def ask_flower(self, path, data=None, *, authenticated=True):
        """Send a request to Flower's API as fetch() does. Return (status, headers, answer)."""
        secret = re.search("^FLOWER_BASIC_AUTH=(.*):(.*)$", self.project.read(".env"), re.MULTILINE)
        return fetch(self.flower + path, data, auth=secret.groups() if authenticated else None)

    def find_in_flower(self, task_id, state="SUCCESS"):
        """Return what Flower knows about a task if it has this state, else None."""
        _, _, task = self.ask_flower(f"/api/task/info/{task_id}")
        return task if task and task["state"] == state else None

    def processes(self):
        return processes_in(self.project)

    def find(self, pattern):
        """Return the ids of processes whose command line matches, without their shells."""
        commands = [(pid, line) for pid, line in self.processes().items() if "sh -c" not in line]
        return [pid for pid, line in commands if re.search(pattern, line)]

    def stop(self):
        """Stop everything, as Ctrl-C does."""
        if self.console:
            self.console.end()
            self.console = None
        if self.process.is_running():
            self.process.signal_all(signal.SIGINT)
        self.process.wait()


def shared_environment(project, folder):
    """Return the environment for a project's dependencies. The first call for them creates it."""
    declared = tomllib.loads(project.read("pyproject.toml"))
    declared = json.dumps([declared["project"]["dependencies"], declared["dependency-groups"]])
    wheels = list(project.glob("vendor/*.whl"))
    contents = b"".join([declared.encode(), *(wheel.read_bytes() for wheel in wheels)])
    shared = Project(folder / hashlib.sha256(contents).hexdigest()[:16])
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "done").exists():
            for file in ["Makefile", "pyproject.toml"]:
                shutil.copy(project / file, shared)
            shutil.copytree(project / "vendor", shared / "vendor")
            shared.call("make", ".venv")
            link_compiled(folder, shared)
            (shared / "done").touch()
    return shared / ".venv"


def link_compiled(folder, new):
    """Link the files that other environments of this folder have compiled into a new one.

    Python ignores a compiled file whose source has another time or size, so this only makes the
    first start of an environment quicker.
    """
    [packages] = new.glob(".venv/lib/*/site-packages")
    finished = [file.parent for file in folder.glob("*/done")]  # uv still changes the others
    for other in chain(*(each.glob(".venv/lib/*/site-packages") for each in finished)):
        for compiled in other.rglob("__pycache__/*.pyc"):
            link = packages / compiled.relative_to(other)
            if link.parent.parent.is_dir() and not link.exists():
                link.parent.mkdir(exist_ok=True)
                with suppress(FileNotFoundError):  # its process has just replaced it
                    link.hardlink_to(compiled)


def processes_in(project):
    """Return the processes that work in the project's folder, {pid: command line}."""
    return {
        process.pid: " ".join(process.info["cmdline"] or [])
        for process in psutil.process_iter(["cmdline", "cwd"])
        # Without a folder, it has ended or belongs to another user.
        if (folder := process.info["cwd"]) and Path(folder).is_relative_to(project.resolve())
    }


def children_of(pid):
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def fetch(url, data=None, headers=(), *, method=None, **options):
    """Send a GET, or a POST if there is `data`: a text of JSON, or a value that is sent as JSON.

    Returns (status, headers, answer). The answer is parsed if it is JSON, and None for an error.
    """
    if isinstance(data, (str, bytes)):
        headers = {"Content-Type": "application/json", **dict(headers)}
        options["data"] = data
    else:
        options["json"] = data
    method = method or ("GET" if data is None else "POST")
    options = {"timeout": 60, "headers": dict(headers), **options}
    response = requests.request(method, url, **options)
    if not response.ok:
        return response.status_code, response.headers, None
    try:
        return response.status_code, response.headers, response.json()
    except ValueError:
        return response.status_code, response.headers, response.text


def responds(url, **options):
    """Whether a server answers a GET with 200."""
    with suppress(OSError):
        return fetch(url, **options)[0] == 200


def wait_for(condition, site=None):
    until, pause = time.monotonic() + LIMIT, 0.05
    while not (value := condition()):
        assert time.monotonic() < until, site.log if site else "waited too long"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.5)
    return value


def env(**environment):
    """Return this process's variables, with these changes, for a process of a project.

    The tools of the test environment come first in PATH. Variables that configure this test run are
    left out.
    """
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # PYTHONDONTWRITEBYTECODE, which images of CI set, would make each process compile its imports.
    ours = {"VIRTUAL_ENV", "MAKEFLAGS", "ARGS", "PYTHONDONTWRITEBYTECODE"}
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    return {**kept, "PATH": tools, **{key: str(value) for key, value in environment.items()}}


def path_without(*tools, folder):
    """Return a PATH without these tools: a new folder with links to all others."""
    folder.mkdir()
    for place in os.environ["PATH"].split(":"):
        for tool in Path(place).glob("*"):
            link = folder / tool.name
            if tool.name not in tools and not link.is_symlink():
                link.symlink_to(tool)
    return folder


def connects(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


HELD = []  # sockets, each bound to a port that free_ports() returned


def free_ports(count):
    """Return `count` free ports of this machine, reserved until this process ends.

    A socket that is bound but does not listen reserves its port: the system gives it to nobody who
    asks for any free port. A server that is told the number can still listen there.
    """
    for _ in range(count):
        HELD.append(socket.socket())
        HELD[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        HELD[-1].bind(("127.0.0.1", 0))
    return [held.getsockname()[1] for held in HELD[len(HELD) - count :]]
