"""What an owner may write or use: variables, a user model of his own, a pooler, a metered Redis."""

import re
import time

import pytest

from harness.bake import DEFAULTS, TEMPLATE
from harness.blocks import code
from harness.outputs import both_outputs, outputs, plain_output
from harness.project import connects, fetch, free_ports, started
from harness.servers import Redis

KEY = "0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijkl"
WRITTEN = {  # {variable: as it is written}
    "SECRET_KEY": f"${KEY}#=$a",
    "ALLOWED_HOSTS": " a.com, b.com",
    "CSRF_TRUSTED_ORIGINS": "https://a.com, https://b.com",
    "DEFAULT_FROM_EMAIL": "$x@example.com",
    "FLOWER_BASIC_AUTH": "$admin:$pw",
    "TASK_TIME_LIMIT": "500 ",
    "DEBUG": "True",
    "EMAIL_HOST_PASSWORD": "#$a",
    "CELERY_BROKER_URL": "redis://:$a@h:6379/0",
}
SETTINGS = {key: value for key, value in WRITTEN.items() if key != "TASK_TIME_LIMIT"} | {
    "ALLOWED_HOSTS": ["a.com", "b.com"],
    "CSRF_TRUSTED_ORIGINS": ["https://a.com", "https://b.com"],
    "CELERY_TASK_TIME_LIMIT": 500,
    "DEBUG": True,
}
SHOW = f"""
from django.conf import settings
found = {{name: getattr(settings, name) for name in {[*SETTINGS]}}}
assert found == {SETTINGS}, found
"""


@plain_output
def test_a_variable_of_the_environment_keeps_its_value(project):
    project.manage("shell", "-v0", "-c", SHOW, **WRITTEN)


@plain_output
def test_a_variable_of_dotenv_keeps_its_value(copied):
    lines = copied.read(".env").splitlines()
    kept = [line for line in lines if line.partition("=")[0] not in WRITTEN]
    written = [f"{name}={value}" for name, value in WRITTEN.items()]
    (copied / ".env").write_text("\n".join([*kept, *written, ""]))
    copied.manage("shell", "-v0", "-c", SHOW)


CONNECT = """
import socket
from django.core.mail import get_connection
with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    get_connection(host="127.0.0.1", port=port, timeout=1, fail_silently=True).open()
    print("received", server.accept()[0].recv(1))
"""
SMTP = "django.core.mail.backends.smtp.EmailBackend"


@plain_output
def test_a_mail_server_may_expect_tls_at_once(project):
    """As on port 465. A client's first byte is then 0x16; otherwise, it waits for a greeting."""
    variables = {"EMAIL_BACKEND": SMTP, "EMAIL_USE_SSL": "True"}
    assert project.shell(CONNECT, **variables) == r"b'\x16'"


@plain_output
def test_an_email_api_needs_no_mail_server(project):
    variables = {**project.production(), "EMAIL_HOST": "", "DEBUG": "False"}
    project.manage("check", **variables, EMAIL_BACKEND="anymail.backends.postmark.EmailBackend")


@plain_output
def test_flower_reads_dotenv_too(copied, addresses, tmp_path):
    """It only shows tasks, and keeps its history when it restarts."""
    copied.append(".env", "FLOWER_READ_ONLY=True\nFLOWER_PERSISTENT=True\n")
    [port] = free_ports(1)
    variables = {**addresses, "FLOWER_PORT": port, "FLOWER_BASIC_AUTH": "admin:secret"}
    command, log = "celery -A config flower", tmp_path / "flower.log"
    ready = {"is_ready": lambda: connects(port)}
    with started(copied.process(command, log, **ready, **variables)) as [flower]:
        url = f"http://127.0.0.1:{port}/api/task/revoke/1"
        assert fetch(url, {}, auth=("admin", "secret"))[0] == 403
        flower.stop()
    assert [*copied.glob(".data/flower*")]


LOGIN_PAGE = """
from django.test import Client
answer = Client(HTTP_HOST="localhost").get("/login/")
print(*answer.cookies, answer["Content-Security-Policy"], sep=";")
"""


@both_outputs
def test_projects_share_no_cookies_and_forms_may_redirect_to_another_site(project):
    """Browsers send cookies to all ports of a host. `form-action` would also hold for redirects."""
    printed = project.manage("shell", "-v0", "-c", LOGIN_PAGE)
    assert project.name in printed.split(";")[0]
    assert "default-src" in printed and "form-action" not in printed


