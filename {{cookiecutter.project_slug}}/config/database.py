{% from "chosen.jinja" import has_jobs with context %}
"""How long connections to the database wait."""


def configure(database, folder):
    """Return the setting of this database, which is None if DATABASE_URL is missing."""
    if not database:
        return {}
    if database["ENGINE"] == "django.db.backends.sqlite3":
        database["NAME"] = folder / database["NAME"]
        # The web server, the worker and Beat share one file: wait for a lock instead of failing.
        database["OPTIONS"] = {
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
        }
{% if has_jobs %}
        database["TEST"] = {"NAME": folder / "test.sqlite3"}  # a file, for live tests
{% endif %}
    else:  # don't wait long for a server that has disappeared
        timeouts = {"connect_timeout": 5, "tcp_user_timeout": 10_000}  # seconds; milliseconds
        timeouts |= {"keepalives_idle": 5, "keepalives_interval": 5}  # and probe an idle connection
        database["OPTIONS"] = timeouts | database.get("OPTIONS", {})
    return database
