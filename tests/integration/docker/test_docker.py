"""Outputs in containers, built and started as baked: Compose's services, and Kubernetes' pods."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import time

import pytest
import yaml

from harness.bake import CHOICES, PINNED, WITH_JOBS
from harness.containers import (
    MANAGE,
    ComposeStack,
    brokers,
    check_rights,
    compose_config,
    composed,
    docker,
    is_healthy,
    log_of,
    running_pods,
)
from harness.outputs import ORDER
from harness.project import CONSOLE_MAIL, Project, env, fetch, free_ports, wait_for

# A job of 30 seconds, much longer than SOFT_SHUTDOWN_SECONDS.
LONG_JOB = """
from durable_jobs.enqueue import enqueue
from orders.tasks import write_report
from users.models import User
owner = User.objects.get(is_superuser=True)  # the profile monitoring has added another user
print(enqueue(write_report, [owner.pk], {"days": 60}, owner=owner).pk)
"""
# A job for each queue, which Beat starts when its countdown is over.
JOB_FOR_EACH_QUEUE = """
from durable_jobs.enqueue import enqueue
from durable_jobs.messages import known_queues
from orders.tasks import forecast_demand
from users.models import User
options = {"countdown": 1, "owner": User.objects.get(is_superuser=True)}
for queue in known_queues():
    job = enqueue(forecast_demand, ["Tea"], {"rounds": 9}, queue=queue, **options)
    print(queue, job.pk)
"""
CRASHES = "from durable_jobs.models import Job; print(Job.objects.get(pk='{}').crashes)"
MEGABYTE = 1_000_000

# An image with the newest Python and all packages, including those for tests.
TESTED = f"""
FROM python:{PINNED.python}-slim
COPY --from={PINNED.uv} /uv /usr/local/bin/
ENV UV_LINK_MODE=copy UV_CACHE_DIR=/cache VIRTUAL_ENV=/venv PATH=/venv/bin:$PATH
COPY pyproject.toml /
COPY vendor /vendor
RUN --mount=type=cache,target=/cache uv venv /venv && uv pip install -r pyproject.toml --group dev
WORKDIR /app
"""
VERSIONS = {  # of Django
    "default": ["5.2", "6.1"],
    "admin": ["6.0"],  # django-celery-beat has no release for 6.1
}
ANSWERS = {"default": {}, "admin": {"periodic_tasks": "admin", "result_backend": "database"}}

STACKS = brokers("docker", ["redis"])  # test_plain_docker.py has each broker


@pytest.fixture(scope="module", params=STACKS)
def stack(request, engine, cookies_session):
    with composed(JobComposeStack, cookies_session, **WITH_JOBS, broker=request.param) as stack:
        yield stack


class JobComposeStack(ComposeStack):
    def order(self):
        """Place an order, wait until its job has succeeded; return the order's URL and the job."""
        status, headers, order = self.request("/api/orders/", ORDER)
        assert status == 202, self.log
        *_, job = self.follow(headers["Location"])
        assert job["state"] == "succeeded", job
        return f"/api/orders/{order['id']}/", job


def test_an_order_becomes_a_succeeded_job(stack):
    url, job = stack.order()
    assert stack.request(url)[2]["confirmed_at"]
    assert "Thank you! You ordered 2 × Tea." in stack.mails()
    assert stack.request("/api/jobs/", Authorization="")[0] == 401
    assert wait_for(lambda: stack.find_in_flower(job["id"]), site=stack)
    assert stack.ask_flower("/api/workers", authenticated=False)[0] == 401


def test_the_worker_reads_an_uploaded_file(stack):
    files = {"file": ("upload.csv", "product,quantity\nTea,2\nTea,3")}
    status, headers, _ = stack.request("/api/imports/", files=files, method="POST")
    assert status == 202, stack.log
    *_, job = stack.follow(headers["Location"])
    assert (job["label"], job["result"]) == ("Import upload.csv", {"imported": 2}), job


