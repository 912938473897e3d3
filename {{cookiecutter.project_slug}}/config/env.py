"""The environment and the lines of .env. Where both have a variable, the environment wins."""

import os
from pathlib import Path

import environ

env = environ.Env()
env.read_env(Path(__file__).resolve().parent.parent / ".env")
# To django-environ, a value that starts with $ names another variable. So each $ is escaped here, and
# escape_proxy makes \$ a $ again.
env.escape_proxy = True
values = {name: value.strip().replace("$", r"\$") for name, value in os.environ.items()}
env.ENVIRON = {name: value for name, value in values.items() if value}  # empty means missing
