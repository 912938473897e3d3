{% from "chosen.jinja" import has_results with context %}
"""Fixtures of the project's tests."""

{% if has_results %}
import os

{% endif %}
import pytest
from django.core.cache import cache
from rest_framework.test import APIClient
{% if has_results %}

from config.celery import app
{% endif %}

pytest_plugins = ["durable_jobs.testing"]  # jobs run in the test's own process
{% if has_results %}
# The results of plain tasks. Celery prefers this variable to the settings.
os.environ["CELERY_RESULT_BACKEND"] = "cache+memory://"
app.conf.task_store_eager_result = True
{% endif %}


@pytest.fixture(autouse=True)
def quick_settings(settings):
    # Throttles count in the cache. Each test has an empty one and does not use your CACHE_URL.
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
def staff_api(admin_user):
    client = APIClient()
    client.force_login(admin_user)
    return client
