{% from "chosen.jinja" import servers, has_flower with context %}
"""The project around the jobs: settings, checks, API, pages, login, log and probes."""

import runpy
import uuid

import pytest
import structlog
from axes.helpers import get_client_ip_address
from axes.models import AccessAttempt, AccessLog
from django.core.cache.backends.base import BaseCache
from django.core.cache.backends.locmem import LocMemCache
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connection
from django.test import RequestFactory
from django_structlog.middlewares import RequestMiddleware
from rest_framework.decorators import api_view
from rest_framework.response import Response
from rest_framework.test import APIClient, APIRequestFactory, force_authenticate

from config import urls
from config.api import Throttle
from config.celery import use_settings_of_pool

pytestmark = pytest.mark.django_db


def test_the_user_model_is_the_projects_own_and_in_the_admin(admin_client, user):
    assert user._meta.label == "users.User"
    assert "user@example.com" in admin_client.get("/admin/users/user/").content.decode()


@pytest.mark.parametrize("rate", ["lots", "0/min", "10", "10/fortnight"])
def test_an_invalid_throttle_is_refused_at_startup(settings, monkeypatch, rate):
    monkeypatch.setenv("THROTTLE", rate)
    with pytest.raises(ImproperlyConfigured, match=f"THROTTLE={rate}: write"):
        runpy.run_path(settings.BASE_DIR / "config/settings.py")


def test_times_are_in_the_zone_of_the_environment(settings, monkeypatch):
    monkeypatch.setenv("TIME_ZONE", "Asia/Tokyo")
    values = runpy.run_path(settings.BASE_DIR / "config/settings.py")
    assert values["TIME_ZONE"] == values["CELERY_TIMEZONE"] == "Asia/Tokyo"


def test_a_worker_of_a_pool_without_settings_is_refused(settings):
    settings.WORKER_POOLS = {"prefork": {}, "threads": {}}
    with pytest.raises(SystemExit, match="not made for solo. Its pools are prefork, threads"):
        use_settings_of_pool(conf={}, options={"pool": "solo"})


def found(identity):
    """Return what the checks of config/checks.py say under this id."""
    return [each for each in run_checks(include_deployment_checks=True) if each.id == identity]


class WithoutPackage(BaseCache):
    def __init__(self, location, params):
        super().__init__(params)

    @property
    def _cache(self):
        raise ImportError("No module named 'client'", name="client")


def test_the_checks_find_a_cache_whose_package_is_missing(settings):
    assert not found("config.E001")
    settings.CACHES = {"default": {"BACKEND": f"{__name__}.WithoutPackage"}}
    [error] = found("config.E001")
    assert "`uv add client`" in error.hint


def test_the_checks_find_a_cache_for_which_a_request_would_wait_without_end(settings):
    assert not found("config.W001")
    cache = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache", "LOCATION": "host:1"}
    settings.CACHES = {"default": cache}
    assert found("config.W001")
    settings.CACHES = {"default": {**cache, "OPTIONS": {"connect_timeout": 1}}}
    assert not found("config.W001")


def test_the_checks_find_a_time_limit_after_which_the_broker_redelivers(settings):
    assert not found("config.W002")
    settings.REDELIVERY_SECONDS = settings.CELERY_TASK_TIME_LIMIT
    assert found("config.W002")


{% if has_flower %}
@pytest.mark.parametrize("users", ["", "admin", "admin:", "admin:change-me", "me:secret,admin:"])
def test_the_checks_find_a_flower_without_a_password(settings, users):
    settings.FLOWER_BASIC_AUTH = "me:secret"
    assert not found("config.E002")
    settings.FLOWER_BASIC_AUTH = users
    assert found("config.E002")


{% endif %}
{% for server in servers %}
{% print server.check_tests | default %}
{% endfor %}
# The API


def echo(user, *args, **kwargs):
    """Return the response of a view that answers with the data of this POST."""
    view = api_view(["POST"])(lambda request: Response(request.data))
    request = APIRequestFactory().post("/", *args, **kwargs)
    force_authenticate(request, user)
    return view(request)