WINDOWS = """
import os, signal
for name in "SIGKILL SIGHUP SIGPIPE SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGQUIT SIGTSTP".split():
    delattr(signal, name)
for name in "fork setsid getuid geteuid getpgid killpg setuid register_at_fork".split():
    delattr(os, name)
os.environ["DJANGO_SETTINGS_MODULE"] = "config.settings"
import config.wsgi, config.asgi, config.urls, dev
from django.core.management import call_command
call_command("check", fail_level="WARNING")
"""


@both_outputs
def test_web_servers_and_commands_start_without_what_windows_lacks(project):
    project.call(".venv/bin/python", "-c", WINDOWS)


@plain_output
def test_the_level_of_the_log_holds_for_django_too(project):
    code = """
import logging
print(*(n for n in (20, 30, 40) if logging.getLogger("django.x").isEnabledFor(n)), sep=",")
"""
    assert project.shell(code, LOG_LEVEL="ERROR") == "40"
    assert project.shell(code, LOG_LEVEL="DEBUG") == "20,30,40"


LOG_IN = """
from django.test import Client
from users.models import User
User.objects.create_user("tea@example.com", "secret")
client = Client(HTTP_HOST="localhost")
answer = client.post("/login/", {"username": "tea@example.com", "password": "secret"})
print(answer.status_code, answer.get("Location"))
"""


@both_outputs
def test_users_may_log_in_by_email(copied):
    """With the files of docs/users.md."""
    page = (TEMPLATE / "docs/users.md").read_text("utf-8")
    (copied / "users/models.py").write_text(code(page, "class User("))
    (copied / "users/admin.py").write_text(code(page, "UserAdmin("))
    (copied / "users/migrations/0001_initial.py").unlink()
    database = {"DATABASE_URL": f"sqlite:///{copied}/own.sqlite3"}
    copied.manage("makemigrations", "users", **database)
    copied.manage("migrate", "-v0", **database)
    assert copied.manage("shell", "-v0", "-c", LOG_IN, DEBUG="True", **database) == "302 /\n"
    copied.call(".venv/bin/python", "-m", "pytest", "-q", "-m", "not live", **database)
    command = copied.services()["migrate"]["command"][-1].replace("$$", "$")  # of `make up`
    own = {"DATABASE_URL": f"sqlite:///{copied}/second.sqlite3", "DEBUG": "True"}
    for _ in range(2):
        printed = copied.call("sh", "-ec", command, PATH=copied.search_path, **own)
        assert "demo@example.com / " in printed
    if service := copied.services().get("prometheus-token"):
        make_token = service["command"][-1].replace("/token/prometheus", str(copied / "token"))
        copied.manage("shell", "-v0", "-c", make_token, **database)
        assert (copied / "token").read_text()


@plain_output
def test_the_web_server_reads_dotenv_too(copied):
    (copied / ".env").write_text(copied.read(".env") + "WEB_CONCURRENCY=3\n")
    printed = copied.call(".venv/bin/gunicorn", "--print-config", "config.wsgi")
    assert re.search(r"^workers +.*= 3$", printed, re.MULTILINE)


@outputs({**DEFAULTS, "result_backend": "database"})
def test_a_variable_that_overrides_the_settings_is_found(project):
    command = ["check", "--deploy", "--fail-level", "WARNING"]
    variables = {**project.production(), "DEBUG": "False", "FLOWER_BASIC_AUTH": "a:secret"}
    project.manage(*command, **variables)
    with pytest.raises(AssertionError, match="celery_steady.W005"):
        project.manage(*command, **variables, CELERY_RESULT_BACKEND="redis://h/1")


@both_outputs
def test_every_host_gets_an_answer_of_the_health_checks_and_of_nothing_else(project):
    code = """
from django.test import Client
hosts = ["10.0.0.7:8000", "a_b", "[::1]:8000", "evil.example"]
paths = ["/health/live", "/health/ready", "/login/"]
answers = ((path, Client().get(path, headers={"host": h})) for path in paths for h in hosts)
print(sorted({(path, response.status_code) for path, response in answers}))
"""
    variables = {"DEBUG": "False", "ALLOWED_HOSTS": "example.com"}
    expected = [("/health/live", 200), ("/health/ready", 200), ("/login/", 400)]
    assert str(expected) in project.manage("shell", "-v0", "-c", code, **variables)


