"""The environment and the lines of .env. Where both have a variable, the environment wins."""

import os
from pathlib import Path

import environ

env = environ.Env()
env.read_env(Path(__file__).resolve().parent.parent / ".env")
env.escape_proxy = True  # "$" is a character, not a reference to a variable
values = {name: value.strip().replace("$", r"\$") for name, value in os.environ.items()}
env.ENVIRON = {name: value for name, value in values.items() if value}  # empty means missing