def test_a_test_posts_json_without_saying_so(user):
    assert echo(user, {"product": "Tea"}).data == {"product": "Tea"}


def test_json_that_is_nested_too_deeply_is_refused(user):
    response = echo(user, "[" * 100_000, content_type="application/json")
    assert response.status_code == 400


def test_requests_are_limited_unless_the_cache_is_unavailable(api, monkeypatch):
    def refuse(*args):
        raise ConnectionError("connection refused")

    monkeypatch.setitem(Throttle.THROTTLE_RATES, "user", "1/min")
    monkeypatch.setattr(Throttle, "count_again_at", 0.0)
    assert [api.get("/api/jobs/").status_code for _ in range(2)] == [200, 429]
    monkeypatch.setattr(LocMemCache, "get", refuse)
    assert api.get("/api/jobs/").status_code == 200


def test_the_openapi_document_describes_errors(api):
    document = api.get("/api/schema/", headers={"Accept": "application/json"}).json()
    for operations in document["paths"].values():
        for operation in operations.values():
            assert {"401", "403", "406"} <= set(operation["responses"])
            assert "Retry-After" in operation["responses"]["429"]["headers"]


def test_the_pages_escape_the_name_of_the_project(client, user, monkeypatch):
    for page in urls.page, urls.login_page:
        for name in "site_header", "site_title":
            monkeypatch.setitem(page, name, "<b>Tea & Co</b>")
    assert client.get("/").status_code == 302
    login = client.get("/login/").content.decode()
    client.force_login(user)
    for page in login, client.get("/").content.decode():
        assert "&lt;b&gt;Tea &amp; Co&lt;/b&gt;" in page
        assert "<b>" not in page


def test_the_page_has_a_button_for_each_view_that_starts_a_job(client, user, monkeypatch):
    monkeypatch.setitem(urls.page, "buttons", {"Build it": "/api/builds/"})
    client.force_login(user)
    button = '<button type="button" data-url="/api/builds/">Build it</button>'
    assert button in client.get("/").content.decode()


def test_only_staff_see_the_links_for_staff(client, admin_client, user):
    client.force_login(user)
    for label, url in urls.page["staff_links"].items():
        link = f'<a href="{url}">{label}</a>'.encode()
        assert link in admin_client.get("/").content
        assert link not in client.get("/").content


def test_the_login_redirects_to_the_jobs(client, user):
    user.set_password("secret")
    user.save()
    response = client.post(
        "/login/", {"username": user.get_username(), "password": "secret"}, follow=True
    )
    assert response.request["PATH_INFO"] == "/"
    assert b'data-jobs-url="/api/jobs/"' in response.content
    assert client.get("/login/").url == "/"


@pytest.mark.parametrize("url", ["/login/", "/admin/login/"])
def test_an_address_that_guesses_passwords_is_locked_out(client, user, url, settings, caplog):
    user.is_staff = True
    user.set_password("secret")
    user.save()

    def log_in(password, address="192.0.2.1"):
        data = {"username": user.get_username(), "password": password}
        return client.post(url, data, REMOTE_ADDR=address).status_code

    for guess in range(settings.AXES_FAILURE_LIMIT - 1):
        assert log_in(guess) == 200
    assert "login failure" in caplog.text
    assert log_in("the last one") == 429
    assert log_in("secret") == 429
    assert log_in("secret", "192.0.2.2") == 302
    attempt = AccessAttempt.objects.get()
    assert attempt.failures_since_start == settings.AXES_FAILURE_LIMIT
    attempt.attempt_time -= settings.AXES_COOLOFF_TIME
    attempt.save()
    assert log_in("secret") == 302
    assert not AccessLog.objects.exists()


