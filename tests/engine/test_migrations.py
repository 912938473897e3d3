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
    # Changed once: it copies the rows of the database that it migrates, also with a router.
    "0002_attempt.py": "5d063576cd7b3d269ba27070712a9a079efd0d1e895f7f9b343de747f43c0cc2",
    "0003_sweep_tick_due_at.py": "9fef9d19b1909a1e8b73d39d22bbdc6e0fd703b4f411ab3f4b7971a8a9809fb0",
    "0004_label_and_reason.py": "f1dfc63595fa7721de7a0c0e7a02fda625326340acc9d7f309a31427fd58fdfb",
    "0005_schedule_errors.py": "fcdd2b6a692ac7ec749d1c75ec5635ba055ee569786ea11aa1f2a1bac0b76d43",
    "0006_primary_and_owner.py": "6fd67d737ad33ba26e046e7d00b91a4a9e3c613a527c7ff66376317d3125cec3",
    "0007_plain_names.py": "bce76f39abbabf1492065fa5ccd8109e4bf2de2727a08aecc1869091df6ee62a",
    "0008_batches.py": "5950cc1065a4570ae3a9d8fecf99a4cf23f4aa8648b997c3931ad65c68141ac1",
    "0009_limits.py": "fa2be2f53555bb2f2c849260af66cfd88e1e81c20df2655e83db2bb8f95f5b8a",
    "0010_workers.py": "b8333edfac7dfdafa57cb8380c1ae6dae0297e8efea0d0549e58e01fb495544f",
    "0011_keys.py": "373f49940e45b705ed28ca0088468b1e2072b1885da3c6ef8136314f9ea94166",
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


def test_migration_0002_reads_no_replica(replica, migrate):
    """A query of another connection would wait for the end of the migration, which waits for it."""
    now = timezone.now()
    times = {"started_at": now.isoformat(), "ended_at": now.isoformat()}
    attempt = {**times, "error": "", "traceback": ""}
    old = migrate("0001_initial")("jobs", "Job").objects.using("default")
    old.create(attempts=[attempt], task="task", queue="queue", wake_at=now)
    assert migrate("0002_attempt")("jobs", "Attempt").objects.using("default").count() == 1
