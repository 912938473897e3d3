"""The migration has what the models say."""

from django.apps import apps
from django.core.management import call_command


def test_the_models_have_no_change_without_a_migration(db):
    call_command("makemigrations", "durable_jobs", check=True, dry_run=True)


def test_names_in_the_database_belong_to_the_library():
    """In PostgreSQL, the indexes of all apps share a schema."""
    models = apps.get_app_config("durable_jobs").get_models()
    named = [each for model in models for each in (*model._meta.indexes, *model._meta.constraints)]
    assert named and [each for each in named if not each.name.startswith("durable_jobs_")] == []
