"""Checks of the settings for `manage.py check --deploy`."""

from pathlib import Path

from django.apps import apps
from django.conf import settings
from django.core.checks import Warning, register
from django.db.models import FileField


@register(deploy=True)
def check_uploads(app_configs, **kwargs):
    """Find uploads that containers can't store, and that a deploy would lose."""
    fields = [field for model in apps.get_models() for field in model._meta.local_fields]
    for field in [field for field in fields if isinstance(field, FileField)]:
        folder = getattr(field.storage, "location", None)
        if folder and Path(folder).is_relative_to(settings.BASE_DIR):
            yield Warning(
                f"{field} stores files in {folder}, with the code.",
                hint="Use S3, or a folder that the web server and all workers share.",
                id="api.W007",
            )