@both_outputs
def test_a_browser_that_asks_for_an_icon_causes_no_error(project):
    """The pages of the admin name none."""
    code = "from django.test import Client; print(Client().get('/favicon.ico').status_code)"
    assert project.shell(code, DEBUG="True", ALLOWED_HOSTS="testserver") == "204"


@both_outputs
def test_the_projects_own_tests_are_not_in_the_flower_of_make_run(project):
    with project.up() as site:
        project.call("make", "test", ARGS="-m live", **site.environment)
        time.sleep(2)  # for an event that is still under way
        assert "test_project" not in str(site.ask_flower("/api/tasks"))


RESULTS = """
from celery import shared_task
from celery.result import AsyncResult


@shared_task(bind=True)
def count(self):
    self.update_state(state="PROGRESS", meta={"done": 1})
    return 7


def test_a_result(db):
    assert AsyncResult(count.delay().id).result == 7
"""


@both_outputs
def test_results_of_plain_tasks_stay_in_the_process_of_a_test(copied):
    """Here, no server answers. Otherwise they would go to that of `make run`."""
    (copied / "tests/test_results.py").write_text(RESULTS)
    pytest = ".venv/bin/python", "-m", "pytest", "-q", "tests/test_results.py"
    copied.call(*pytest, **copied.free_servers())


LOGIN = """
def test_login(db, client, django_user_model):
    user = django_user_model.objects.create_user("somebody", password="secret")
    assert client.login(username=user.get_username(), password="secret")
"""


@both_outputs
def test_a_test_may_log_in_with_a_password(copied):
    """django-axes wants a request, which Django's client does not pass."""
    (copied / "tests/test_login.py").write_text(LOGIN)
    copied.call(".venv/bin/python", "-m", "pytest", "-q", "tests/test_login.py")


@plain_output
def test_requests_reuse_connections_where_they_can(project):
    """Not under ASGI, where each would leave one, and beside Django's own pool it may not."""
    url = "postgres://user:password@host/name"
    code = """
import {module}
from django.conf import settings
database = settings.DATABASES["default"]
print(f"{{database['CONN_MAX_AGE']}} {{database['OPTIONS'].get('pool')}}")
"""
    expected = {("config.wsgi", url): "60 None", ("config.asgi", f"{url}?pool=True"): "0 True"}
    for (module, address), words in expected.items():
        command = ".venv/bin/python", "-c", code.format(module=module)
        variables = {"PYTHONPATH": project, "DATABASE_URL": address}
        assert project.call(*command, **variables) == f"{words}\n"


TASKS = """

@shared_task(rate_limit="1/m")
def call_api():
    pass


@shared_task(rate_limit="1/m", queue="own")
def call_alone():
    pass


@shared_task(queue="nowhere")
def call_nobody():
    pass
"""


@both_outputs
def test_tasks_that_would_wait_are_found(copied):
    copied.append("orders/tasks.py", TASKS)
    copied.append("config/settings.py", 'CELERY_TASK_QUEUES += [Queue("own")]\n')
    code = """
from django.core.checks import run_checks
print(sorted(each.id + each.msg.split("orders.tasks.")[1].split()[0] for each in run_checks()))
"""
    found = {
        "no": ["celery_steady.E001call_nobody", "celery_steady.W001call_api"],
        "yes": ["celery_steady.W001call_api", "durable_jobs.W005call_nobody"],
    }[copied.answers["durable_jobs"]]
    assert str(found) in copied.manage("shell", "-v0", "-c", code)


@both_outputs
def test_an_idle_worker_sends_redis_few_commands(project, tmp_path):
    """Some providers bill each. Looking for lost tasks each second quadruples them."""
    redis = Redis(tmp_path / "redis")
    variables = redis.variables | {"VISIBILITY_SECONDS": 120}  # the default
    command = "celery -A config worker --concurrency 1"
    worker = project.process(command, tmp_path / "log", says=" ready.", **variables)

    def count():
        return int(re.search(r"total_commands_processed:(\d+)", redis.cli("info", "stats"))[1])

    with started(redis, worker):
        time.sleep(35)  # in its first 30 seconds, it looks for senders that ring no bell
        before = count()
        time.sleep(20)
        assert count() - before < 80