def test_the_image_is_small_and_contains_no_secret(stack):
    image, base = stack.project.name, f"python:{PINNED.python}-slim"
    sizes = [int(docker("image", "inspect", "-f", "{{.Size}}", name)) for name in (image, base)]
    added = (sizes[0] - sizes[1]) / MEGABYTE
    print(f"{image}: {sizes[0] / MEGABYTE:.0f} MB, {added:.0f} MB on top of {base}")
    # OpenTelemetry is 10 MB of it.
    assert added <= 140

    layers = subprocess.run(["docker", "image", "save", image], stdout=subprocess.PIPE).stdout
    assert b"config/settings.py" in layers
    secrets = re.findall("[0-9a-f]{24}", stack.project.read(".env"))
    assert secrets
    assert not [secret for secret in secrets if secret.encode() in layers]


def test_a_stop_in_the_middle_of_a_job_loses_nothing(stack):
    """The data also outlives the containers."""
    order, _ = stack.order()
    pk, token = stack.shell(LONG_JOB), stack.token
    url = f"/api/jobs/{pk}/"
    next(job for job in stack.follow(url) if job["progress"])
    stack.make("down")
    assert not stack.compose("ps", "--all", "--quiet")
    stack.make_up()
    *_, job = stack.follow(url)

    assert job["state"] == "succeeded"
    assert stack.shell(CRASHES.format(pk)) == "0"  # the worker handed it back
    assert stack.token == token
    assert stack.request(order)[0] == 200


TOKEN = "cat /token/prometheus"
ABOUT_PROMETHEUS = """
from users.models import User
user = User.objects.get(username="prometheus")
rights = user.is_superuser or user.has_usable_password() or user.get_all_permissions()
print("many" if rights else "none")
"""


def test_the_profile_monitoring_collects_metrics_and_alerts(stack):
    """Prometheus logs in as a staff user without permissions. Only its containers have it."""
    with stack.monitored() as names:
        containers = stack.containers("--all")
        assert set(names) < set(containers)
        check_rights(containers)
        for service, [container] in containers.items():
            mounts = {mount["Destination"] for mount in container["Mounts"]}
            assert ("/token" in mounts) == service.startswith("prometheus"), service
        wait_for(stack.is_scraped, site=stack)
        [group] = stack.ask_prometheus("/api/v1/rules")["groups"]
        assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
        token = stack.compose("--profile", "*", "exec", "-T", "prometheus", "sh", "-c", TOKEN)
        assert stack.shell(ABOUT_PROMETHEUS) == "none"
        seen = stack.request("/api/jobs/", Authorization=f"Token {token.strip()}")
        assert seen[0] == 200 and not seen[2]["results"]


def test_a_frozen_service_is_unhealthy(stack):
    """Its container runs, but SIGSTOP has paused every process in it."""
    services = ["web", "worker", "beat"]

    def health():
        containers = stack.containers()
        return {containers[service][0]["State"]["Health"]["Status"] for service in services}

    for service in services:
        stack.exec(service, "sh", "-c", "kill -STOP -1")
    wait_for(lambda: health() == {"unhealthy"}, site=stack)
    for service in services:
        stack.exec(service, "sh", "-c", "kill -CONT -1")
    wait_for(lambda: health() == {"healthy"}, site=stack)


# The servers that `migrate` waits for.
WAITS = re.compile("    depends_on:\n(?:      .+\n)+(?=\n  web:)")


def test_no_command_line_shows_a_secret(stack):
    secrets = re.findall("[0-9a-f]{24}", stack.project.read(".env"))
    assert secrets
    for service, [container] in stack.containers("--all").items():
        arguments = [container["Path"], *container["Args"]]
        if container["State"]["Running"]:
            arguments += [docker("top", container["Id"], "-o", "pid,args")]
        assert not [secret for secret in secrets if secret in " ".join(arguments)], service


