"""The fixtures and plugins of an output, and a fixture for gevent."""

import runpy

import pytest
from django.contrib.auth.models import Permission
from django.db import connection, connections
from rest_framework.test import APIClient
from settings import OUTPUT

from jobs.pools import pool

fixtures = runpy.run_path(str(OUTPUT / "conftest.py"))
globals().update({name: fixtures[name] for name in fixtures if not name.startswith("__")})


@pytest.fixture(autouse=True)
def one_connection(monkeypatch):
    """Query in the test's own thread: gevent's native threads do not see its transaction."""
    monkeypatch.setattr(pool, "query", lambda function, *args, **kw: function(*args, **kw))


class ReplicaRouter:
    def db_for_read(self, model, **hints):
        return "replica"

    def db_for_write(self, model, **hints):
        return "default"


@pytest.fixture
def replica(transactional_db, settings):
    """A second connection to the database, to which a router sends all reads.

    It cannot write, and waits one second for a lock.
    """
    read_only = {
        "postgresql": {"options": "-c default_transaction_read_only=on -c lock_timeout=1s"},
        "sqlite": {"init_command": "PRAGMA query_only=1", "timeout": 1},
    }[connection.vendor]
    options = connection.settings_dict["OPTIONS"] | read_only
    connections.databases["replica"] = connection.settings_dict | {"OPTIONS": options}
    connections["replica"].connect()  # Django's test case refuses to do it later
    settings.DATABASE_ROUTERS = [ReplicaRouter()]
    yield
    connections["replica"].close()
    del connections["replica"], connections.databases["replica"]


@pytest.fixture
def staff(db, django_user_model):
    """A function that logs in a staff user with these permissions for jobs, such as "view"."""

    def log_in(*actions):
        user = django_user_model.objects.create_user("staff" + "".join(actions), is_staff=True)
        codenames = [f"{action}_job" for action in actions]
        user.user_permissions.set(Permission.objects.filter(codename__in=codenames))
        client = APIClient()
        client.force_login(user)
        return client

    return log_in
