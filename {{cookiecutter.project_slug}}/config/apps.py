from django.apps import AppConfig


class ProjectConfig(AppConfig):
    name = "config"

    def ready(self):
        from . import checks  # noqa: F401  they register themselves
