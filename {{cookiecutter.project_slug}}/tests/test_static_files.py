from django.core.management import call_command


def test_static_files_refer_only_to_files_that_exist(settings, tmp_path):
    """Or `manage.py collectstatic` would fail at a deploy. A source map may be the missing one."""
    backend = "django.contrib.staticfiles.storage.ManifestStaticFilesStorage"
    settings.STORAGES = {**settings.STORAGES, "staticfiles": {"BACKEND": backend}}
    settings.STATIC_ROOT = tmp_path
    call_command("collectstatic", interactive=False, verbosity=0)