def test_the_image_contains_no_backup(engine, bake, tmp_path):
    """None of the usual names of a dump of the database."""
    project = bake(durable_jobs="yes")
    backups = ["backup.sql", "shop-2026-01-31.sql.gz", "shop.dump", "uploads.tar"]
    for name in backups:
        (project / name).write_text("secrets")
    (project / "orders/report.sql").write_text("SELECT 1")  # part of the program
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    project.call(
        *("docker", "build", "--file", tmp_path / "Dockerfile"),
        *("--output", tmp_path / "image", "."),
        DOCKER_BUILDKIT=1,
    )
    project.call("git", "init", "--quiet")
    tracked = project.call("git", "ls-files", "--others", "--exclude-standard").split()

    assert (tmp_path / "image/orders/report.sql").exists()
    assert "orders/report.sql" in tracked
    for name in backups:
        assert not (tmp_path / "image" / name).exists()
        assert name not in tracked


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_the_services_of_ci_become_healthy(engine, bake, broker):
    """GitHub passes a service's `options` to Docker, and starts the job when all are healthy."""
    project = bake(durable_jobs="yes", broker=broker, result_backend="none", ci="github")
    job = yaml.safe_load(project.read(".github/workflows/ci.yml"))["jobs"]["test"]
    started = []
    try:
        for service in job["services"].values():
            options = shlex.split(service["options"])
            assert "--health-cmd" in options
            for name, value in service.get("env", {}).items():
                options += ["--env", f"{name}={value}"]
            started.append(docker("run", "--detach", *options, service["image"]))
        for container in started:
            wait_for(lambda container=container: is_healthy(container))
    finally:
        subprocess.run(["docker", "rm", "--force", "--volumes", *started], capture_output=True)


def github_scripts(project):
    image = yaml.safe_load(project.read(".github/workflows/ci.yml"))["jobs"]["image"]
    return [step["run"] for step in image["steps"] if "run" in step]


def gitlab_scripts(project):
    """Without those that need GitLab's registry."""
    scripts = yaml.safe_load(project.read(".gitlab-ci.yml"))["build"]["script"]
    assert [each.split()[1] for each in scripts[-2:]] == ["compose", "push"]  # checks it first
    return [each for each in scripts if not re.search("CI_|push", each)]


@pytest.mark.parametrize("scripts_of", [github_scripts, gitlab_scripts])
def test_ci_builds_the_image_and_checks_it_with_the_settings_of_production(
    stack, bake, tmp_path, scripts_of
):
    """In a clone, whose folder has the same name, so that Docker has built the image before."""
    clone = Project(tmp_path / stack.project.name)
    shutil.copytree(stack.project, clone, ignore=shutil.ignore_patterns(".env"))
    shutil.copy(bake(ci="gitlab", durable_jobs="yes") / ".gitlab-ci.yml", clone)
    scripts = scripts_of(clone)

    def run():
        return "".join(clone.call("sh", "-e", "-c", script) for script in scripts)

    assert "no issues" in run()
    clone.edit(".env.production.example", "^(SECRET_KEY)=.*", r"\1=short")
    (clone / ".env").unlink()
    with pytest.raises(AssertionError, match="security.W009"):
        run()


@pytest.mark.parametrize(
    ("answers", "django"), [(name, version) for name in VERSIONS for version in VERSIONS[name]]
)
def test_its_own_tests_pass_with_these_versions(engine, bake, answers, django):
    """Only Django's version is edited, in the newest Python. A DeprecationWarning fails a test."""
    project = bake(durable_jobs="yes", **ANSWERS[answers])
    project.edit("pyproject.toml", '"django~=.+"', f'"django~={django}.0"')
    (project / "Dockerfile").write_text(TESTED)
    image = f"{project.name}_{answers}_{django}"
    docker("build", "--quiet", "--tag", image, str(project))
    test = ["python", "-W", "error::DeprecationWarning", "-m", "pytest"]
    run = ["run", "--rm", "--volume", f"{project}:/app", image]
    try:
        assert docker(*run, "django-admin", "--version").startswith(django)
        printed = docker(*run, *test)
    finally:
        subprocess.run(["docker", "image", "rm", image], capture_output=True)
    assert re.search(r"= \d+ passed in", printed), printed


