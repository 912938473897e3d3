from django.apps import AppConfig


class UsersConfig(AppConfig):
    name = "users"

    def ready(self):
        # Here, because config/ has no AppConfig.
        from config import checks  # noqa: F401  registers the project's checks
