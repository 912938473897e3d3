"""Settings: those of the project, and a router that sends all reads to a read-only connection."""

from config.settings import *  # noqa: F403
from config.settings import DATABASES

options = {**DATABASES["default"]["OPTIONS"], "options": "-c default_transaction_read_only=on"}
DATABASES["replica"] = {**DATABASES["default"], "OPTIONS": options}
DATABASE_ROUTERS = ["faults.replica.Router"]


class Router:
    def db_for_read(self, model, **hints):
        return "replica"

    def db_for_write(self, model, **hints):
        return "default"
