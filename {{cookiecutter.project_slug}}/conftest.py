"""Fixtures. Jobs run in the test's own process, as soon as they are published."""

import pytest
from celery import current_app
from celery.exceptions import OperationalError
from django.core.cache import cache
from rest_framework.test import APIClient

from jobs import lease, messages, models, sweep


@pytest.fixture(autouse=True)
def eager(request, monkeypatch):
    """No worker and no broker, but for tests marked `live`: who publishes a job runs it."""
    current_app.conf.task_always_eager = not request.node.get_closest_marker("live")
    current_app.conf.task_eager_propagates = True  # a plain task that fails fails its test
    # No thread renews leases: it would not see what the transaction of a test holds.
    monkeypatch.setattr(lease, "lease_thread_started", True)
    for memory in [models.publish_again_at, sweep.queues, sweep.refusals]:
        memory.clear()
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0)


@pytest.fixture(autouse=True)
def quick_settings(settings):
    # Throttles count in the cache: they start anew, and leave alone what is at your CACHE_URL.
    settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    cache.clear()
    memory = {"BACKEND": "django.core.files.storage.InMemoryStorage"}  # of uploads
    settings.STORAGES = {**settings.STORAGES, "default": memory}
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # quick
    settings.WHITENOISE_AUTOREFRESH = True  # does without `manage.py collectstatic`


@pytest.fixture
def commit(db, django_capture_on_commit_callbacks):
    """`with commit():` does what a commit does: it publishes, and so runs, what was enqueued.

    Without it a test stays in its transaction, and jobs stay queued until it calls publish([job]).
    """
    return lambda: django_capture_on_commit_callbacks(execute=True)


@pytest.fixture
def run_jobs(db):
    """run_jobs() runs what is queued, and what that enqueues, without waiting for countdowns."""
    queued = models.Job.objects.filter(state="queued").order_by("created_at")

    def run():
        ran = set()  # no try twice: a test may have a broker that takes no jobs
        while tries := set(queued.values_list("pk", "retries")) - ran:
            ran |= tries
            for job in queued.filter(pk__in=[pk for pk, _ in tries]):
                models.publish([job])

    return run


@pytest.fixture
def broker_down(monkeypatch):
    """Refuse every message. Returns the list of those that were tried."""
    tried = []

    def refuse(task, job, producer, **options):
        tried.append(str(job.pk))
        raise OperationalError("connection refused")

    monkeypatch.setattr(messages, "send_one", refuse)
    return tried


@pytest.fixture
def user(db, django_user_model):
    return django_user_model.objects.create_user("user", "user@example.com")


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
