"""The environment and the lines of .env. Where both have a variable, the environment wins."""

import os
import re
from pathlib import Path
from zoneinfo import available_timezones

import environ
from django.core.exceptions import ImproperlyConfigured

env = environ.Env()
env.address = env.level = env.rate = env.zone = env.str  # each with a pattern of its own
KINDS = {  # {method of env: (pattern of a right value, what it is)}
    "bool": ("true|false|yes|no|on|off|[01tfyn]", "True or False"),
    "int": (r"\d+", "a whole number"),
    "float": (r"\d*\.?\d+", "a number"),
    "level": ("debug|info|warning|error|critical", "DEBUG, INFO, WARNING, ERROR or CRITICAL"),
    "rate": (r"\d+/[smhd]\w*", "like 600/min"),
    "zone": ("|".join(map(re.escape, available_timezones())), "like Europe/Berlin"),
}
ADDRESS = r"[\w.+-]+:(//([^/?#]*@)?(\[.*\]|[^/?#@:]*)(:\d+)?([,;/?].*)?|//:memory:)"
for kind in "db", "cache", "email", "address":
    KINDS[kind] = ADDRESS, "like scheme://user:password@host:port/name, with %23 for #, and so on"

env.read_env(Path(__file__).resolve().parent.parent / ".env")
# To django-environ, a value that starts with $ names another variable. So each $ is escaped here, and
# escape_proxy makes \$ a $ again.
env.escape_proxy = True
values = {name: value.strip().replace("$", r"\$") for name, value in os.environ.items()}
env.ENVIRON = {name: value for name, value in values.items() if value}  # empty means missing

# One error names all wrong values: of the variables that the settings read, and how.
wrong, settings = [], Path(__file__).with_name("settings.py").read_text("utf-8")
for kind, name in re.findall(r"""env\.(\w+)\(\s*["'](\w+)""", settings):
    pattern, meaning = KINDS.get(kind, (".*", ""))
    if not re.fullmatch(pattern, value := env.ENVIRON.get(name, ""), re.IGNORECASE) and value:
        shown = "" if pattern == ADDRESS else f"={value}"  # an address may have a password
        wrong.append(f"{name}{shown} must be {meaning}")
if wrong:
    raise ImproperlyConfigured(f"Wrong in the environment or in .env: {'; '.join(wrong)}.")
