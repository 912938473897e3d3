{% from "chosen.jinja" import has_results with context %}
"""Fixtures of the project's tests. `delay()` runs a task immediately, without a broker."""

{% if has_results %}
import os

{% endif %}
import pytest
from django.core.cache import cache
from kombu.exceptions import OperationalError
from rest_framework.test import APIClient

from config.celery import app

{% if has_results %}
os.environ["CELERY_RESULT_BACKEND"] = "cache+memory://"  # Celery prefers it to the settings
app.conf.update(task_always_eager=True, task_store_eager_result=True)
{% else %}
app.conf.task_always_eager = True
{% endif %}


@pytest.fixture(autouse=True)
def quick_settings(settings):
    # Throttles count in the cache. Each test has an empty one and leaves your CACHE_URL alone.
    settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    cache.clear()
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # fast
    settings.AXES_ENABLED = False  # it needs a request, which client.login() has not
    settings.STORAGES = {
        "default": {"BACKEND": "django.core.files.storage.InMemoryStorage"},  # uploads
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }
    settings.WHITENOISE_AUTOREFRESH = True  # works without `manage.py collectstatic`


@pytest.fixture
def broker_down(monkeypatch):
    """A broker that refuses every message."""

    def refuse(*args, **kwargs):
        raise OperationalError("connection refused")

    monkeypatch.setitem(app.conf, "task_always_eager", False)
    monkeypatch.setattr(type(app), "send_task", refuse)


@pytest.fixture
def user(db, django_user_model):
    name, email = django_user_model.USERNAME_FIELD, "user@example.com"
    return django_user_model.objects.create_user(**{name: email, "email": email})


@pytest.fixture
def api(user):
    """A client of the API, logged in as `user`."""
    client = APIClient()
    client.force_login(user)
    return client


@pytest.fixture
def admin_api(admin_user):
    client = APIClient()
    client.force_login(admin_user)
    return client
