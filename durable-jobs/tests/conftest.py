"""The fixtures that several files use."""

import uuid
from collections import defaultdict
from threading import get_ident
from time import perf_counter

import pytest
from celery import current_app as app
from celery.states import RETRY
from django.contrib.auth.models import Permission
from django.core.cache import cache
from django.db import OperationalError, connection, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import QuerySet
from django.db.models.signals import post_migrate
from django.utils import timezone
from helpers import add, broken, greet, multiply, sweeper
from rest_framework.test import APIClient
from versions import skip_on_older_versions

from durable_jobs import admission, batches, database, messages, transitions
from durable_jobs.beat import republish
from durable_jobs.beat import sweeper as sweeper_module
from durable_jobs.eager import run
from durable_jobs.models import Job
from durable_jobs.pools import pool
from durable_jobs.worker import lease

pytest_plugins = ["durable_jobs.testing"]
SEND_ONE = messages.send_one


def pytest_collection_modifyitems(items):
    skip_on_older_versions(items)


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup):
    """After each test with real transactions, Django would store all permissions again."""
    post_migrate.disconnect(dispatch_uid="django.contrib.auth.management.create_permissions")


@pytest.fixture(autouse=True)
def quick_settings(settings):
    cache.clear()
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@pytest.fixture
def user(db, django_user_model):
    return django_user_model.objects.create_user("user@example.com", "user@example.com")


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


@pytest.fixture(autouse=True)
def one_connection(monkeypatch):
    """Query in the test's own thread: gevent's native threads do not see its transaction."""
    monkeypatch.setattr(pool, "query", lambda function, *args, **kw: function(*args, **kw))


@pytest.fixture(autouse=True)
def no_renewals(monkeypatch):
    """No thread renews leases: it would write while a test does, and keep its connection."""
    monkeypatch.setattr(lease, "start_thread", lambda: None)


@pytest.fixture(autouse=True)
def no_memory():
    """Another test's keys have the same names."""
    admission.handed_over.clear()


@pytest.fixture(autouse=True)
def no_ties(monkeypatch):
    """Let no two jobs have the same time: on SQLite the clock has milliseconds."""
    if connection.vendor == "sqlite":
        insert = transitions.store

        def insert_later(*args):
            until = perf_counter() + 0.001
            while perf_counter() < until:  # sleep() would let another greenlet wait for the lock
                pass
            return insert(*args)

        monkeypatch.setattr(transitions, "store", insert_later)


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


@pytest.fixture
def published(monkeypatch):
    """A broker without workers: a list of ids, one for each message in it.

    To lose a message, remove its id.
    """
    waiting = []

    def publish(job, producer, **options):
        waiting.append(str(job.pk))

    monkeypatch.setattr(messages, "send_one", publish)
    monkeypatch.setattr(republish, "messages_in", lambda queue, broker: len(waiting))
    return waiting


@pytest.fixture
def sent(monkeypatch):
    """The ids of the jobs whose messages were sent. No worker takes them."""
    ids = []
    monkeypatch.setattr(messages, "send_one", lambda job, *args, **options: ids.append(job.pk))
    monkeypatch.setattr(republish, "messages_in", lambda *args: len(ids))
    return ids


@pytest.fixture
def backlog():
    """Thousands of queued, running and final jobs, and statistics from a quiet hour before.

    All rows are in one transaction, so that no autovacuum sees them and updates the statistics.
    """
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL plans with statistics: set DATABASE_URL=postgres://…")
    now = timezone.now()
    final = {"state": "succeeded", "finished_at": now}
    waits = {"state": "queued", "send_at": now}
    runs = {"state": "running", "lease_ends_at": now, "run_token": uuid.UUID(int=1)}
    fields = {"task": add.name, "queue": "celery", "created_at": now}
    multiply(Job.objects.create(**fields, **final), 100)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE durable_jobs_job")
    for state in waits, runs, final:
        job = Job.objects.create(**fields, **state)
        multiply(job, 3000, unique_key="gen_random_uuid()::text")


@pytest.fixture(autouse=True)
def worker(no_broker, monkeypatch):
    """A worker that takes each message at once, in the thread that has sent it."""
    messages_of = defaultdict(list)  # of each thread

    def send_one(job, producer, **options):
        waiting = messages_of[get_ident()]
        waiting.append(job)
        if len(waiting) == 1:  # otherwise a job of this worker has sent it
            try:
                for each in waiting:
                    ended = run(each).info
                    if ended and ended.state == RETRY:  # wait for no countdown
                        each.refresh_from_db()
                        waiting.append(each)
            finally:
                waiting.clear()

    monkeypatch.setattr(messages, "send_one", send_one)


@pytest.fixture
def broker(worker, monkeypatch):
    """Messages go to a broker without workers. Plain tasks do so, too."""
    monkeypatch.setattr(messages, "send_one", SEND_ONE)
    app.conf.task_always_eager = False


@pytest.fixture
def commit(db, django_capture_on_commit_callbacks):
    """At the end of `with commit():` the enqueued jobs are published, as after a commit: they run.

    The transaction of a test never commits: without this, jobs stay queued.
    """
    return lambda: django_capture_on_commit_callbacks(execute=True)


@pytest.fixture
def batch(user):
    """A batch with two jobs, which have not started."""
    return batches.enqueue([greet.s("Ada"), greet.s("Bo")], owner=user, label="Greetings")


@pytest.fixture
def lost_answers(monkeypatch):
    """A list: with True in it, the answer of the next COMMIT is lost with its connection."""
    lost, commit = [], BaseDatabaseWrapper._commit

    def _commit(self):
        commit(self)
        if lost and lost.pop():
            self.connection.close()
            raise OperationalError("the connection is lost")

    monkeypatch.setattr(BaseDatabaseWrapper, "_commit", _commit)
    monkeypatch.setattr(database.time, "sleep", lambda seconds: None)
    return lost


@pytest.fixture(autouse=True)
def new_test(monkeypatch):
    """Nothing is left of the test before, and the sweeper does not wait for renewals."""
    broken.clear()
    sweeper.__init__(sweeper.tick_delay)
    monkeypatch.setattr(sweeper_module, "POLL_SECONDS", 0)


@pytest.fixture
def update_errors(monkeypatch):
    """A list of errors. Each UPDATE of jobs raises the last one and removes it."""
    update, errors = QuerySet.update, []

    def fail(self, **changes):
        if errors:
            raise errors.pop()
        return update(self, **changes)

    monkeypatch.setattr(QuerySet, "update", fail)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return errors
