"""For INSTALLED_APPS of a Django project: `manage.py check` then looks at its tasks and settings."""

from django.apps import AppConfig


class CelerySteadyConfig(AppConfig):
    name = "celery_steady"
    verbose_name = "Celery"

    def ready(self):
        from celery_steady import checks  # noqa: F401  registers them