@pytest.mark.parametrize(
    "proxies, believed", [(0, "192.0.2.9"), (1, "192.0.2.2"), (2, "192.0.2.1")]
)
def test_a_client_cannot_choose_its_address(settings, monkeypatch, proxies, believed):
    """The client sent 192.0.2.0. Proxy 1 appended .1, proxy 2 appended .2. Proxy 2 itself has .9."""
    monkeypatch.setenv("NUM_PROXIES", str(proxies))
    values = runpy.run_path(settings.BASE_DIR / "config/settings.py")
    for name in ["REST_FRAMEWORK", *(name for name in values if name.startswith("IPWARE_"))]:
        setattr(settings, name, values[name])
    settings.AXES_IPWARE_META_PRECEDENCE_ORDER = settings.IPWARE_META_PRECEDENCE_ORDER
    headers = {"X-Forwarded-For": "192.0.2.0, 192.0.2.1, 192.0.2.2", "X-Real-IP": "192.0.2.0"}
    request = RequestFactory().get("/", headers=headers, REMOTE_ADDR="192.0.2.9")
    RequestMiddleware.bind_ip(request)
    assert structlog.contextvars.get_contextvars()["ip"] == believed  # in the log
    assert get_client_ip_address(request) == believed  # at the login
    assert Throttle().get_ident(request) == believed


@pytest.mark.parametrize("proxies", [0, 1])
def test_only_a_proxy_says_that_a_request_came_over_https(settings, monkeypatch, proxies):
    monkeypatch.setenv("NUM_PROXIES", str(proxies))
    values = runpy.run_path(settings.BASE_DIR / "config/settings.py")
    settings.SECURE_PROXY_SSL_HEADER = values.get("SECURE_PROXY_SSL_HEADER")
    request = RequestFactory().get("/", headers={"X-Forwarded-Proto": "https"})
    assert request.is_secure() == bool(proxies)


def test_only_probes_and_metrics_are_answered_over_plain_http(staff_api, settings):
    settings.SECURE_SSL_REDIRECT = True
    for url in "/health/live", "/health/ready", "/metrics":
        assert staff_api.get(url).status_code == 200
    for url in "/", "/api/jobs/", "/metrics/":
        assert staff_api.get(url).status_code == 301


@pytest.mark.parametrize("url", ["/", "/login/", "/admin/", "/api/docs/"])
def test_a_page_runs_only_the_projects_own_scripts(admin_client, url):
    if url == "/login/":
        admin_client.logout()
    response = admin_client.get(url)
    assert response.status_code == 200
    assert "default-src 'self'" in response["Content-Security-Policy"]
    assert "script-src" not in response["Content-Security-Policy"]
    assert b"<script>" not in response.content


def test_the_log_has_no_line_for_each_poll_and_probe(api, staff_api, caplog):
    caplog.set_level("INFO")
    for url in "/api/jobs/", "/api/jobs/?state=failed", "/health/live", "/health/ready", "/metrics":
        assert staff_api.get(url).status_code == 200
    assert not caplog.records
    api.get(f"/api/jobs/{uuid.uuid4()}/")
    api.get("/api/schema/")
    assert [record.msg["code"] for record in caplog.records] == [404, 200]


def test_an_event_of_your_own_may_have_any_name(caplog):
    caplog.set_level("INFO")
    for event in "request_finished", "task_enqueued":
        structlog.get_logger("shop").info(event, total=3)
    assert len(caplog.records) == 2


def test_the_log_has_one_traceback_for_a_failure(api, caplog, monkeypatch):
    api.raise_request_exception = False
    monkeypatch.setattr("durable_jobs.views.JobViewSet.get_queryset", lambda view: 1 / 0)
    assert api.get("/api/jobs/").status_code == 500
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.msg["event"] == "request_failed"


def test_the_probes_answer_without_login_and_without_broker(client, broker_down):
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 200


def test_without_a_database_the_web_is_alive_but_not_ready(client, monkeypatch):
    def refuse(*args):
        raise OperationalError("connection refused")

    monkeypatch.setattr(connection, "cursor", refuse)
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 503


def test_the_schema_requires_a_login():
    assert APIClient().get("/api/schema/").status_code == 401
    assert APIClient().get("/api/docs/").status_code == 302