def test_make_dev_restarts_the_worker_after_an_edit(stack):
    """What `make up` starts does not restart: it has the code of its image."""

    def starts():
        return stack.compose("logs", "worker").count(" ready.")

    stack.project.call("make", "dev", **stack.environment)
    try:
        before = starts()
        stack.project.append("orders/tasks.py", "\n# edited\n")
        wait_for(lambda: starts() > before, site=stack)
        stack.order()
    finally:
        stack.up()
    before = starts()
    stack.project.append("orders/tasks.py", "\n# edited again\n")
    time.sleep(5)
    assert starts() == before


def test_make_logs_follows_the_output(stack):
    options = {"cwd": stack.project, "env": env(**stack.environment), "text": True}
    options |= {"stdout": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen(["make", "logs"], **options) as logs:
        _, job = stack.order()
        try:
            assert any(job["id"] in line for line in logs.stdout)
        finally:
            os.killpg(logs.pid, signal.SIGINT)


def test_a_backup_replaces_the_database_and_the_uploads(stack):
    """The database is a new PostgreSQL, as one of another version is."""
    slug = stack.project.name

    def state(job):
        return stack.psql(f"SELECT state FROM durable_jobs_job WHERE id = '{job['id']}'", slug)

    _, job = stack.order()
    stack.exec("web", "sh", "-c", "echo tea > /media/upload")
    stack.make("backup")
    [backup] = stack.project.glob("backups/*")
    stack.exec("web", "touch", "/media/later")
    stack.make("down")
    docker("volume", "rm", f"{slug}_db")
    stack.make("restore", f"BACKUP=backups/{backup.name}")
    assert stack.exec("web", "cat", "/media/upload") == "tea\n"
    assert "later" not in stack.exec("web", "ls", "/media")
    assert state(job) == "succeeded"


EXAMPLE = ".env.production.example"
DOMAIN = "shop.localhost"  # Caddy issues its certificate itself
HTTPS_PORTS = "HTTP_PORT", "HTTPS_PORT"
CADDY_CA = "/data/caddy/pki/authorities/local/root.crt"
FORGED = "203.0.113."  # the start of addresses that a client invents
ATTEMPTS = """
from axes.models import AccessAttempt
print(*AccessAttempt.objects.values_list("ip_address", flat=True), sep=",")
"""


class Https:
    """A client of a stack with the profile https, which knows the CA of its certificate."""

    def __init__(self, stack, folder, user):
        self.folder, self.user, self.cookie = folder, user, f"{stack.project.name}_csrf"
        self.http_port, self.port = (stack.environment[name] for name in HTTPS_PORTS)
        self.origin, self.ca = f"https://{DOMAIN}:{self.port}", folder / "ca.crt"
        self.ca.write_text(stack.exec("caddy", "cat", CADDY_CA))

    def curl(self, url, *options):
        """Send a request; return the status, the version of HTTP, [headers] and the body."""
        head, body, jar = (self.folder / name for name in ("head", "body", "cookies"))
        body.write_text("")
        command = ["curl", "--silent", "--show-error", "--compressed", "--cacert", self.ca]
        command += ["--cookie", jar, "--cookie-jar", jar, "--dump-header", head, "--output", body]
        command += ["--write-out", "%{http_code} %{http_version}", *options, url]
        printed = subprocess.check_output(command, text=True)
        status, version = printed.split()
        return int(status), version, head.read_text().lower().splitlines(), body.read_text()

    def status(self, path, *options):
        return self.curl(f"{self.origin}{path}", *options)[0]

    def log_in(self, password, *options):
        """Send the form of the login page as the demo user; return what curl() does."""
        page, jar = f"{self.origin}/login/", self.folder / "cookies"
        jar.unlink(missing_ok=True)
        self.curl(page)
        form = {"username": self.user["USERNAME"], "password": password}
        form["csrfmiddlewaretoken"] = re.search(r"_csrf\t(\w+)", jar.read_text())[1]
        fields = [f"{name}={value}" for name, value in form.items()]
        data = itertools.chain(*(("--data-urlencode", field) for field in fields))
        return self.curl(page, "--referer", page, *data, *options)

    def send_slowly(self):
        """Begin to send a form, and return the connection."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        context = ssl.create_default_context(cafile=self.ca)
        connection = context.wrap_socket(connection, server_hostname=DOMAIN)
        lines = ["POST /login/ HTTP/1.1", f"Host: {DOMAIN}", f"Referer: https://{DOMAIN}/login/"]
        lines += [f"Cookie: {self.cookie}={'a' * 32}", "Content-Length: 1000"]
        lines += ["Content-Type: application/x-www-form-urlencoded", "", "a"]
        connection.sendall("\r\n".join(lines).encode())
        return connection


@pytest.fixture(scope="module")
def https(stack, tmp_path_factory):
    """A stack as docs/production.md says for the internet, with a domain of this machine."""
    env_file, caddyfile = stack.project / ".env", stack.project / "Caddyfile"
    development, current, user = env_file.read_text(), caddyfile.read_text(), stack.user()
    env_file.unlink()
    stack.project.call("make", ".env", f"EXAMPLE={EXAMPLE}")
    written = env_file.read_text().replace("shop.example.com", DOMAIN)
    assert "change-me" not in written
    for name in re.findall("^([A-Z_]+)=change-me", stack.project.read(EXAMPLE), re.M):
        [line] = re.findall(f"^{name}=.+$", development, re.M)  # the data has these passwords
        written = re.sub(f"^{name}=.+$", line, written, flags=re.M)
    env_file.write_text(f"{written}EMAIL_BACKEND={CONSOLE_MAIL}\nSOFT_SHUTDOWN_SECONDS=2\n")
    if docker("run", "--rm", PINNED.caddy, "caddy", "version").lstrip("v").startswith("2.6"):
        caddyfile.write_text(current.replace("request_buffers 25MB", "buffer_requests"))
    ports = dict(zip(HTTPS_PORTS, free_ports(2), strict=True))
    stack.environment |= ports
    try:
        stack.make("up")
        yield Https(stack, tmp_path_factory.mktemp("https"), user)
    finally:
        stack.exec("web", *MANAGE, "axes_reset")
        stack.compose("--profile", "https", "rm", "--stop", "--force", "caddy")
        subprocess.run(["docker", "image", "rm", f"{stack.project.name}-caddy"])
        for name in ports:
            del stack.environment[name]
        env_file.write_text(development)
        caddyfile.write_text(current)
        stack.make_up()


def test_the_profile_https_serves_the_project(stack, https):
    """`make up` reads the profile from .env, and waits for the certificate."""
    check_rights(stack.containers("--all"), public="caddy")
    status, _, headers, _ = https.curl(f"http://{DOMAIN}:{https.http_port}/login/")
    assert status == 308 and f"location: https://{DOMAIN}/login/" in headers

    status, version, headers, _ = https.curl(f"{https.origin}/login/")
    assert (status, version) == (200, "2")
    for name in ("strict-transport-security", "content-security-policy", "x-frame-options"):
        assert len([line for line in headers if line.startswith(f"{name}: ")]) == 1, headers
    assert [line for line in headers if line.startswith("content-encoding: ")], headers
    assert not [line for line in headers if line.startswith("server: ")], headers

    status, _, headers, _ = https.log_in(https.user["PASSWORD"])
    cookies = [line for line in headers if line.startswith("set-cookie: ")]
    assert status == 302 and len(cookies) == 2, headers  # so Caddy keeps Host: Django compares it
    assert all("; secure" in cookie for cookie in cookies)
    assert https.status("/") == https.status("/admin/") == 200

    token = ["--header", f"Authorization: Token {stack.token}"]
    order = ["--header", "Content-Type: application/json", "--data", json.dumps(ORDER)]
    status, _, headers, _ = https.curl(f"{https.origin}/api/orders/", *order, *token)
    assert status == 202, stack.log
    [job] = [line.split()[1] for line in headers if line.startswith("location: ")]
    wait_for(lambda: '"state":"succeeded"' in https.curl(f"{https.origin}{job}", *token)[3], stack)


def test_the_proxy_does_not_publish_flower_and_protects_the_rest(stack, https):
    """Only the login page and the probes answer a client without a login."""
    (https.folder / "cookies").unlink(missing_ok=True)
    for path in ("/flower/", "/workers", "/api/workers", "/dashboard", "/healthcheck"):
        assert https.status(path) == 404
    assert https.status("/metrics") == https.status("/api/jobs/") == 401
    assert https.status("/") == https.status("/admin/") == https.status("/api/docs/") == 302
    assert https.status("/login/") == https.status("/health/live") == 200
    for host in ("flower", "flower:5555", "localhost"):  # Caddy itself answers: nothing
        header = ["--header", f"Host: {host}"]
        assert https.curl(f"{https.origin}/", *header, "--http1.1")[3] == ""


def test_a_large_or_slow_request_stops_at_the_proxy(stack, https, tmp_path):
    limit = 25 * MEGABYTE
    token = ["--header", f"Authorization: Token {stack.token}"]
    answers = []
    # curl waits for the answer before it sends the body: over HTTP/2, curl 7.88 may lose an answer
    # that comes while it is still sending.
    token += ["--http1.1", "--expect100-timeout", "60"]
    for size in (limit - MEGABYTE, limit + MEGABYTE):
        (tmp_path / "upload.csv").write_bytes(b"x" * size)
        file = ["--form", f"file=@{tmp_path / 'upload.csv'}"]
        answers.append(https.curl(f"{https.origin}/api/imports/", *file, *token))
    under, over = answers
    assert under[0] == 400 and "more than" in under[3]  # said by the project
    assert over[0] == 413 and "25 MB" in over[3]

    slow = [https.send_slowly() for _ in range(20)]  # gunicorn has 16 threads
    assert https.status("/health/live", "--max-time", "60") == 200
    for connection in slow:
        connection.close()


def test_behind_the_proxy_a_client_cannot_forge_its_address(stack, https):
    """Ten wrong passwords lock it out, and no other address."""
    [network] = json.loads(docker("network", "inspect", f"{stack.project.name}_default"))
    address = network["IPAM"]["Config"][0]["Gateway"]  # of clients on this machine
    for number in range(11):
        forged = ["--header", f"X-Forwarded-For: {FORGED}{number}"]
        forged += ["--header", f"X-Real-IP: {FORGED}{number}"]
        status = https.log_in("wrong", *forged)[0]
    assert status == https.log_in(https.user["PASSWORD"])[0] == 429
    assert stack.shell(ATTEMPTS) == address
    log = stack.compose("logs", "web")
    assert f'"ip": "{address}"' in log and FORGED not in log


def test_the_profiles_https_and_monitoring_work_together(stack, https):
    """With the settings of production: Prometheus asks gunicorn itself, without TLS."""
    variables = {**stack.environment, "COMPOSE_PROFILES": "https,monitoring"}
    listed = stack.project.call("docker", "compose", "config", "--services", **variables).split()
    assert {"caddy", "prometheus", "grafana"} < set(listed)
    with stack.monitored():
        wait_for(stack.is_scraped, site=stack)
        assert https.status("/health/ready") == 200


def test_the_profile_https_refuses_to_start_without_a_domain_or_with_debug(stack):
    """It says why. Without the profile, nobody needs DOMAIN."""
    services = stack.compose("config", "--services").split()
    try:
        for service, domain, debug, sentence in [
            ("caddy", "", "", "DOMAIN: is missing in .env"),
            ("migrate", DOMAIN, "True", "security.W018"),
            ("migrate", DOMAIN, "1", "security.W018"),
            ("migrate", "", "1", "security.W018"),
        ]:
            variables = {"DOMAIN": domain, "DEBUG": debug, "COMPOSE_PROFILES": "dev,https"}
            listed = stack.project.call("docker", "compose", "config", "--services", **variables)
            assert set(listed.split()) == {*services, "caddy"}
            with pytest.raises(AssertionError, match=sentence):
                stack.project.call(
                    *("docker", "compose", "run", "--rm", "--no-deps", service), **variables
                )
    finally:
        subprocess.run(["docker", "image", "rm", f"{stack.project.name}-caddy"])


# The address of one of the servers
ADDRESS = "[/@](?:db|redis|rabbitmq|aws):"


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_compose_works_with_servers_of_your_own(engine, bake, broker):
    """After the edits that docs/production.md lists, no server is left, and none is awaited."""
    project = bake(broker=broker)
    text, page = project.read("compose.yaml"), project.read("docs/production.md")
    servers = {"db", "redis", "rabbitmq", "rabbitmq-policy", "aws", "aws-prepare"}
    for service in project.services().keys() & servers:
        text, count = re.subn(f"^  {service}:.*\n(?:    .*\n|\n)*", "", text, flags=re.M)
        assert count, service
    text = re.sub(f"^    [A-Z_]+: .*{ADDRESS}.*\n", "", text, flags=re.M)
    if "`REDIS_ADDR`" in page:
        text = re.sub("(?<=REDIS_ADDR: ).*", "redis://redis.example:6379", text)
    assert not re.findall(f".*{ADDRESS}.*", text)
    project.edit(".env", "^(DATABASE_URL)=.*", r"\1=postgres://u:p@db.example/shop")
    [entries] = re.findall(WAITS, text)
    edit = "depends_on: {}"
    assert f"`{edit}`" in page
    (project / "compose.yaml").write_text(text.replace(entries, ""))
    with pytest.raises(AssertionError, match="cycle detected: migrate -> migrate"):
        project.call("docker", "compose", "config")
    (project / "compose.yaml").write_text(text.replace(entries, f"    {edit}\n"))
    services = compose_config(project)["services"]
    assert "depends_on" not in services["migrate"]
    for service in {"web", "worker", "beat", "flower"} & services.keys():
        assert list(services[service]["depends_on"]) == ["migrate"]
        assert services[service]["environment"]["DATABASE_URL"].endswith("@db.example/shop")


def test_the_pods_of_the_manifests_run_jobs(stack):
    """Pods wait for the migrations and pass the probes of deploy/kubernetes/, unless they hang."""
    with running_pods(stack) as pods:
        # As Prometheus asks: over plain HTTP, with the name of the Service.
        headers = {"Authorization": f"Token {pods.token}", "Host": "web.any-namespace.svc:80"}
        assert fetch(f"{pods.web}/metrics", headers=headers)[0] == 200
        order = pods.request("/api/orders/", ORDER)
        assert order[0] == 202, pods.log
        *_, job = pods.follow(order[1]["Location"])
        assert job["state"] == "succeeded", job
        printed = pods.call("web", *MANAGE, "shell", "-v0", "-c", JOB_FOR_EACH_QUEUE)
        for queue, pk in re.findall("^(\\w+) ([0-9a-f-]{36})$", printed, re.M):
            *_, job = pods.follow(f"/api/jobs/{pk}/")
            assert job["state"] == "succeeded", job
            assert pk in log_of(pods.ids[f"worker-{queue}"])

        age = ("touch", "-d", "1 hour ago", pods.variables["LIVENESS_FILE"])
        for pod in ("worker-celery", "beat"):  # a living one touches its file
            pods.call(pod, *age)
            wait_for(lambda pod=pod: pods.answers(pod, "livenessProbe"), site=pods)
        for pod in ("worker-celery", "beat", "web"):
            pods.call(pod, "sh", "-c", "kill -STOP -1")
            pods.call(pod, *age)
            assert not pods.answers(pod, "livenessProbe"), pod
