"""The migration has what the models say."""

from django.core.management import call_command


def test_the_models_have_no_change_without_a_migration(db):
    call_command("makemigrations", "durable_jobs", check=True, dry_run=True)
