"""Migrations. Projects have run them, so each change of a table needs a new one."""

import hashlib

import pytest
from django.core.management import call_command
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.utils import timezone
from settings import OUTPUT

# Of published migrations. Add the digest of a new one once it is on main.
DIGESTS = {
    "0001_initial.py": "710ed48011bc7b601144dc9e302619731dd015ccba7320fbab36105fd0c0833e",
    "0002_attempt.py": "5aff057e13576e14c45a4ec56f8d70f1cf7d4ae9a176decf528a5f57031b6a30",
    "0003_sweep_tick_due_at.py": "9fef9d19b1909a1e8b73d39d22bbdc6e0fd703b4f411ab3f4b7971a8a9809fb0",
    "0004_label_and_reason.py": "f1dfc63595fa7721de7a0c0e7a02fda625326340acc9d7f309a31427fd58fdfb",
    "0005_schedule_errors.py": "fcdd2b6a692ac7ec749d1c75ec5635ba055ee569786ea11aa1f2a1bac0b76d43",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_a_migration_is_not_rewritten(name):
    text = (OUTPUT / "jobs/migrations" / name).read_bytes()
    assert hashlib.sha256(text).hexdigest() == DIGESTS[name], "write a new migration instead"


def test_the_models_have_no_change_without_a_migration(db):
    call_command("makemigrations", "jobs", check=True, dry_run=True)


@pytest.fixture
def migrate(transactional_db):
    """A function that migrates to this migration and returns its get_model()."""

    def migrate(name):
        executor = MigrationExecutor(connection)
        executor.migrate([("jobs", name)])
        return executor.loader.project_state([("jobs", name)]).apps.get_model

    yield migrate
    executor = MigrationExecutor(connection)
    executor.migrate(executor.loader.graph.leaf_nodes("jobs"))


def test_migration_0002_keeps_the_attempts_of_older_jobs(migrate):
    now = timezone.now()
    times = {"started_at": now.isoformat(), "ended_at": now.isoformat()}
    attempts = [{**times, "error": str(number), "traceback": "…"} for number in range(3)]
    old = migrate("0001_initial")("jobs", "Job")
    fields = {"task": "task", "queue": "queue", "wake_at": now}
    jobs = [old.objects.create(attempts=each, **fields) for each in (attempts, [], attempts[:1])]
    Attempt = migrate("0002_attempt")("jobs", "Attempt")  # noqa: N806
    kept = [[each.error for each in Attempt.objects.filter(job=job.pk)] for job in jobs]
    assert kept == [["0", "1", "2"], [], ["0"]]
    assert {each.ended_at for each in Attempt.objects.all()} == {now}
