"""Fixtures of the project's tests."""

import pytest
from django.core.cache import cache
from rest_framework.test import APIClient

pytest_plugins = ["durable_jobs.testing"]  # jobs run in the test's own process


@pytest.fixture(autouse=True)
def quick_settings(settings):
    # Throttles count in the cache. Each test has an empty one and does not use your CACHE_URL.
    settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    cache.clear()
    memory = {"BACKEND": "django.core.files.storage.InMemoryStorage"}  # for uploads
    settings.STORAGES = {**settings.STORAGES, "default": memory}
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # fast
    settings.WHITENOISE_AUTOREFRESH = True  # works without `manage.py collectstatic`


@pytest.fixture
def user(db, django_user_model):
    name, email = django_user_model.USERNAME_FIELD, "user@example.com"
    return django_user_model.objects.create_user(**{name: email, "email": email})


@pytest.fixture
def api(user):
    """A client of the API that `user` is logged in to."""
    client = APIClient()
    client.force_login(user)
    return client


@pytest.fixture
def staff_api(admin_user):
    client = APIClient()
    client.force_login(admin_user)
    return client
