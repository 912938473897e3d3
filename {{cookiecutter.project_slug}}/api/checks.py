{% from "chosen.jinja" import has_kubernetes, has_flower with context %}
"""Checks of the settings for `manage.py check --deploy`."""

{% if has_kubernetes %}
from pathlib import Path

from django.apps import apps
{% endif %}
from django.conf import settings
from django.core.checks import {{ "Error, " if has_flower }}{{ "Warning, " if has_kubernetes }}register
{% if has_kubernetes %}
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
{% endif %}
{% if has_flower %}


@register(deploy=True)
def check_flower(app_configs, **kwargs):
    users = settings.FLOWER_BASIC_AUTH.split(",")
    if any(user.partition(":")[2] in ("", "change-me") for user in users):
        yield Error(
            "FLOWER_BASIC_AUTH needs a password: anyone who reaches Flower can see and revoke tasks.",
            hint="Set it to user:password. If you don't run Flower, silence this check.",
            id="api.E002",
        )
{% endif %}
